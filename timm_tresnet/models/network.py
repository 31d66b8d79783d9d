"""The network of arXiv:2003.13630, with an argument for each of its ingredients."""

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from timm.layers import LayerType, calculate_drop_path_rates
from torch import Tensor, nn

from timm_tresnet.models.arguments import (
    STRIDES_AND_DILATIONS,
    check_classes,
    check_pooling,
    choose,
    per_stage,
    resolve_activation,
    resolve_indices,
)
from timm_tresnet.models.blocks import BasicBlock, Bottleneck
from timm_tresnet.models.explanation import Part, explain, format_parts
from timm_tresnet.models.features import set_checkpointing
from timm_tresnet.models.heads import choose_head
from timm_tresnet.models.layers import BlurPool2d, ConvNormAct, LinearHead, MLDecoderHead, Query2LabelHead, SpaceToDepth
from timm_tresnet.recompute.policy import SETTINGS
from timm_tresnet.recompute.stage import Body, Stage
from timm_tresnet.utils.notes import MULTI_LABEL, NAMED_BY, THRESHOLDS, drop_notes

_TRANSFORMERS = (MLDecoderHead, Query2LabelHead)  # heads with an initialisation of their own
_BLOCKS: dict[str, type[BasicBlock | Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class TResNet(nn.Module):
    """TResNet, a ResNet designed for high throughput on GPUs (arXiv:2003.13630).

    The defaults are TResNet-M. Every ingredient of the paper is an argument, so the paper's ablation can be repeated.
    With the same seed, the paper's variants have the same initial weights as timm's built-in ones.

    Args:
        layers: blocks per stage.
        in_chans: channels of the image.
        num_classes: number of classes; 0 for no classifier.
        width_factor: multiplies the 64 channels of the first stage.
        v2: TResNet-V2 ("ImageNet-21K Pretraining for the Masses", arXiv:2104.10972): bottlenecks in every stage unless
            `block` says otherwise, and widths rounded down to a multiple of 8.
        block: "basic" or "bottleneck", for all stages or for each; default: basic in the first two
            ("Block-Type Selection").
        stem: "space_to_depth" ("SpaceToDepth Stem"), or "conv7x7" for ResNet's 7x7 convolution and max pool.
        use_se: squeeze-and-excitation, for all stages or for each ("Optimized SE Layers").
        aa_layer: "blur" or True for blur-pooled downsampling ("Anti-Alias Downsampling"), False or "" for strided
            convolutions.
        act_layer: activation after the norms, a name or class of timm; the activation after a block's sum stays ReLU.
            Or "frelu", FReLU after norms and sums, see `timm_tresnet.models.layers.FReLU`.
        negative_slope: slope of "leaky_relu" in the blocks.
        stem_negative_slope: slope of "leaky_relu" in the stem.
        norm_layer: normalisation, a name or class of timm; "frozenbatchnorm2d" for batch norms with constant weights
            and statistics, which must come from pretrained weights.
        output_stride: 32, or 16 or 8 to dilate the last one or two stages instead of striding.
        global_pool: pooling before the classifier, a name of `timm.layers.SelectAdaptivePool2d`; "" for none.
        head: "linear", pooling and a linear layer; "bottleneck", pooling and two linear layers, see
            `timm_tresnet.models.layers.BottleneckHead`; "ml_decoder", attention instead of pooling, see
            `timm_tresnet.models.layers.MLDecoderHead`; "query2label", a transformer instead of pooling, see
            `timm_tresnet.models.layers.Query2LabelHead`.
        head_features: "bottleneck": width between the two layers, None for 512. "query2label": width inside the
            transformer's MLPs, None for 8192. With "linear", it selects "bottleneck".
        num_groups: "ml_decoder": number of groups of classes, at most num_classes; None for 100.
        decoder_embedding: "ml_decoder": width of the decoder, a multiple of 8, None for 768. "query2label": width of
            the transformer, a multiple of 4, None for the channels of the last feature map.
        label_embedding: "ml_decoder": width of word embeddings of labels, which replace groups for zero-shot, see
            `set_label_embeddings`; None for groups.
        learn_queries: "ml_decoder": train the queries of groups, as in 7eu7d7/ML-Danbooru.
        drop_rate: dropout before the classifier.
        drop_path_rate: probability of dropping the last block; it rises linearly from 0 at the first block.
        recompute: what backward recomputes in training instead of storing it, see `set_recompute`.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - input: (N, in_chans, H, W); with the space-to-depth stem, H and W multiples of 4
        - output: (N, num_classes)

    Raises:
        ValueError: if an argument has another value than these; in `forward`, if H or W does not fit the stem.
    """

    __jit_unused_properties__ = ("grad_checkpointing",)  # TorchScript cannot compile the setter

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 11, 3),
        in_chans: int = 3,
        num_classes: int = 1000,
        width_factor: float = 1.0,
        v2: bool = False,
        block: str | Sequence[str] | None = None,
        stem: str = "space_to_depth",
        use_se: bool | Sequence[bool] = (True, True, True, False),
        aa_layer: str | bool = "blur",
        act_layer: LayerType = "leaky_relu",
        negative_slope: float = 1e-3,
        stem_negative_slope: float = 1e-2,
        norm_layer: LayerType = "batchnorm2d",
        output_stride: int = 32,
        global_pool: str = "fast",
        head: str = "linear",
        head_features: int | None = None,
        num_groups: int | None = None,
        decoder_embedding: int | None = None,
        label_embedding: int | None = None,
        learn_queries: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        recompute: str = "activations",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        if block is None:
            block = "bottleneck" if v2 else ("basic", "basic", "bottleneck", "bottleneck")
        layers = per_stage("layers", layers)
        blocks = [choose("block", name, _BLOCKS) for name in per_stage("block", block)]
        use_se = per_stage("use_se", use_se)
        anti_alias = choose("aa_layer", aa_layer, {"blur": True, True: True, False: False, "": False})
        check_classes(num_classes)
        check_pooling(global_pool)
        strides, dilations = choose("output_stride", output_stride, STRIDES_AND_DILATIONS)
        choose("stem", stem, dict.fromkeys(("space_to_depth", "conv7x7")))
        planes = int(64 * width_factor)
        if v2:
            planes = planes // 8 * 8
        if planes < 1:
            raise ValueError(f"TResNet needs a width_factor that gives a channel or more, got {width_factor} (v2={v2})")
        make_head = choose_head(
            head,
            head_features=head_features,
            num_groups=num_groups,
            decoder_embedding=decoder_embedding,
            label_embedding=label_embedding,
            learn_queries=learn_queries,
        )

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.planes = planes
        # The same order of construction as timm's built-in, so that each weight draws the same random numbers.
        act_layer_of_stem = resolve_activation(act_layer, stem_negative_slope)
        self.body = _make_stem(
            stem, in_chans, planes, act_layer=act_layer_of_stem, norm_layer=norm_layer, **factory_kwargs
        )
        reduction = 4 if stem == "space_to_depth" else 2
        stem_info: dict[str, Any] = {"num_chs": planes, "reduction": reduction, "module": "body.conv1"}
        self.feature_info = [stem_info]
        self._feature_positions = [1 if stem == "space_to_depth" else 0, 2, 3, 4, 5]  # in body
        drop_path_rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, layers))
        in_channels, reduction = planes, 4
        for index in range(4):
            stage = _make_stage(
                blocks[index],
                [next(drop_path_rates) for _ in range(layers[index])],
                in_channels,
                planes * 2**index,
                strides[index],
                dilations[index],
                use_se=use_se[index],
                act_layer=resolve_activation(act_layer, negative_slope),
                norm_layer=norm_layer,
                anti_alias=anti_alias,
                **factory_kwargs,
            )
            in_channels = planes * 2**index * blocks[index].expansion
            reduction *= strides[index]
            self.body.add_module(f"layer{index + 1}", stage)
            self.feature_info.append(
                {"num_chs": in_channels, "reduction": reduction, "module": f"body.layer{index + 1}"}
            )
        self.set_recompute(recompute)
        if stem == "space_to_depth":
            s2d: Any = self.body.s2d
            s2d.min_size = _smallest_side(self.body)

        self.num_features = self.inplanes = in_channels
        self._grad_checkpointing = False
        self.head = make_head(
            in_channels, num_classes=num_classes, pool_type=global_pool, drop_rate=drop_rate, **factory_kwargs
        )
        self.head_hidden_size = self._head_hidden_size()
        self._draw_weights()

    def _head_hidden_size(self) -> int:
        if isinstance(self.head, LinearHead):
            pool = self.head.global_pool
            return self.num_features * (pool.feat_mult() if hasattr(pool, "feat_mult") else 1)
        return getattr(self.head, "num_features", self.num_features)

    def _draw_weights(self) -> None:
        if next(self.parameters()).is_meta:
            return  # its weights have no values; drawing them would take as long as all else
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")
            elif isinstance(module, nn.Linear) and not isinstance(self.head, _TRANSFORMERS):
                nn.init.normal_(module.weight, std=0.01)
        if isinstance(self.head, _TRANSFORMERS):
            self.head.draw_weights()
        for module in self.modules():
            if isinstance(module, BasicBlock):
                nn.init.zeros_(module.conv2.bn.weight)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.conv3.bn.weight)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise every parameter and reset every buffer, as the official code does for a new model.

        For a model made on the meta device, after `to_empty()`. Convolutions: He normal, fan-out, leaky ReLU
        (arXiv:1502.01852). Classifier: N(0, std 0.01). Batch norms: weight 1, bias 0; the last norm of each block has
        weight 0.
        """
        for module in self.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()
        self._draw_weights()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return regular expressions that group parameters for layer decay, by stage (coarse) or by block."""
        return {"stem": r"^body\.conv1", "blocks": r"^body\.layer(\d+)" if coarse else r"^body\.layer(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Store only every second block's output; backward recomputes the blocks.

        Running statistics are still updated once a step. Assigning to `grad_checkpointing` does the same.
        """
        self._grad_checkpointing = enable
        set_checkpointing(self, enable)

    @property
    def grad_checkpointing(self) -> bool:
        """Whether backward recomputes whole blocks, see `set_grad_checkpointing`."""
        return self._grad_checkpointing

    @grad_checkpointing.setter
    def grad_checkpointing(self, enable: bool) -> None:
        self.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def set_recompute(self, setting: str) -> None:
        """Choose what backward recomputes in training; loss and running statistics do not depend on it.

        Args:
            setting: "none" stores everything that autograd stores. "activations" (the default) stores the outputs of
                convolutions and recomputes norms, activations, products, sums and pools. "expansions" also recomputes
                the last 1x1 convolution of each bottleneck. See `timm_tresnet.recompute.policy`.

        Raises:
            ValueError: if the setting is unknown.
        """
        choose("recompute", setting, dict.fromkeys(SETTINGS))
        self.recompute = setting
        for module in self.modules():
            if isinstance(module, Body):
                module.recompute = setting

    @torch.jit.ignore
    def explain_recompute(self, images: Tensor) -> list[Part]:
        """Print which blocks are recomputed in backward, why others are not, and the memory that each stores.

        Runs the network forward twice in its present mode. Running statistics and the random state are restored.

        Args:
            images: (N, in_chans, H, W); a few images are enough.

        Returns:
            The rows of the printed table, see `timm_tresnet.models.explanation.Part`.
        """
        parts = explain(self, images)
        print(format_parts(parts))
        return parts

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the last layer, `head.fc`; an identity without classes, or a user-defined head that has no `fc`."""
        if isinstance(self.head, MLDecoderHead) and not self.num_classes:
            return nn.Identity()  # with label embeddings, fc exists before there are labels
        return getattr(self.head, "fc", self.head)

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one with random weights, on the network's device and in its dtype.

        A bottleneck head keeps its embedding unless the pooling changes. ML-Decoder keeps its decoder and gets new
        queries; with label_embedding it keeps its last layer too, which all labels share, and needs
        `set_label_embeddings` next. Without pooling, every pixel of the feature map is classified, except by ML-Decoder
        and Query2Label, which never pool. Names of the old classes are removed from `pretrained_cfg`.

        Args:
            num_classes: number of classes; 0 for no classifier.
            global_pool: pooling before the classifier; None to keep it, "" for none.

        Raises:
            ValueError: if the pooling or the number of classes is invalid, or the queries of an ML-Decoder head are
                folded. The network is then unchanged.
            TypeError: if the head is user-defined and has no method `reset(num_classes, pool_type)`.
        """
        check_classes(num_classes)
        if global_pool is not None:
            check_pooling(global_pool)
        self._check_head_resets("reset_classifier")
        weight = next(self.parameters())
        head: Any = self.head
        kept = set(head.modules())
        in_features = getattr(head, "in_features", self.num_features)
        head.in_features = self.num_features  # pruning changes it
        try:
            with torch.inference_mode(False):  # tensors from inference mode cannot be trained
                head.reset(num_classes, pool_type=global_pool)
        except ValueError:
            head.in_features = in_features
            raise
        self.num_classes = num_classes
        self.head.to(device=weight.device, dtype=weight.dtype)
        self.head.train(self.training)
        self.head_hidden_size = self._head_hidden_size()
        for module in self.head.modules():
            if isinstance(module, nn.Linear) and module not in kept and not isinstance(self.head, _TRANSFORMERS):
                nn.init.normal_(module.weight, std=0.01)
        self._update_pretrained_cfg(MULTI_LABEL, THRESHOLDS, NAMED_BY)

    def _check_head_resets(self, caller: str) -> None:
        if not callable(getattr(self.head, "reset", None)):
            raise TypeError(
                f"{caller} needs a head with a method reset(num_classes, pool_type), as timm's heads have, got the "
                f"user-defined {type(self.head).__name__}; assign another head to model.head, for example "
                "timm_tresnet.models.layers.LinearHead(model.num_features, num_classes)"
            )

    def _update_pretrained_cfg(self, *outdated: str, **fields: Any) -> None:
        """Drop class names and notes with an outdated prefix from the pretrained config, if any, and set fields."""
        if hasattr(self, "pretrained_cfg"):  # set by timm, together with default_cfg
            gone = ("label_names", "label_descriptions")
            config: Any = getattr(self, "pretrained_cfg")  # noqa: B009  # mypy would infer a wrong type
            kept = {name: value for name, value in config.items() if name not in gone}
            if "notes" in kept:
                kept["notes"] = drop_notes(kept, *outdated)
            self.pretrained_cfg = kept | fields
            self.default_cfg = self.pretrained_cfg

    @torch.jit.ignore
    def set_label_embeddings(self, names: Sequence[str], vectors: Tensor) -> None:
        """Set the labels of an ML-Decoder head for zero-shot; they need not be labels of the training.

        The names are stored in `pretrained_cfg`, the vectors in the state dict.

        Args:
            names: names of the labels, all different.
            vectors: a word embedding for each label, (len(names), label_embedding): a tensor, an array, or a list of
                vectors.

        Raises:
            ValueError: if the head has no label embeddings or its queries are folded, names are not different strings,
                or vectors have another shape or are not finite in the network's dtype.
        """
        if not isinstance(self.head, MLDecoderHead):
            raise ValueError("set_label_embeddings needs a network with head='ml_decoder' and label_embedding=WIDTH")
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise ValueError(f"set_label_embeddings needs a list of names, got {names!r}")
        names, vectors = list(names), _as_vectors(vectors)
        if not all(isinstance(name, str) for name in names):
            raise ValueError("set_label_embeddings needs names to be strings, got other values among them")
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(f"set_label_embeddings needs a name for each label, got {', '.join(twice[:5])} twice")
        if vectors.shape[:1] != (len(names),):
            raise ValueError(
                f"set_label_embeddings needs a vector for each of {len(names)} names, got {tuple(vectors.shape)}"
            )
        self.head.set_label_embeddings(vectors)
        self.num_classes = len(names)
        self._update_pretrained_cfg(THRESHOLDS, NAMED_BY, num_classes=len(names), label_names=tuple(names))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the feature maps of the stem and the stages.

        Args:
            x: images, (N, in_chans, H, W).
            indices: indices among the five features, negative ones from the end; a number n for the last n; None for
                all.
            norm: unused, part of timm's interface; TResNet has no norm after its stages.
            stop_early: skip the stages after the last requested feature.
            output_fmt: "NCHW", the only supported layout.
            intermediates_only: return only the list of features.

        Returns:
            A pair of the last feature map and the list of requested features, or only the list. Each feature has the
            shape (N, C, H / reduction, W / reduction), with C and reduction from `feature_info`.

        Raises:
            ValueError: if an index is out of range or output_fmt is not "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"forward_intermediates returns NCHW only, got output_fmt={output_fmt}")
        taken = resolve_indices(indices, len(self._feature_positions))
        positions = [self._feature_positions[index] for index in taken]
        last = max(positions)
        intermediates: list[Tensor] = []
        for position, module in enumerate(self.body):
            if not stop_early or position <= last:
                x = module(x)
                if position in positions:
                    intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last requested feature, and the classifier.

        Args:
            indices: see `forward_intermediates`.
            prune_norm: unused, part of timm's interface; TResNet has no norm after its stages.
            prune_head: remove classifier and pooling even if no stage is removed.

        Returns:
            The indices, counted from the front.
        """
        taken = resolve_indices(indices, len(self._feature_positions))
        end = self._feature_positions[max(taken)] + 1
        pruned = end < len(self.body)
        if prune_head or pruned:
            self._check_head_resets("prune_intermediate_layers")
        self.body = self.body[:end]
        self.set_recompute(self.recompute)
        if pruned:
            self.num_features = self.feature_info[max(taken)]["num_chs"]
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _make_stem(stem: str, in_chans: int, planes: int, **kwargs: Any) -> Body:
    """Make the stem; its output has a quarter of the image's resolution. kwargs are those of `ConvNormAct`."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    if stem == "space_to_depth":
        modules["s2d"] = SpaceToDepth(block_size=4)
        modules["conv1"] = ConvNormAct(in_chans * 16, planes, 3, **kwargs)
    else:
        modules["conv1"] = ConvNormAct(in_chans, planes, 7, stride=2, **kwargs)
        modules["maxpool"] = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    return Body(modules)


def _make_stage(
    block: type[BasicBlock | Bottleneck],
    drop_path_rates: Sequence[float],
    in_channels: int,
    planes: int,
    stride: int,
    dilation: tuple[int, int],
    **kwargs: Any,
) -> Stage:
    """Make a stage with a block for each of drop_path_rates; the first block downsamples. kwargs: `ResidualBlock`."""
    stage = Stage()
    for rate in drop_path_rates:
        stage.append(block(in_channels, planes, stride, dilation, drop_path_rate=rate, **kwargs))
        in_channels, stride, dilation = planes * block.expansion, 1, (dilation[1],) * 2
    return stage


def _as_vectors(vectors: Any) -> Tensor:
    """Turn word embeddings, a tensor, an array, or a list of vectors, into a tensor."""
    try:
        if isinstance(vectors, list | tuple):
            return torch.stack([torch.as_tensor(vector) for vector in vectors])
        return torch.as_tensor(vectors)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            "set_label_embeddings needs vectors as a tensor, an array or a list with a vector of equal width for each "
            f"label, got {type(vectors).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error


def _smallest_side(body: nn.Module) -> int:
    """Return the smallest H and W, in pixels, for which every blur's input is large enough to be reflected."""
    blurs = [module for module in body.modules() if isinstance(module, BlurPool2d)]
    side = 4
    while True:
        grid = side // 4
        for blur in blurs:
            if grid <= blur.dilation:
                break
            grid = math.ceil(grid / blur.stride)
        else:
            return side
        side += 4

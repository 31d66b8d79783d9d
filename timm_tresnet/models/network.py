"""The network of arXiv:2003.13630, each of whose ingredients is an argument."""

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
    take_indices,
)
from timm_tresnet.models.blocks import BasicBlock, Bottleneck
from timm_tresnet.models.explanation import Part, explain, format_parts
from timm_tresnet.models.features import set_checkpointing
from timm_tresnet.models.heads import choose_head
from timm_tresnet.models.layers import BlurPool2d, ConvNormAct, LinearHead, MLDecoderHead, Query2LabelHead, SpaceToDepth
from timm_tresnet.recompute.policy import SETTINGS
from timm_tresnet.recompute.stage import Body, Stage
from timm_tresnet.utils.notes import MULTI_LABEL, NAMED_BY, THRESHOLDS, drop_notes

_TRANSFORMERS = (MLDecoderHead, Query2LabelHead)  # heads that draw their weights by themselves
_BLOCKS: dict[str, type[BasicBlock | Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class TResNet(nn.Module):
    """TResNet, a ResNet designed for what GPUs are good at (arXiv:2003.13630).

    The defaults are TResNet-M. Every ingredient of the paper is an argument, so that its ablation can be repeated.
    With the same seed, the paper's variants start from the same weights as timm's built-in ones.

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
        act_layer: activation after the norms, a name or class that timm knows, while the sum of a block keeps its ReLU;
            or "frelu", FReLU behind norms and sums, see `timm_tresnet.models.layers.FReLU`.
        negative_slope: slope of "leaky_relu" in the blocks.
        stem_negative_slope: slope of "leaky_relu" in the stem.
        norm_layer: normalisation, a name or class that timm knows; "frozenbatchnorm2d" for batch norms that keep the
            weights and statistics they have, which have to come from pretrained weights.
        output_stride: 32, or 16 or 8 to dilate the last one or two stages instead of striding.
        global_pool: pooling before the classifier, as `timm.layers.SelectAdaptivePool2d` takes it; "" for none.
        head: "linear", a linear layer behind the pooling; "bottleneck", two of them, see
            `timm_tresnet.models.layers.BottleneckHead`; "ml_decoder", attention in place of the pooling, see
            `timm_tresnet.models.layers.MLDecoderHead`; "query2label", a transformer in its place, see
            `timm_tresnet.models.layers.Query2LabelHead`.
        head_features: width between the two layers of "bottleneck", which it asks for by itself, None for 512; of
            "query2label" that inside its small networks, None for 8192.
        num_groups: groups of classes of "ml_decoder"; None for 100, never more than there are classes.
        decoder_embedding: width of the decoder of "ml_decoder", a multiple of 8, None for 768; of "query2label", a
            multiple of 4, None for the channels of the last feature map.
        label_embedding: width of the word embeddings that "ml_decoder" takes in place of groups, for zero-shot, see
            `set_label_embeddings`; None for groups.
        learn_queries: train the queries of "ml_decoder" too, as 7eu7d7/ML-Danbooru does; not those of labels.
        drop_rate: dropout before the classifier.
        drop_path_rate: probability of dropping a block, rising linearly from 0 to this over the blocks.
        recompute: what backward recomputes instead of keeping it in training, see `set_recompute`.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - input: (N, in_chans, H, W); with the space-to-depth stem, H and W multiples of 4
        - output: (N, num_classes)

    Raises:
        ValueError: if an argument is not one of the above; in `forward`, if H or W does not fit the stem.
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
            raise ValueError(f"TResNet needs a width_factor that leaves a channel, got {width_factor} (v2={v2})")
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
        # The order of construction is the built-in's, and with it the random numbers each weight draws.
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
        """Draw every parameter and reset every buffer, as the official code does for a new model.

        For a model made on the meta device, after `to_empty()`: convolutions from a normal distribution (He et al.,
        fan-out, leaky ReLU), classifier from N(0, 0.01), batch norms 1 and 0, but 0 for the last one of each block.
        """
        for module in self.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()
        self._draw_weights()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Regular expressions that group parameters for layer decay, one group a stage (coarse) or a block."""
        return {"stem": r"^body\.conv1", "blocks": r"^body\.layer(\d+)" if coarse else r"^body\.layer(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only every second block's output for backward and run the blocks again there.

        Running statistics are updated once a step all the same. Assigning to `grad_checkpointing` does it too.
        """
        self._grad_checkpointing = enable
        set_checkpointing(self, enable)

    @property
    def grad_checkpointing(self) -> bool:
        """Whether blocks run again in backward, see `set_grad_checkpointing`."""
        return self._grad_checkpointing

    @grad_checkpointing.setter
    def grad_checkpointing(self, enable: bool) -> None:
        self.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def set_recompute(self, setting: str) -> None:
        """Choose what backward recomputes in training; loss and running statistics are the same with every setting.

        Args:
            setting: "none" stores what autograd stores; "activations" (the default) stores the convolutions' outputs
                and recomputes norms, activations, products, sums and pools from them; "expansions" also recomputes the
                last 1x1 convolution of each bottleneck. See `timm_tresnet.recompute.policy`.

        Raises:
            ValueError: if setting is none of these.
        """
        choose("recompute", setting, dict.fromkeys(SETTINGS))
        self.recompute = setting
        for module in self.modules():
            if isinstance(module, Body):
                module.recompute = setting

    @torch.jit.ignore
    def explain_recompute(self, images: Tensor) -> list[Part]:
        """Print and return which blocks are recomputed in backward, or why not, and what that stores.

        Runs the network forward twice, in the mode it is in; running statistics and random numbers stay as they were.

        Args:
            images: (N, in_chans, H, W); a few are enough.

        Returns:
            The rows of the table, see `timm_tresnet.models.explanation.Part`.
        """
        parts = explain(self, images)
        print(format_parts(parts))
        return parts

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last layer, `head.fc`: of ML-Decoder that of all groups, an identity without classes.

        Of a user-defined head without `fc`, the head itself.
        """
        if isinstance(self.head, MLDecoderHead) and not self.num_classes:
            return nn.Identity()  # that of labels waits for them
        return getattr(self.head, "fc", self.head)

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put in a new classifier, drawn as for a new network, on the device and in the dtype of this one.

        The embedding of a bottleneck head stays while the pooling does, the decoder of ML-Decoder always, with new
        queries. With label_embedding its last layer stays too, as it serves all labels: give it theirs by
        `set_label_embeddings`. Without pooling, every pixel of the feature map is classified; ML-Decoder needs no
        pooling. A user-defined head needs a `reset(num_classes, pool_type)`, as timm's heads have it. Names of the old
        classes leave `pretrained_cfg`.

        Args:
            num_classes: number of classes; 0 for no classifier.
            global_pool: pooling before the classifier; None to leave it as it is, "" for none.

        Raises:
            ValueError: if there is no such pooling or number of classes, or the queries of an ML-Decoder head are
                folded; nothing has changed then.
            TypeError: if the head is user-defined and has no `reset`.
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
            with torch.inference_mode(False):  # what is made inside that mode can never be trained with
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
                f"user-defined {type(self.head).__name__}; assign another one to the network's `head`, for example "
                "timm_tresnet.models.layers.LinearHead(model.num_features, num_classes)"
            )

    def _update_pretrained_cfg(self, *outdated: str, **fields: Any) -> None:
        """Replace the names of the classes, notes that begin as outdated, and fields, where timm has put a config."""
        if hasattr(self, "pretrained_cfg"):  # timm puts it there, and the same as default_cfg
            gone = ("label_names", "label_descriptions")
            config: Any = getattr(self, "pretrained_cfg")  # noqa: B009  # whose type mypy would infer from below
            kept = {name: value for name, value in config.items() if name not in gone}
            if "notes" in kept:
                kept["notes"] = drop_notes(kept, *outdated)
            self.pretrained_cfg = kept | fields
            self.default_cfg = self.pretrained_cfg

    @torch.jit.ignore
    def set_label_embeddings(self, names: Sequence[str], vectors: Tensor) -> None:
        """Ask for these labels from now on, seen in training or not; for zero-shot with an ML-Decoder head.

        The names go into `pretrained_cfg`, where `timm-tresnet` looks for them; the vectors into the state dict.

        Args:
            names: of the labels, each a different one.
            vectors: their word embeddings, (len(names), label_embedding), as a tensor, an array, or a list of these.

        Raises:
            ValueError: if the network has no such head or its queries are folded, names are not different texts, or
                vectors are not numbers of that shape that are finite in the network's dtype.
        """
        if not isinstance(self.head, MLDecoderHead):
            raise ValueError("set_label_embeddings needs a network with head='ml_decoder' and label_embedding=WIDTH")
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise ValueError(f"set_label_embeddings needs a list of names, got {names!r}")
        names, vectors = list(names), _as_vectors(vectors)
        if not all(isinstance(name, str) for name in names):
            raise ValueError("set_label_embeddings needs names to be texts, got others among them")
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
        """Features of the stem and of the stages.

        Args:
            x: images, (N, in_chans, H, W).
            indices: which of the five features to return (negative ones count from the end), the last n for a number
                n, all for None.
            norm: here for timm's interface; TResNet has no norm after its stages.
            stop_early: do not run the stages behind the last feature asked for.
            output_fmt: "NCHW", the only layout there is.
            intermediates_only: return the features alone.

        Returns:
            The features asked for, each (N, C, H / reduction, W / reduction) with C and reduction as in
            `feature_info`; unless intermediates_only, a pair of the last feature and those.

        Raises:
            ValueError: if an index is out of range or output_fmt is not "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"forward_intermediates returns NCHW only, got output_fmt={output_fmt}")
        taken = take_indices(indices, len(self._feature_positions))
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
        """Drop the stages behind the last feature asked for, and the classifier.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: here for timm's interface; TResNet has no norm after its stages.
            prune_head: drop the classifier and the pooling even if every stage stays.

        Returns:
            The indices, counted from the front.
        """
        taken = take_indices(indices, len(self._feature_positions))
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
    """What comes before the stages, at a quarter of the image's resolution; kwargs are those of `ConvNormAct`."""
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
    """A block for each of drop_path_rates, the first of which downsamples; kwargs are those of `ResidualBlock`."""
    stage = Stage()
    for rate in drop_path_rates:
        stage.append(block(in_channels, planes, stride, dilation, drop_path_rate=rate, **kwargs))
        in_channels, stride, dilation = planes * block.expansion, 1, (dilation[1],) * 2
    return stage


def _as_vectors(vectors: Any) -> Tensor:
    """Word embeddings as a tensor, from one, an array, or a list of either or of lists of numbers."""
    try:
        if isinstance(vectors, list | tuple):
            return torch.stack([torch.as_tensor(vector) for vector in vectors])
        return torch.as_tensor(vectors)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            "set_label_embeddings needs vectors as a tensor, an array or a list with one of equal width for each "
            f"label, got {type(vectors).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error


def _smallest_side(body: nn.Module) -> int:
    """Smallest H and W, in pixels, whose feature maps every blur of a space-to-depth network can reflect."""
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

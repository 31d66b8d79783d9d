"""TResNet (arXiv:2003.13630): the network, its variants, their pretrained configs and timm entrypoints."""

import functools
import logging
import math
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
from timm.layers import ClassifierHead, LayerType, get_act_layer
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_model_deprecations,
    resolve_pretrained_cfg,
)
from torch import Tensor, nn

from timm_tresnet.blocks import BasicBlock, Bottleneck
from timm_tresnet.catalogue import PublicWeight, load_catalogue, make_pretrained_cfg
from timm_tresnet.checkpoint import checkpoint_filter_fn
from timm_tresnet.layers import ActivatedBatchNorm2d, BlurPool2d, BottleneckHead, ConvNormAct, SpaceToDepth
from timm_tresnet.rebuild import SETTINGS, current, forget_released, pausing, recording, repeating_convolutions

__all__ = ["TResNet"]  # timm adds each entrypoint

_logger = logging.getLogger(__name__)

_BLOCKS: dict[str, type[BasicBlock | Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}
_STEMS = ("space_to_depth", "conv7x7")


class Recorded(nn.Sequential):
    """Modules in order; `timm_tresnet.rebuild` decides what they keep for backward in training."""

    def __init__(self, *modules: Any) -> None:
        super().__init__(*modules)
        self.rebuild = "activations"

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            for module in self:
                x = module(x)
            return x
        return self._forward_eager(x)

    @torch.jit.unused
    def _forward_eager(self, x: Tensor) -> Tensor:
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(x, Tensor)
        with nullcontext() if traced or not self.training else recording(self.rebuild):
            for module in self:
                x = self._run(module, x)
                forget_released()
        return x

    def _run(self, module: nn.Module, x: Tensor) -> Tensor:
        return module(x)


class Stage(Recorded):
    """Residual blocks in order; with grad_checkpointing on, every second one keeps its output and all run again."""

    def __init__(self, *blocks: Any) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def _run(self, module: nn.Module, x: Tensor) -> Tensor:
        if not self.grad_checkpointing or torch.jit.is_tracing():
            return module(x)
        if current() is None or not _is_recorded(module):
            return _checkpoint_block(module, x)
        with repeating_convolutions():
            return module(x)


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
        act_layer: activation after the norms, a name or class that timm knows; the sum of a block keeps its ReLU.
        negative_slope: slope of "leaky_relu" in the blocks.
        stem_negative_slope: slope of "leaky_relu" in the stem.
        norm_layer: normalisation, a name or class that timm knows.
        output_stride: 32, or 16 or 8 to dilate the last one or two stages instead of striding.
        global_pool: pooling before the classifier, as `timm.layers.SelectAdaptivePool2d` takes it; "" for none.
        head_features: width of an embedding between the pooling and the classifier, see
            `timm_tresnet.layers.BottleneckHead`; None for a single linear layer.
        drop_rate: dropout before the classifier.
        drop_path_rate: probability of dropping a block, rising linearly from 0 to this over the blocks.
        rebuild: what backward rebuilds instead of keeping it in training, see `set_rebuild`.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - input: (N, in_chans, H, W); with the space-to-depth stem, H and W multiples of 4
        - output: (N, num_classes)

    Raises:
        ValueError: if an argument is not one of the above; in `forward`, if H or W does not fit the stem.
    """

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
        head_features: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        rebuild: str = "activations",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory_kwargs = {"device": device, "dtype": dtype}
        if block is None:
            block = "bottleneck" if v2 else ("basic", "basic", "bottleneck", "bottleneck")
        layers = _per_stage("layers", layers)
        blocks = [_choose("block", name, _BLOCKS) for name in _per_stage("block", block)]
        use_se = _per_stage("use_se", use_se)
        _choose("stem", stem, dict.fromkeys(_STEMS))
        anti_alias = _choose("aa_layer", aa_layer, {"blur": True, True: True, False: False, "": False})
        strides, dilations = _choose("output_stride", output_stride, _STRIDES_AND_DILATIONS)
        stem_act_layer = _resolve_activation(act_layer, stem_negative_slope)
        act_layer = _resolve_activation(act_layer, negative_slope)

        self.num_classes = num_classes
        self.in_chans = in_chans
        planes = int(64 * width_factor)
        if v2:
            planes = planes // 8 * 8
        if planes < 1:
            raise ValueError(f"TResNet needs a width_factor that leaves a channel, got {width_factor} (v2={v2})")

        # The order of construction is the built-in's, and with it the random numbers each weight draws.
        body: OrderedDict[str, nn.Module] = OrderedDict()
        if stem == "space_to_depth":
            body["s2d"] = SpaceToDepth(block_size=4)
            body["conv1"] = ConvNormAct(
                in_chans * 16, planes, 3, act_layer=stem_act_layer, norm_layer=norm_layer, **factory_kwargs
            )
        else:
            body["conv1"] = ConvNormAct(
                in_chans, planes, 7, stride=2, act_layer=stem_act_layer, norm_layer=norm_layer, **factory_kwargs
            )
            body["maxpool"] = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self._feature_positions = [list(body).index("conv1"), 2, 3, 4, 5]  # in body
        self.feature_info = [
            {"num_chs": planes, "reduction": 4 if stem == "space_to_depth" else 2, "module": "body.conv1"}
        ]

        # torch's float32 linspace, on the CPU even while the meta device is the default: timm's rates to the last bit
        drop_path_rates = iter(torch.linspace(0, drop_path_rate, sum(layers), device="cpu").tolist())
        in_channels, reduction = planes, 4
        for index in range(4):
            stage = Stage()
            for position in range(layers[index]):
                first = position == 0
                stage.append(
                    blocks[index](
                        in_channels,
                        planes * 2**index,
                        stride=strides[index] if first else 1,
                        dilation=dilations[index] if first else (dilations[index][1],) * 2,
                        use_se=use_se[index],
                        act_layer=act_layer,
                        norm_layer=norm_layer,
                        anti_alias=anti_alias,
                        drop_path_rate=next(drop_path_rates),
                        **factory_kwargs,
                    )
                )
                in_channels = planes * 2**index * blocks[index].expansion
            for position in _kept_outputs(layers[index]):
                stage[position].keep_output = True
            for block in stage[-2::-2]:  # every second one: longer chains keep less, but more of them is alive at once
                block.keep_output_checkpointed = False
            reduction *= strides[index]
            name = f"layer{index + 1}"
            body[name] = stage
            self.feature_info.append({"num_chs": in_channels, "reduction": reduction, "module": f"body.{name}"})
        self.body = Recorded(body)
        self.set_rebuild(rebuild)
        if stem == "space_to_depth":
            body["s2d"].min_size = _smallest_side(self.body)

        self.num_features = in_channels
        if head_features is not None and head_features < 1:
            raise ValueError(f"TResNet needs head_features to be at least 1 or None, got {head_features}")
        # timm before 1.0.21 has no device and dtype here
        with nullcontext() if device is None else torch.device(device):
            if head_features is None:
                self.head = ClassifierHead(in_channels, num_classes, pool_type=global_pool, drop_rate=drop_rate)
            else:
                self.head = BottleneckHead(in_channels, head_features, num_classes, global_pool, drop_rate)
        self.head.to(dtype=dtype)
        self.head_hidden_size = self._head_hidden_size()
        self._draw_weights()

    def _head_hidden_size(self) -> int:
        if isinstance(self.head, BottleneckHead):
            return self.head.num_features
        return self.num_features * self.head.global_pool.feat_mult()

    def _draw_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
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
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self._draw_weights()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Regular expressions that group parameters for layer decay, one group a stage (coarse) or a block."""
        return {"stem": r"^body\.conv1", "blocks": r"^body\.layer(\d+)" if coarse else r"^body\.layer(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only every second block's output for backward and run the blocks again there.

        Running statistics are updated once a step all the same.
        """
        for module in self.body.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def set_rebuild(self, setting: str) -> None:
        """Choose what backward rebuilds in training; loss and running statistics are the same with every setting.

        Args:
            setting: "none" keeps what autograd keeps; "activations" (the default) keeps the convolutions' outputs and
                rebuilds what is pointwise or pooling work from them; "expansions" also repeats the last 1x1 convolution
                of each bottleneck. See `timm_tresnet.rebuild`.

        Raises:
            ValueError: if setting is none of these.
        """
        _choose("rebuild", setting, dict.fromkeys(SETTINGS))
        self.rebuild = setting
        for module in self.modules():
            if isinstance(module, Recorded):
                module.rebuild = setting

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an identity without classes."""
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put in a new classifier, drawn from N(0, 0.01), on the device and in the dtype of the network.

        The embedding of a bottleneck head stays while the pooling does.

        Args:
            num_classes: number of classes; 0 for no classifier.
            global_pool: pooling before the classifier; None to leave it as it is, "" for none.
        """
        weight = self.body.conv1.conv.weight
        self.num_classes = num_classes
        self.head.in_features = self.num_features  # pruning changes it
        kept = set(self.head.modules())
        self.head.reset(num_classes, global_pool)
        self.head.to(device=weight.device, dtype=weight.dtype)
        self.head.train(self.training)
        self.head_hidden_size = self._head_hidden_size()
        for module in self.head.modules():
            if isinstance(module, nn.Linear) and module not in kept:
                nn.init.normal_(module.weight, std=0.01)

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
        taken = _take_indices(indices, len(self._feature_positions))
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
        taken = _take_indices(indices, len(self._feature_positions))
        end = self._feature_positions[max(taken)] + 1
        pruned = end < len(self.body)
        self.body = self.body[:end]
        self.set_rebuild(self.rebuild)
        if pruned:
            self.num_features = self.feature_info[max(taken)]["num_chs"]
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


_STRIDES_AND_DILATIONS = {  # by output stride: strides of the stages, dilations before and after their downsampling
    32: ((1, 2, 2, 2), ((1, 1), (1, 1), (1, 1), (1, 1))),
    16: ((1, 2, 2, 1), ((1, 1), (1, 1), (1, 1), (1, 2))),
    8: ((1, 2, 1, 1), ((1, 1), (1, 1), (1, 2), (2, 4))),
}


def _choose(argument: str, value: Any, choices: dict[Any, Any]) -> Any:
    if value not in choices:
        names = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"TResNet needs {argument} to be one of {names}, got {value!r}")
    return choices[value]


def _per_stage(argument: str, value: Any) -> list[Any]:
    if isinstance(value, str | bool):
        return [value] * 4
    if not isinstance(value, Sequence) or len(value) != 4:
        raise ValueError(f"TResNet needs {argument} to have one entry for each of its 4 stages, got {value!r}")
    if argument == "layers" and any(not isinstance(count, int) or count < 1 for count in value):
        raise ValueError(f"TResNet needs at least one block a stage, got layers={value!r}")
    return list(value)


def _resolve_activation(act_layer: LayerType, negative_slope: float) -> LayerType:
    if act_layer == "leaky_relu":
        return functools.partial(nn.LeakyReLU, negative_slope=negative_slope)
    try:
        resolved = get_act_layer(act_layer)
    except KeyError:
        resolved = None
    if resolved is None:
        raise ValueError(f"TResNet needs act_layer to name an activation that timm knows, got {act_layer!r}")
    return resolved


def _kept_outputs(blocks: int) -> list[int]:
    """Positions of the blocks in a stage whose output is kept for backward.

    Rebuilding an output needs the one before it, so between two kept ones a chain of tensors is alive for a moment. It
    is short at the end of the stage, where backward begins with everything else still in memory, and grows towards the
    front: 2, 3, 4, ... A stage of up to 4 blocks is one chain.
    """
    kept = []
    position, chain = blocks - 3, 3
    while blocks > 4 and position > 0:
        kept.append(position)
        position -= chain + 1
        chain += 1
    return kept


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


def _take_indices(indices: int | list[int] | None, num_features: int) -> list[int]:
    if indices is None:
        return list(range(num_features))
    taken: list[int] = []
    if isinstance(indices, int):
        if indices < 1 or indices > num_features:
            raise ValueError(f"TResNet has {num_features} features, cannot take the last {indices}")
        for index in range(num_features - indices, num_features):
            taken.append(index)
    else:
        for index in indices:
            if index < -num_features or index >= num_features:
                raise ValueError(f"TResNet has {num_features} features, cannot take index {index}")
            taken.append(index + num_features if index < 0 else index)
    return taken


def _is_recorded(block: nn.Module) -> bool:
    """Whether `timm_tresnet.rebuild` can make all that a block keeps from the block's input."""
    units = [module for module in block.modules() if isinstance(module, ConvNormAct)]
    return isinstance(block, BasicBlock | Bottleneck) and all(isinstance(u.bn, ActivatedBatchNorm2d) for u in units)


def _checkpoint_block(block: nn.Module, x: Tensor) -> Tensor:
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if not torch.compiler.is_compiling():  # the compiler updates running statistics once by itself
        kwargs["context_fn"] = lambda: (nullcontext(), _keep_running_statistics(block))
        with pausing():
            return torch.utils.checkpoint.checkpoint(block, x, **kwargs)
    return torch.utils.checkpoint.checkpoint(block, x, **kwargs)


@contextmanager
def _keep_running_statistics(block: nn.Module) -> Iterator[None]:
    """Give a block that runs again copies of its running statistics to update, so that no batch counts twice."""
    originals = [
        (module, name, buffer)
        for module in block.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training
        for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in originals:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in originals:
            setattr(module, name, buffer)


ARCHITECTURES: dict[str, dict[str, Any]] = {  # blocks per stage and width
    "tresnet_s": {"layers": (3, 4, 7, 3)},  # asked for in Alibaba-MIIL/TResNet#40
    "tresnet_m": {"layers": (3, 4, 11, 3)},  # M, L, XL: Table "TResNet variants", arXiv:2003.13630
    "tresnet_l": {"layers": (4, 5, 18, 3), "width_factor": 1.2},
    "tresnet_xl": {"layers": (4, 5, 24, 3), "width_factor": 1.3},
    "tresnet_v2_l": {"layers": (3, 4, 23, 3), "v2": True},  # official code, src/models/tresnet_v2
    "tresnet_v2_xl": {"layers": (3, 8, 34, 5), "v2": True},  # Alibaba-MIIL/ML_Decoder, its "tresnet_xl"
    "test_tresnet": {"layers": (2, 2, 3, 1), "width_factor": 0.25},
}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "body.conv1.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
        **kwargs,
    }


# "timm/" is completed by timm to the repository timm/<architecture>.<tag>. Naming the file keeps pickles out.
_timm_hub = functools.partial(_cfg, hf_hub_id="timm/", hf_hub_filename="model.safetensors")
_timm_hub_448 = functools.partial(_timm_hub, input_size=(3, 448, 448), pool_size=(14, 14))


def _public_weight_cfg(public: PublicWeight) -> dict[str, Any]:
    """Config of a public weight that is on no Hub repository yet; of one with an ML-Decoder head, the backbone's."""
    return _cfg(**{"license": None, **make_pretrained_cfg(public, public.converted_classes)})


default_cfgs = generate_default_cfgs(
    {
        "tresnet_s.untrained": _cfg(),
        "tresnet_m.miil_in21k_ft_in1k": _timm_hub(),
        "tresnet_m.miil_in21k": _timm_hub(num_classes=11221),
        "tresnet_m.miil_in1k": _timm_hub(),
        "tresnet_l.miil_in1k": _timm_hub(),
        "tresnet_xl.miil_in1k": _timm_hub(),
        "tresnet_m.miil_in1k_448": _timm_hub_448(),
        "tresnet_l.miil_in1k_448": _timm_hub_448(),
        "tresnet_xl.miil_in1k_448": _timm_hub_448(),
        "tresnet_v2_l.miil_in21k_ft_in1k": _timm_hub(),
        "tresnet_v2_l.miil_in21k": _timm_hub(num_classes=11221),
        "tresnet_v2_xl.untrained": _cfg(),
        "test_tresnet.r64_cifar10": _cfg(
            file=str(Path(__file__).parent / "weights" / "test_tresnet.r64_cifar10.safetensors"),
            num_classes=10,
            input_size=(3, 64, 64),
            pool_size=(2, 2),
            crop_pct=1.0,
            label_names=(
                "airplane",
                "automobile",
                "bird",
                "cat",
                "deer",
                "dog",
                "frog",
                "horse",
                "ship",
                "truck",
            ),
        ),
        # Behind the others, so that no default changes.
        **{name: _public_weight_cfg(public) for name, public in load_catalogue().items() if not public.hf_hub_id},
    }
)

# ImageNet-1k top-1 in percent, from timm's results/results-imagenet.csv (validate.py with the configs above)
IMAGENET_TOP1 = {
    "tresnet_m.miil_in21k_ft_in1k": 83.09,
    "tresnet_m.miil_in1k": 80.816,
    "tresnet_l.miil_in1k": 81.498,
    "tresnet_xl.miil_in1k": 82.06,
    "tresnet_m.miil_in1k_448": 81.71,
    "tresnet_l.miil_in1k_448": 82.278,
    "tresnet_xl.miil_in1k_448": 83.066,
    "tresnet_v2_l.miil_in21k_ft_in1k": 83.91,
}

# The base of what the Hub's client raises when a connection fails, in whichever of httpx and requests it has
_TransportError = [HTTPError, *(base for base in HTTPError.__mro__ if base.__module__.startswith("requests"))][-1]


def _create_tresnet(variant: str, pretrained: bool, in_chans: int | None = None, **kwargs: Any) -> TResNet:
    _log_takeover()

    def build(**model_kwargs: Any) -> TResNet:
        if in_chans is not None:
            model_kwargs["in_chans"] = in_chans
        return TResNet(**model_kwargs)

    # Our filter adapts the stem to in_chans. timm would too, and for 2 or 4 channels it throws the stem away, so what
    # it is told is the checkpoint's own number of channels. Newer timm takes that from the pretrained config.
    if not hasattr(sys.modules["timm.models"], "get_model_traits"):
        kwargs["in_chans"] = 3
    public = _find_public_weight(variant, kwargs.get("pretrained_cfg"))
    if public and pretrained:
        _check_source(public, kwargs)
    try:
        return build_model_with_cfg(
            build,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": (1, 2, 3, 4), "flatten_sequential": True},
            **{**ARCHITECTURES[variant], **(public.network_arguments if public else {}), **kwargs},
        )
    except LocalEntryNotFoundError as error:
        reason = "it is not in the cache and the Hub cannot be reached"
        raise LocalEntryNotFoundError(_explain_missing_weights(variant, kwargs, reason)) from error
    except HfHubHTTPError:
        raise  # names the address and the status
    except _TransportError as error:
        reason = f"the download broke off: {error}"
        raise ConnectionError(_explain_missing_weights(variant, kwargs, reason)) from error


@functools.cache  # once a process
def _log_takeover() -> None:
    _logger.info("TResNet comes from the timm_tresnet plugin, not from timm; TIMM_TRESNET_AUTOLOAD=0 turns that off")


def _find_public_weight(variant: str, config: Any) -> PublicWeight | None:
    """Public weight of a registered tag; a config from the Hub or a folder comes with arguments of its own."""
    if config is not None and not isinstance(config, str):  # timm's scripts resolve the tag before
        fields = config if isinstance(config, dict) else vars(config)
        config = None if fields.get("source") else fields.get("tag")
    return load_catalogue().get(f"{variant}.{config}")


def _check_source(public: PublicWeight, kwargs: dict[str, Any]) -> None:
    config = resolve_pretrained_cfg(
        public.architecture, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
    )
    if config.has_weights or config.state_dict:
        return
    raise RuntimeError(
        f"{public.name} is on no Hub repository yet. If you have the original file, {public.files[0]}, convert it with "
        f"`timm-tresnet convert {public.files[0]} --public-weight {public.name} --output FOLDER` and load it with "
        "timm.create_model('local-dir:FOLDER', pretrained=True)"
    )


def _explain_missing_weights(variant: str, kwargs: dict[str, Any], reason: str) -> str:
    config = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    return (
        f"{variant} needs {config.hf_hub_filename or 'model.safetensors'} from the Hugging Face Hub repository "
        f"{config.hf_hub_id}, but {reason}. Either connect to the network, "
        "set HF_ENDPOINT to a mirror, point HF_HOME or cache_dir at a cache that holds it, load a folder with "
        "timm.create_model('local-dir:FOLDER', pretrained=True), or try the model inside the package, 'test_tresnet'"
    )


def tresnet_s(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """TResNet-S, 3-4-7-3 blocks; not in the paper, no public weights."""
    return _create_tresnet("tresnet_s", pretrained, **kwargs)


def tresnet_m(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """TResNet-M, 3-4-11-3 blocks (arXiv:2003.13630)."""
    return _create_tresnet("tresnet_m", pretrained, **kwargs)


def tresnet_l(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """TResNet-L, 4-5-18-3 blocks, width 1.2 (arXiv:2003.13630)."""
    return _create_tresnet("tresnet_l", pretrained, **kwargs)


def tresnet_xl(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """TResNet-XL, 4-5-24-3 blocks, width 1.3 (arXiv:2003.13630)."""
    return _create_tresnet("tresnet_xl", pretrained, **kwargs)


def tresnet_v2_l(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """TResNet-V2-L, 3-4-23-3 bottlenecks (arXiv:2104.10972); the "tresnet_l" of ImageNet-21k and ML-Decoder."""
    return _create_tresnet("tresnet_v2_l", pretrained, **kwargs)


def tresnet_v2_xl(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """TResNet-V2-XL, 3-8-34-5 bottlenecks; the "tresnet_xl" of ML-Decoder (arXiv:2111.12933)."""
    return _create_tresnet("tresnet_v2_xl", pretrained, **kwargs)


def test_tresnet(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """A tiny TResNet with CIFAR-10 weights inside the package, for trying things out."""
    return _create_tresnet("test_tresnet", pretrained, **kwargs)


_ENTRYPOINTS = (tresnet_s, tresnet_m, tresnet_l, tresnet_xl, tresnet_v2_l, tresnet_v2_xl, test_tresnet)
_DEPRECATED = {
    "tresnet_m_miil_in21k": "tresnet_m.miil_in21k",
    "tresnet_m_448": "tresnet_m.miil_in1k_448",
    "tresnet_l_448": "tresnet_l.miil_in1k_448",
    "tresnet_xl_448": "tresnet_xl.miil_in1k_448",
}


def register() -> None:
    """Put the variants into timm's registry and onto `timm.models`, in place of timm's own where it has one.

    Called when timm.models has been imported (`timm_tresnet.autoload`); calling it again changes nothing.
    """
    # Not `import timm.models`: while timm imports itself, it does not have that attribute yet.
    timm_models = sys.modules["timm.models"]
    with warnings.catch_warnings():
        for entrypoint in _ENTRYPOINTS:
            # Replacing these names is the point of the plugin; any other warning stays.
            warnings.filterwarnings("ignore", message=f"Overwriting {entrypoint.__name__} in registry")
            register_model(entrypoint)
    register_model_deprecations(__name__, _DEPRECATED)
    for name in __all__:
        setattr(timm_models, name, globals()[name])

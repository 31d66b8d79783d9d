"""The two residual blocks of TResNet ("Block-Type Selection", arXiv:2003.13630) and their shortcut."""

import functools
from collections.abc import Callable
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import LayerType
from torch import Tensor, nn

from timm_tresnet.models.layers import (
    BlurPool2d,
    ConvNormAct,
    FReLU,
    SqueezeExcite,
    StrideOneAvgPool2d,
    make_shortcut_pool,
)
from timm_tresnet.models.layers.readers import is_absent
from timm_tresnet.models.layers.regions import RunsInRegion
from timm_tresnet.recompute.compiled import is_in_region
from timm_tresnet.recompute.eligibility import find_user_code, is_untouched, stand_for
from timm_tresnet.recompute.policy import CONVOLUTION, EXPANSION
from timm_tresnet.recompute.program import Unreadable, read, reads_block
from timm_tresnet.recompute.run import Operation, Program


class ResidualBlock(RunsInRegion):
    """Base class of both blocks: arguments, shortcut and sum.

    Args:
        in_channels: channels of the input.
        planes: channels inside the block; the output has planes * expansion.
        stride: stride of the block, 1 or 2.
        dilation: dilations before and after the point where the block downsamples. They differ in the first block of a
            stage that is dilated instead of strided; stride is then 1.
        use_se: whether the block has a squeeze-and-excitation.
        act_layer: activation after every norm except the last. After the sum comes FReLU if act_layer is FReLU, else
            ReLU.
        norm_layer: normalisation after each convolution.
        anti_alias: whether a blur downsamples, instead of a strided convolution.
        drop_path_rate: probability of dropping an image's main path in training.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - input: (N, in_channels, H, W)
        - output: (N, planes * expansion, ceil(H / stride), ceil(W / stride))
    """

    expansion: int  # channels of the output over planes

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        dilation: tuple[int, int] = (1, 1),
        use_se: bool = True,
        act_layer: LayerType = nn.LeakyReLU,
        norm_layer: LayerType = "batchnorm2d",
        anti_alias: bool = True,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stride = stride
        self.drop_path = timm.layers.DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.act: nn.Module = nn.ReLU(inplace=True)
        unit_kwargs: dict[str, Any] = {"norm_layer": norm_layer, **factory_kwargs}
        self.downsample = _make_shortcut(in_channels, planes * self.expansion, stride, dilation, **unit_kwargs)
        unit = functools.partial(ConvNormAct, **unit_kwargs)
        aa = _make_blur(planes, stride, dilation, **factory_kwargs) if anti_alias else None
        downsampling = {"stride": stride if aa is None else 1, "dilation": dilation[0], "aa": aa}
        se = functools.partial(SqueezeExcite, **factory_kwargs) if use_se else lambda *channels: None
        self._add_main_path(in_channels, planes, unit, act_layer, downsampling, dilation[1], se)
        if getattr(act_layer, "needs_channels", False):
            make_act: Any = act_layer
            self.act = make_act(planes * self.expansion, **unit_kwargs)

    def add(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Sum of the main path and the shortcut, and the block's last activation."""
        if not torch.jit.is_scripting():
            if is_in_region():
                return self._add_in_region(x, shortcut)
        return self.act(self.drop_path(x) + shortcut)

    @torch.jit.unused
    def _add_in_region(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """`add` without in-place operations, which regions do not allow."""
        drop = self.drop_path
        if type(drop) is timm.layers.DropPath:
            if self.training and drop.drop_prob > 0:
                keep = 1 - drop.drop_prob
                mask = torch.bernoulli(x.new_empty(x.shape[0], *[1] * (x.ndim - 1)), keep)
                x = x * (mask / keep if keep > 0 and drop.scale_by_keep else mask)
        else:
            x = drop(x)
        x = x + shortcut
        return F.relu(x) if type(self.act) is nn.ReLU else self.act(x)

    def _add_main_path(
        self,
        in_channels: int,
        planes: int,
        unit: Callable[..., ConvNormAct],
        act_layer: LayerType,
        downsampling: dict[str, Any],  # arguments of the unit that downsamples
        dilation: int,  # after that unit
        se: Callable[[int, int], nn.Module | None],
    ) -> None:
        raise NotImplementedError


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions, for the first two stages: a large receptive field where resolution is high.

    A squeeze-and-excitation follows the second one. Arguments and shapes are those of `ResidualBlock`.
    """

    expansion = 1

    def _add_main_path(self, in_channels, planes, unit, act_layer, downsampling, dilation, se) -> None:
        self.conv1 = unit(in_channels, planes, 3, act_layer=act_layer, **downsampling)
        self.conv2 = unit(planes, planes, 3, dilation=dilation)
        self.se = se(planes, max(planes // 4, 64))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.conv1(x)  # 3x3, blur-pooled where the stage halves its resolution
        x = self.conv2(x)  # 3x3, no activation before the sum
        x = x if self.se is None else self.se(x)
        return self.add(x, shortcut)


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions, for the deep stages: depth at a quarter of the channels.

    A squeeze-and-excitation follows the 3x3 convolution, before the channels widen. Arguments and shapes are those of
    `ResidualBlock`.
    """

    expansion = 4

    def _add_main_path(self, in_channels, planes, unit, act_layer, downsampling, dilation, se) -> None:
        self.conv1 = unit(in_channels, planes, 1, act_layer=act_layer)
        # As in dilated ResNets, only the downsampling block keeps the smaller dilation of the stage before.
        self.conv2 = unit(planes, planes, 3, act_layer=act_layer, **downsampling)
        self.se = se(planes, max(planes * self.expansion // 8, 64))
        self.conv3 = unit(planes, planes * self.expansion, 1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.conv1(x)  # 1x1, narrows
        x = self.conv2(x)  # 3x3, blur-pooled where the stage halves its resolution
        x = x if self.se is None else self.se(x)
        x = self.conv3(x)  # 1x1, widens; no activation before the sum
        return self.add(x, shortcut)


for _block in (BasicBlock, Bottleneck):
    stand_for(_block, "add")


@reads_block(BasicBlock)
def _read_basic_block(block: BasicBlock) -> Program:
    return _read_block(block, (("conv1", CONVOLUTION), ("conv2", CONVOLUTION)), ())


@reads_block(Bottleneck)
def _read_bottleneck(block: Bottleneck) -> Program:
    return _read_block(block, (("conv1", CONVOLUTION), ("conv2", CONVOLUTION)), (("conv3", EXPANSION),))


def _read_block(
    block: nn.Module, units: tuple[tuple[str, str], ...], units_behind_se: tuple[tuple[str, str], ...]
) -> Program:
    if "add" in block.__dict__:
        raise Unreadable("a replaced add")
    act = block.__dict__["_modules"].get("act")
    behind: list[Operation] | None = None
    if type(act) is FReLU:
        behind = _read_part(block, "act", FReLU)
    elif type(act) is not nn.ReLU or not is_untouched(act):
        raise Unreadable(f"its last activation: {_describe(act)}")
    operations: list[Operation] = []
    for name, kind in units:
        operations += _read_part(block, name, ConvNormAct, kind)
    operations += _read_part(block, "se", (nn.Identity, SqueezeExcite))
    for name, kind in units_behind_se:
        operations += _read_part(block, name, ConvNormAct, kind)
    operations += _read_part(block, "drop_path", (nn.Identity, timm.layers.DropPath))
    shortcut = _read_part(block, "downsample", (nn.Identity, nn.Sequential))
    return Program(operations, shortcut, act, behind)


def _read_part(
    block: nn.Module, name: str, kinds: type[nn.Module] | tuple[type[nn.Module], ...], *arguments: str
) -> list[Operation]:
    part = block.__dict__["_modules"].get(name)
    if part is None and name in ("se", "downsample") and is_absent(block, name):
        return []
    if not isinstance(part, kinds):
        raise Unreadable(f"{name}: {_describe(part)}")
    try:
        return read(part, *arguments)
    except Unreadable as error:
        raise Unreadable(f"{name}: {error}") from None


def _describe(module: nn.Module | None) -> str:
    if module is None:
        return "it is missing"
    return find_user_code(module) or f"a {type(module).__name__}"


def _make_blur(channels: int, stride: int, dilation: tuple[int, int], **factory_kwargs: Any) -> BlurPool2d | None:
    """Make the blur of a block; None if the block does not downsample."""
    if stride == 1 and dilation[0] == dilation[1]:
        return None
    return BlurPool2d(channels, stride, dilation[0], **factory_kwargs)


def _make_shortcut(
    in_channels: int, out_channels: int, stride: int, dilation: tuple[int, int], **unit_kwargs: Any
) -> nn.Module | None:
    """Make a block's shortcut: None for identity; average pool, 1x1 convolution and norm if shapes change."""
    layers: list[nn.Module] = []
    if stride > 1:
        layers.append(make_shortcut_pool())
    elif dilation[0] != dilation[1]:
        layers.append(StrideOneAvgPool2d(dilation[0]))
    if layers or in_channels != out_channels:
        return nn.Sequential(*layers, ConvNormAct(in_channels, out_channels, 1, **unit_kwargs))
    return None

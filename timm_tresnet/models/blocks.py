"""The two residual blocks of TResNet ("Block-Type Selection", arXiv:2003.13630) and their shortcut."""

import functools
from collections.abc import Callable
from typing import Any

import timm.layers
import torch
from timm.layers import LayerType
from torch import Tensor, nn

from timm_tresnet.models.layers import (
    BlurPool2d,
    ConvNormAct,
    DropPath,
    ReLU,
    ShortcutPool2d,
    SqueezeExcite,
    StrideOneAvgPool2d,
)

_ABSENT = type(None)
_PARTS = {  # by name, beside the units
    "act": nn.ReLU,
    "downsample": (_ABSENT, nn.Identity, nn.Sequential),
    "drop_path": (nn.Identity, timm.layers.DropPath),
    "se": (_ABSENT, nn.Identity, SqueezeExcite),
}
_PARTS_OF_SHORTCUT = (ConvNormAct, ShortcutPool2d, StrideOneAvgPool2d)


class ResidualBlock(nn.Module):
    """What both blocks have in common: their arguments, the shortcut and the sum.

    Args:
        in_channels: channels of the input.
        planes: channels inside the block; the output has planes * expansion.
        stride: stride of the block, 1 or 2.
        dilation: dilations before and after the point where the block downsamples. They differ where a stage is
            dilated instead of strided; stride is then 1.
        use_se: whether the block has a squeeze-and-excitation.
        act_layer: activation after every norm but the last.
        norm_layer: normalisation after each convolution.
        anti_alias: whether a blur does the downsampling, instead of a strided convolution.
        drop_path_rate: probability of dropping the main path of an image in training.
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
        factory_kwargs = {"device": device, "dtype": dtype}
        self.stride = stride
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.act = ReLU()
        unit_kwargs = {"norm_layer": norm_layer, **factory_kwargs}
        self.downsample = _make_shortcut(in_channels, planes * self.expansion, stride, dilation, **unit_kwargs)
        unit = functools.partial(ConvNormAct, **unit_kwargs)
        aa = _make_blur(planes, stride, dilation, **factory_kwargs) if anti_alias else None
        downsampling = {"stride": stride if aa is None else 1, "dilation": dilation[0], "aa": aa}
        se = functools.partial(SqueezeExcite, **factory_kwargs) if use_se else lambda *channels: None
        self._add_main_path(in_channels, planes, unit, act_layer, downsampling, dilation[1], se)

    @torch.jit.unused
    def has_own_parts(self) -> bool:
        """Whether its parts are of the kinds that the constructor makes."""
        parts = all(isinstance(part, _PARTS.get(name, ConvNormAct)) for name, part in self._modules.items())
        shortcut = self.downsample if isinstance(self.downsample, nn.Sequential) else ()
        return parts and all(isinstance(part, _PARTS_OF_SHORTCUT) for part in shortcut)

    def _add_main_path(
        self,
        in_channels: int,
        planes: int,
        unit: Callable[..., ConvNormAct],
        act_layer: LayerType,
        downsampling: dict[str, Any],  # arguments of the unit that downsamples
        dilation: int,  # behind that
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
        return self.act(self.drop_path(x) + shortcut)


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions, for the deep stages: depth at a quarter of the channels.

    A squeeze-and-excitation follows the 3x3 convolution, before the channels widen. Arguments and shapes are those of
    `ResidualBlock`.
    """

    expansion = 4

    def _add_main_path(self, in_channels, planes, unit, act_layer, downsampling, dilation, se) -> None:
        self.conv1 = unit(in_channels, planes, 1, act_layer=act_layer)
        # As in dilated ResNets, only the downsampling block looks at the finer grid it came from.
        self.conv2 = unit(planes, planes, 3, act_layer=act_layer, **downsampling)
        self.se = se(planes, max(planes * self.expansion // 8, 64))
        self.conv3 = unit(planes, planes * self.expansion, 1, expands=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.conv1(x)  # 1x1, narrows
        x = self.conv2(x)  # 3x3, blur-pooled where the stage halves its resolution
        x = x if self.se is None else self.se(x)
        x = self.conv3(x)  # 1x1, widens; no activation before the sum
        return self.act(self.drop_path(x) + shortcut)


def _make_blur(channels: int, stride: int, dilation: tuple[int, int], **factory_kwargs: Any) -> BlurPool2d | None:
    """Blur of a block, None where the block does not downsample."""
    if stride == 1 and dilation[0] == dilation[1]:
        return None
    return BlurPool2d(channels, stride, dilation[0], **factory_kwargs)


def _make_shortcut(
    in_channels: int, out_channels: int, stride: int, dilation: tuple[int, int], **unit_kwargs: Any
) -> nn.Module | None:
    """Shortcut of a block: None for the input itself, or average pool, 1x1 convolution and norm where shapes change."""
    layers: list[nn.Module] = []
    if stride > 1:
        layers.append(ShortcutPool2d())
    elif dilation[0] != dilation[1]:
        layers.append(StrideOneAvgPool2d(dilation[0]))
    if layers or in_channels != out_channels:
        return nn.Sequential(*layers, ConvNormAct(in_channels, out_channels, 1, **unit_kwargs))
    return None

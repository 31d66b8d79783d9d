"""The two residual blocks of TResNet ("Block-Type Selection", arXiv:2003.13630) and their shortcut."""

import torch
from timm.layers import LayerType
from torch import Tensor, nn

from timm_tresnet import rebuild
from timm_tresnet.layers import BlurPool2d, ConvNormAct, DropPath, ShortcutPool2d, SqueezeExcite, StrideOneAvgPool2d


class _ResidualBlock(nn.Module):
    """What both blocks end with."""

    def __init__(self, drop_path_rate: float) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.act = nn.ReLU(inplace=True)
        self.keep_output = False  # see timm_tresnet.rebuild
        self.keep_output_checkpointed = True  # the same where convolutions are repeated

    def add_shortcut(self, x: Tensor, shortcut: Tensor) -> Tensor:
        x = self.drop_path(x)
        y = x + shortcut
        if not torch.jit.is_scripting():
            self._record_sum(y, x, shortcut)
        return self.act(y)

    @torch.jit.unused
    def _record_sum(self, y: Tensor, x: Tensor, shortcut: Tensor) -> None:
        tape = rebuild.current()
        if tape is None or (self.keep_output_checkpointed if tape.repeats_convolutions else self.keep_output):
            return
        if type(self.act) is nn.ReLU and self.act.inplace and rebuild.is_plain(self.act):
            rebuild.record(y, _rectified_sum, x, shortcut, edits=1)  # the ReLU is the edit


def _rectified_sum(x: Tensor, shortcut: Tensor) -> Tensor:
    return (x + shortcut).relu_()


class BasicBlock(_ResidualBlock):
    """Two 3x3 convolutions, for the first two stages: a large receptive field where resolution is high.

    Args:
        in_channels: channels of the input.
        planes: channels inside the block; the output has planes * expansion = planes.
        stride: stride of the block, 1 or 2.
        dilation: dilations before and after the point where the block downsamples. They differ where a stage is
            dilated instead of strided; stride is then 1.
        use_se: whether a squeeze-and-excitation follows the second convolution.
        act_layer: activation after the first norm.
        norm_layer: normalisation after each convolution.
        anti_alias: whether a blur does the downsampling, instead of a strided convolution.
        drop_path_rate: probability of dropping the main path of an image in training.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - input: (N, in_channels, H, W)
        - output: (N, planes * expansion, ceil(H / stride), ceil(W / stride))
    """

    expansion = 1

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
        super().__init__(drop_path_rate)
        factory_kwargs = {"device": device, "dtype": dtype}
        out_channels = planes * self.expansion
        self.downsample = make_shortcut(in_channels, out_channels, stride, dilation, norm_layer, **factory_kwargs)
        aa = make_blur(planes, stride, dilation, **factory_kwargs) if anti_alias else None
        self.conv1 = ConvNormAct(
            in_channels,
            planes,
            kernel_size=3,
            stride=stride if aa is None else 1,
            dilation=dilation[0],
            act_layer=act_layer,
            norm_layer=norm_layer,
            aa=aa,
            **factory_kwargs,
        )
        self.conv2 = ConvNormAct(
            planes, out_channels, kernel_size=3, dilation=dilation[1], norm_layer=norm_layer, **factory_kwargs
        )
        reduced_channels = max(planes * self.expansion // 4, 64)
        self.se = SqueezeExcite(out_channels, reduced_channels, **factory_kwargs) if use_se else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x)
        x = self.conv1(x)  # 3x3, blur-pooled where the stage halves its resolution
        x = self.conv2(x)  # 3x3, no activation before the sum
        x = self.se(x)
        return self.add_shortcut(x, shortcut)


class Bottleneck(_ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions, for the deep stages: depth at a quarter of the channels.

    Args:
        in_channels: channels of the input.
        planes: channels inside the block; the output has planes * expansion = 4 * planes.
        stride: stride of the block, 1 or 2.
        dilation: dilations before and after the point where the block downsamples. They differ where a stage is
            dilated instead of strided; stride is then 1.
        use_se: whether a squeeze-and-excitation follows the 3x3 convolution, before the channels widen.
        act_layer: activation after the first two norms.
        norm_layer: normalisation after each convolution.
        anti_alias: whether a blur does the downsampling, instead of a strided convolution.
        drop_path_rate: probability of dropping the main path of an image in training.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - input: (N, in_channels, H, W)
        - output: (N, planes * expansion, ceil(H / stride), ceil(W / stride))
    """

    expansion = 4

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
        super().__init__(drop_path_rate)
        factory_kwargs = {"device": device, "dtype": dtype}
        out_channels = planes * self.expansion
        self.downsample = make_shortcut(in_channels, out_channels, stride, dilation, norm_layer, **factory_kwargs)
        aa = make_blur(planes, stride, dilation, **factory_kwargs) if anti_alias else None
        self.conv1 = ConvNormAct(
            in_channels, planes, kernel_size=1, act_layer=act_layer, norm_layer=norm_layer, **factory_kwargs
        )
        self.conv2 = ConvNormAct(
            planes,
            planes,
            kernel_size=3,
            stride=stride if aa is None else 1,
            # As in dilated ResNets, only the downsampling block looks at the finer grid it came from.
            dilation=dilation[0],
            act_layer=act_layer,
            norm_layer=norm_layer,
            aa=aa,
            **factory_kwargs,
        )
        reduced_channels = max(planes * self.expansion // 8, 64)
        self.se = SqueezeExcite(planes, reduced_channels, **factory_kwargs) if use_se else nn.Identity()
        self.conv3 = ConvNormAct(
            planes, out_channels, kernel_size=1, norm_layer=norm_layer, expands=True, **factory_kwargs
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x)
        x = self.conv1(x)  # 1x1, narrows
        x = self.conv2(x)  # 3x3, blur-pooled where the stage halves its resolution
        x = self.se(x)
        x = self.conv3(x)  # 1x1, widens; no activation before the sum
        return self.add_shortcut(x, shortcut)


def make_blur(
    channels: int,
    stride: int,
    dilation: tuple[int, int],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> BlurPool2d | None:
    """Blur of a block, None where the block does not downsample.

    Args:
        channels: number of channels.
        stride: stride of the block, 1 or 2.
        dilation: dilations before and after the point where the block downsamples.
        device: device of the kernel.
        dtype: dtype of the kernel.
    """
    if stride == 1 and dilation[0] == dilation[1]:
        return None
    return BlurPool2d(channels, stride, dilation[0], device=device, dtype=dtype)


def make_shortcut(
    in_channels: int,
    out_channels: int,
    stride: int,
    dilation: tuple[int, int],
    norm_layer: LayerType,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Shortcut of a block: the input itself, or average pool, 1x1 convolution and norm where shapes change.

    Args:
        in_channels: channels of the block's input.
        out_channels: channels of the block's output.
        stride: stride of the block, 1 or 2.
        dilation: dilations before and after the point where the block downsamples.
        norm_layer: normalisation after the convolution.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """
    layers: list[nn.Module] = []
    if stride > 1:
        layers.append(ShortcutPool2d())
    elif dilation[0] != dilation[1]:
        layers.append(StrideOneAvgPool2d(dilation[0]))
    if layers or in_channels != out_channels:
        layers.append(ConvNormAct(in_channels, out_channels, 1, norm_layer=norm_layer, device=device, dtype=dtype))
        return nn.Sequential(*layers)
    return nn.Identity()

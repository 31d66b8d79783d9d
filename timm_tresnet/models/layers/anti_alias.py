"""Anti-aliased downsampling: blur pool in the main path, average pool in the shortcut."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm.layers
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from timm_tresnet.models.layers.readers import Map, are_constants
from timm_tresnet.recompute.policy import BLUR
from timm_tresnet.recompute.program import call, reads
from timm_tresnet.recompute.run import Operation, Result, Run
from timm_tresnet.recompute.saved import Recomputed, Source, Stored, discard


@torch.fx.wrap
def blur_pool(x: Tensor, kernel: Tensor, stride: int, dilation: int) -> Tensor:
    """Function of BlurPool2d; a leaf for torch.fx, which cannot trace the check of the size."""
    kernel = _fit_kernel(x, kernel, dilation)
    if not torch.jit.is_scripting():
        x = _pad(x, dilation)
    else:
        x = F.pad(x, [dilation, dilation, dilation, dilation], mode="reflect")
    return F.conv2d(x, kernel, stride=stride, dilation=dilation, groups=kernel.shape[0])


def _fit_kernel(x: Tensor, kernel: Tensor, dilation: int) -> Tensor:
    """Check x's size and return the kernel for its channels and dtype."""
    if not torch.jit.is_tracing():  # tracing would freeze the comparisons and warn about them
        if x.shape[2] <= dilation or x.shape[3] <= dilation:
            raise ValueError(
                f"BlurPool2d reflects its input at the border and needs H and W of at least {dilation + 1}, "
                f"got {x.shape[2]}x{x.shape[3]}; give the network larger images"
            )
        if x.shape[1] != kernel.shape[0]:
            kernel = kernel[: x.shape[1]]  # structured pruning removed channels; all channels have the same taps
    if kernel.dtype != x.dtype:  # FSDP's mixed precision does not cast buffers; exact, and no node if traced
        kernel = kernel.to(x.dtype)
    return kernel


@torch.jit.unused
def _pad(x: Tensor, width: int) -> Tensor:
    if not torch.compiler.is_compiling() and width == 1 and _is_channels_last_on_cuda(x):
        # PyTorch's kernel would return contiguous layout, and so would all following layers.
        x = torch.cat([x[:, :, 1:2], x, x[:, :, -2:-1]], dim=2)
        return torch.cat([x[:, :, :, 1:2], x, x[:, :, :, -2:-1]], dim=3)
    return F.pad(x, [width, width, width, width], mode="reflect")


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _is_channels_last_on_cuda(x: Tensor) -> bool:
    return x.is_cuda and _is_channels_last(x)


_conv2d = F.conv2d


def _blur_in_steps(x: Tensor, kernel: Tensor, stride: int, dilation: int) -> tuple[Tensor, Tensor]:
    """Return the padded input and the output of a blur, for `timm_tresnet.recompute`."""
    kernel = _fit_kernel(x, kernel, dilation)
    fast = dilation == 1 and _is_channels_last_on_cuda(x)
    padded = _ReflectOnCuda.apply(x) if fast else _pad(x, dilation)
    return padded, _conv2d(padded, kernel, None, stride, 0, dilation, kernel.shape[0])


def _recompute_blur(x: Tensor, kernel: Tensor, stride: int, dilation: int, dtype: torch.dtype) -> Tensor:
    """Recompute blur_pool in its output's dtype; autocast had cast input and kernel to it."""
    kernel = _fit_kernel(x, kernel, dilation).to(dtype)
    return _conv2d(_pad(x.to(dtype), dilation), kernel, None, stride, 0, dilation, kernel.shape[0])


class _ReflectOnCuda(torch.autograd.Function):
    """`_pad` by one pixel in channels-last layout on CUDA; its backward makes fewer copies than autograd's."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return _pad(x, 1)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> Tensor:
        for dim in (2, 3):
            first, grad_y, last = grad_y.split([1, grad_y.shape[dim] - 2, 1], dim)
            grad_y = grad_y.clone()
            grad_y.narrow(dim, 1, 1).add_(first)  # gradient of the copied row or column
            grad_y.narrow(dim, -2, 1).add_(last)
        return grad_y


class BlurPool2d(timm.layers.BlurPool2d):
    """timm's blur pool: blur with the 3x3 binomial kernel [1, 2, 1] x [1, 2, 1] / 16, keep every stride-th pixel.

    Follows a stride-1 convolution and replaces its stride ("Anti-Alias Downsampling", arXiv:2003.13630;
    arXiv:1904.11486). Borders are reflected.

    Args:
        channels: number of input and output channels, C; after pruning, the input may have fewer.
        stride: step between output pixels; 1 keeps the resolution, for dilated stages.
        dilation: step between the kernel's taps, in pixels.
        device: device of the kernel.
        dtype: dtype of the kernel; its values, powers of two, are exact in every floating-point dtype.

    Shape:
        - input: (N, C, H, W), H and W larger than dilation
        - output: (N, C, ceil(H / stride), ceil(W / stride))

    Raises:
        ValueError: if H or W is not larger than dilation.
    """

    kernel: Tensor

    def __init__(
        self,
        channels: int,
        stride: int = 2,
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # timm's constructor would make a buffer under another name
        self.channels = channels
        self.stride = stride
        self.dilation = dilation
        self.filt_size, self.pad_mode, self.padding = 3, "reflect", [dilation] * 4  # timm's attributes
        # Not part of the state dict: it is the same in every model, and timm's checkpoints do not have it.
        self.register_buffer("kernel", torch.empty(channels, 1, 3, 3, device=device, dtype=dtype), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the kernel; needed after `to_empty()` on a model made on the meta device."""
        taps = torch.tensor([0.25, 0.5, 0.25], device=self.kernel.device, dtype=self.kernel.dtype)
        with torch.no_grad():
            self.kernel.copy_(taps[:, None] * taps)

    def init_non_persistent_buffers(self) -> None:
        """Fill the kernel; timm calls this name."""
        self.reset_parameters()

    @property
    def filt(self) -> Tensor:
        """kernel, under timm's name."""
        return self.kernel

    def forward(self, x: Tensor) -> Tensor:
        return blur_pool(x, self.kernel, self.stride, self.dilation)

    def extra_repr(self) -> str:
        return f"{self.channels}, stride={self.stride}, dilation={self.dilation}"


class ShapeOnly:
    """Stands for a saved input of a linear function, whose backward needs only its shape."""

    __slots__ = ("shape", "stride", "dtype", "device")

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.stride, self.dtype, self.device = tensor.shape, tensor.stride(), tensor.dtype, tensor.device

    def materialize(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclass(slots=True, eq=False)
class Blur(Operation):
    """A blur: padding and a convolution with a constant kernel; backward needs only the shapes of their inputs.

    Args:
        module: the layer.
        function: returns the padded input and the output.
        recompute: recomputes the output from the input, in a given dtype.
    """

    function: Callable[[Tensor], tuple[Tensor, Tensor]]
    recompute: Callable[..., Tensor]

    def run(self, x: Tensor, source: Source, run: Run) -> Result:
        padded, y = self.function(x)
        node: Any = y.grad_fn
        if node is None:
            return y, None
        discard(node._raw_saved_input, ShapeOnly, ShapeOnly.materialize)
        saved = getattr(padded.grad_fn, "_raw_saved_self", None)
        if saved is not None:
            discard(saved, ShapeOnly, ShapeOnly.materialize)
        if source is None or BLUR not in run.repeats:
            return y, Stored(y)
        return y, Recomputed(functools.partial(self.recompute, dtype=y.dtype), (source,))


@reads(BlurPool2d)
def _read_blur(blur: BlurPool2d) -> list[Operation]:
    kernel, stride, dilation = blur._buffers.get("kernel"), blur.stride, blur.dilation
    if type(kernel) is not Tensor or kernel.requires_grad or not are_constants((stride, dilation)):
        return [call(blur)]
    arguments: dict[str, Any] = {"kernel": kernel, "stride": stride, "dilation": dilation}
    return [Blur(blur, functools.partial(_blur_in_steps, **arguments), functools.partial(_recompute_blur, **arguments))]


_POOL: dict[str, Any] = {"kernel_size": 2, "stride": 2, "padding": 0, "ceil_mode": True, "count_include_pad": False}


def make_shortcut_pool() -> nn.AvgPool2d:
    """Make the shortcut's average pool in a strided stage: 2x2, stride 2, counting only pixels inside the image."""
    return nn.AvgPool2d(**_POOL)


@reads(nn.AvgPool2d)
def _read_pool(pool: nn.AvgPool2d) -> list[Operation]:
    constants = {name: getattr(pool, name) for name in _POOL}
    if not are_constants(constants.values()) or pool.divisor_override is not None:
        return [call(pool)]
    average = functools.partial(F.avg_pool2d, **constants)
    return [Map(pool, _pool_fast if constants == _POOL else average, average)]


def _pool_fast(x: Tensor) -> Tensor:
    if _is_channels_last_on_cuda(x) and x.shape[2] % 2 == x.shape[3] % 2 == 0:
        return _EvenPool.apply(x)
    return F.avg_pool2d(x, **_POOL)


class _EvenPool(torch.autograd.Function):
    """The shortcut's average pool; on CUDA in channels-last layout, its backward is several times PyTorch's speed."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, **_POOL)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> Tensor:
        quarter = (grad_y / 4).permute(0, 2, 3, 1)  # (N, H / 2, W / 2, C)
        batch, height, width, channels = quarter.shape
        spread = quarter[:, :, None, :, None].expand(batch, height, 2, width, 2, channels)
        return spread.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)

    @staticmethod
    def jvp(ctx: FunctionCtx, tangent: Tensor) -> Tensor:
        return F.avg_pool2d(tangent, **_POOL)


class StrideOneAvgPool2d(nn.Module):
    """Average pool 2x2 at stride 1, for the shortcut of a stage that is dilated instead of strided.

    At the pixels that the strided network would keep, the output equals that of its `AvgPool2d(2, 2)`, so pretrained
    weights stay valid. Taps beyond the lower and right border repeat the border, which equals leaving them out.

    Args:
        dilation: step between the two taps of an axis, in pixels.

    Shape:
        - input: (N, C, H, W)
        - output: (N, C, H, W)
    """

    def __init__(self, dilation: int = 1) -> None:
        super().__init__()
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        step = self.dilation
        x = F.pad(x, [0, step, 0, step], mode="replicate")
        x = (x[:, :, :-step] + x[:, :, step:]) / 2
        return (x[:, :, :, :-step] + x[:, :, :, step:]) / 2

    def extra_repr(self) -> str:
        return f"dilation={self.dilation}"

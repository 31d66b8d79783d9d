"""Recompute batch norm as an affine map of each channel, from the statistics of its forward."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_native_batch_norm, _leaky_relu_ = torch.native_batch_norm, F.leaky_relu_

_neutral: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}  # by number of channels


def make_normalization(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, slope: float | None = None
) -> Callable[[Tensor], Tensor]:
    """Return a function that recomputes batch norm and leaky ReLU; later edits of the weights do not affect it.

    On the CPU the result is bit-equal to batch norm's. On CUDA it is one kernel, at most one rounding from cuDNN's.

    Args:
        x: input of the norm, (N, C, H, W).
        mean: mean of each channel, (C,); must not be modified later.
        rstd: 1 / sqrt(var + eps) of each channel, (C,); must not be modified later.
        weight: (C,), or None for ones.
        bias: (C,), or None for zeros.
        slope: negative slope of the leaky ReLU; None for no activation.
    """
    if x.is_cuda:
        return functools.partial(_normalize_on_cuda, mean, rstd, _copy(weight), _copy(bias), slope)
    if weight is not None and bias is not None and mean.dtype == weight.dtype == torch.float32:
        scale, shift = rstd * weight.data, bias.data.clone()
    else:
        dtype = torch.promote_types(mean.dtype, torch.float32)
        scale = rstd.to(dtype) if weight is None else rstd.to(dtype) * weight.data.to(dtype)
        shift = torch.zeros_like(scale) if bias is None else bias.data.to(dtype, copy=True)
        if mean.dtype != dtype:  # in half precision, batch norm's kernel rounds once more
            shift -= mean.to(dtype) * scale
            mean = torch.zeros_like(scale)
    _, ones = _neutral_statistics(scale)  # var 1 and eps 0 make the kernel's weight the scale
    return functools.partial(_apply, scale, shift, mean, ones, 0.0, slope)


def make_inference_normalization(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: float | None = None,
) -> Callable[[Tensor], Tensor]:
    """Return a function as `make_normalization` does, for batch norm with running statistics.

    Takes var instead of rstd: the kernel's own 1 / sqrt(var + eps) differs in the last bit, so the same kernel is
    called again.
    """
    if x.is_cuda:
        return make_normalization(x, mean.clone(), 1 / (var + eps).sqrt(), weight, bias, slope)
    return functools.partial(_apply, _copy(weight), _copy(bias), mean.clone(), var.clone(), eps, slope)


def make_affine(mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return scale and shift, each (C,), with which x * scale + shift equals batch norm."""
    # In single precision or better, with one rounding in the product-sum, as in batch norm's CPU kernel.
    dtype = torch.promote_types(mean.dtype, torch.float32)
    mean, rstd = mean.to(dtype), rstd.to(dtype)
    scale = rstd.clone() if weight is None else rstd * weight.to(dtype)
    shift = torch.addcmul(torch.zeros_like(mean) if bias is None else bias.to(dtype), mean, scale, value=-1)
    return scale, shift


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return x * scale + shift for each channel, computed by batch norm's kernel, so with its rounding."""
    if not x.numel():  # the kernel refuses an empty input
        return x.clone()
    return _apply(scale, shift, *_neutral_statistics(scale), 0.0, None, x)


def _copy(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.data.clone()


def _apply(
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    slope: float | None,
    x: Tensor,
) -> Tensor:
    y = _native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]
    return y if slope is None else _leaky_relu_(y, slope)


def _neutral_statistics(scale: Tensor) -> tuple[Tensor, Tensor]:
    key = len(scale), scale.dtype, scale.device
    statistics = _neutral.get(key)
    if statistics is None:
        statistics = torch.zeros_like(scale), torch.ones_like(scale)
        if type(statistics[0]) is Tensor:  # a fake tensor must not outlive its mode
            _neutral[key] = statistics
    return statistics


def _normalize_on_cuda(
    mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, slope: float | None, x: Tensor
) -> Tensor:
    if not x.numel():  # the kernel refuses an empty input
        return x.clone()
    y = torch.batch_norm_elemt(x, weight, bias, mean, rstd, 0.0)  # rstd includes eps already
    return y if slope is None else F.leaky_relu_(y, slope)


def run_norm(
    count: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    use_batch: bool,
    momentum: float,
    eps: float,
    slope: float | None,
    x: Tensor,
) -> tuple[Tensor, Any, Callable[[Tensor], Tensor] | None]:
    """Run batch norm and, unless slope is None, leaky ReLU in place; increment count.

    Returns:
        The output, the norm's autograd node, and a function that recomputes the output from x. The function is None
        without a node, or if x is neither contiguous nor channels-last.
    """
    if count is not None:
        count.add_(1)
    if use_batch:
        check_values(x)
    # torch.batch_norm calls this function, but does not return its statistics.
    y, mean, rstd, _, _ = torch._batch_norm_impl_index(
        x, weight, bias, running_mean, running_var, use_batch, momentum, eps, x.is_cuda and torch.backends.cudnn.enabled
    )
    node = y.grad_fn
    if slope is not None:
        F.leaky_relu_(y, slope)
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    if node is None or not dense:  # for other layouts, the kernel sums in another order
        return y, node, None
    if use_batch:
        return y, node, make_normalization(x, mean, rstd, weight, bias, slope)
    return y, node, make_inference_normalization(x, running_mean, running_var, eps, weight, bias, slope)


def check_values(x: Tensor) -> None:
    """Refuse a batch with one value a channel, which has no variance, as `F.batch_norm` does."""
    if x.numel() == x.shape[1]:
        raise ValueError(f"Batch norm needs more than one value per channel when training, got {tuple(x.shape)}")

"""Batch norm over the batches of several processes; only its input is stored for backward."""

import functools
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import once_differentiable

from timm_tresnet.models.layers.norm_arithmetic import make_affine, scale_and_shift


@torch.no_grad()
def reduce_statistics(x: Tensor, process_group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mean and biased variance of each channel over all processes, whose batches may differ in size.

    Args:
        x: this process's batch, (N, C, H, W); N may be 0.
        process_group: the processes; None for all.

    Returns:
        Mean (C,) and variance (C,) in single precision or better, and the number of values a channel, (1,).
    """
    channels, count = x.shape[1], x.numel() // x.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    if count:
        var, mean = torch.var_mean(x.to(dtype), dim=(0, 2, 3), correction=0)
    else:  # an empty batch has neither
        var = mean = x.new_zeros(channels, dtype=dtype)
    own = torch.cat([mean, var, mean.new_tensor([count])])
    gathered = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(process_group))]
    torch.distributed.all_gather(gathered, own, process_group)
    means, variances, counts = torch.stack(gathered).split([channels, channels, 1], dim=1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + (means - mean).square())).sum(0) / total
    return mean, var, total


class SynchronizedNorm(torch.autograd.Function):
    """gamma * x_hat + beta with x_hat = (x - mean) / sqrt(var + eps), mean and var over all processes.

    Backward (arXiv:1502.03167, section 3) with sums over all processes, M values a channel:
    grad_x = gamma * rstd * (grad_y - sum(grad_y) / M - x_hat * sum(grad_y * x_hat) / M). gamma is weight, beta bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
        process_group: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.process_group = eps, process_group
        scale, shift = make_affine(mean, (var + eps).rsqrt(), weight, bias)
        ctx.recompute = functools.partial(scale_and_shift, scale=scale, shift=shift)  # recomputes the output
        return ctx.recompute(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        rstd = (var + ctx.eps).rsqrt()
        gamma = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        # In eval mode, with constant statistics, batch norm's kernel gives this process's sums and the first term.
        if x.numel():
            grad_x, sum_grad_x_hat, sum_grad = torch.ops.aten.native_batch_norm_backward(
                grad_y, x, gamma, mean, var, None, None, False, ctx.eps, [True, True, True]
            )
        else:  # the kernel refuses an empty input
            grad_x, sum_grad_x_hat, sum_grad = grad_y, torch.zeros_like(mean), torch.zeros_like(mean)
        sums = torch.stack([sum_grad_x_hat, sum_grad])
        torch.distributed.all_reduce(sums, group=ctx.process_group)
        slope, offset = -gamma * rstd / count * sums
        slope = slope * rstd
        grad_x = grad_x + scale_and_shift(x, slope, offset - slope * mean)
        if weight is None:
            return grad_x, None, None, None, None, None, None, None
        grad_weight, grad_bias = sum_grad_x_hat.to(weight.dtype), sum_grad.to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None

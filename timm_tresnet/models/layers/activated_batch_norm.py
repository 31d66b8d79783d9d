"""Batch norm and activation in one module, whose output is rebuilt from its input."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from timm_tresnet.models.layers.synchronized_norm import SynchronizedNorm, reduce_statistics
from timm_tresnet.recompute.affine import make_inference_normalization, make_normalization
from timm_tresnet.recompute.compiled import is_in_region
from timm_tresnet.recompute.rebuild import is_plain, open_tape, record_function


@register_notrace_module
class ActivatedBatchNorm2d(BatchNormAct2d):
    """timm's batch norm with activation, whose output need not be kept for backward.

    In training, `recompute.rebuild` keeps this layer's input and two numbers a channel. In-Place ABN keeps as much
    ("In-Place Activated BatchNorm", arXiv:1712.02616); this works for weights of any sign and for any activation.
    Everything that timm and PyTorch do to batch norms applies, since this is one.

    Args:
        num_features: number of channels.
        **kwargs: those of `timm.layers.BatchNormAct2d`.

    Shape:
        - input: (N, num_features, H, W)
        - output: (N, num_features, H, W)
    """

    def __init__(self, num_features: int, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        self.synchronized = False
        self.process_group: Any = None
        if hasattr(self.act, "inplace") and not isinstance(self.act, nn.LeakyReLU | nn.ReLU):
            self.act.inplace = False  # the others copy their input for backward if they overwrite it

    @torch.jit.ignore
    def synchronize(self, process_group: Any = None) -> None:
        """Compute batch statistics over all processes from now on, as `torch.nn.SyncBatchNorm` does.

        Unlike that, this works on every device, and its output is rebuilt in backward too.

        Args:
            process_group: the processes; None for all.
        """
        self.synchronized = True
        self.process_group = process_group

    def forward(self, x: Tensor) -> Tensor:
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            if self.num_batches_tracked is not None:
                self._count_batch()
                if self.momentum is None:  # cumulative average
                    momentum = 1.0 / float(self.num_batches_tracked)
        use_batch = self.training or (self.running_mean is None and self.running_var is None)
        known = not self.training or self.track_running_stats
        running_mean = self.running_mean if known else None
        running_var = self.running_var if known else None
        if not torch.jit.is_scripting():
            if self.synchronized and self.training and self._is_distributed():
                return self._forward_synchronized(x, running_mean, running_var, momentum)
            if self.training and is_in_region():
                return self._forward_in_region(x, running_mean, running_var, momentum)
            if open_tape() is not None:
                return self._forward_recorded(x, running_mean, running_var, use_batch, momentum)
        x = F.batch_norm(x, running_mean, running_var, self.weight, self.bias, use_batch, momentum, self.eps)
        return self.act(self.drop(x))

    def _count_batch(self) -> None:
        if not torch.jit.is_scripting():
            if is_in_region():  # where checkpoint has saved buffers, which then may change as data alone
                self.num_batches_tracked.data.copy_(self.num_batches_tracked + 1)
                return
        self.num_batches_tracked.add_(1)

    @torch.jit.unused
    def fits_region(self) -> bool:
        """Whether a region (`timm_tresnet.recompute.compiled`) can hold this norm, so that statistics count once."""
        affine = self.weight is not None and self.bias is not None
        return affine and self.momentum is not None and not self.synchronized

    @torch.jit.unused
    def _is_distributed(self) -> bool:
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return False
        return distributed.get_world_size(self.process_group) > 1

    @torch.jit.unused
    def _forward_synchronized(
        self, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
    ) -> Tensor:
        mean, var, count = reduce_statistics(x, self.process_group)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * count / (count - 1).clamp(min=1)).to(running_var.dtype), momentum)
        y = SynchronizedNorm.apply(x, self.weight, self.bias, mean, var, count, self.eps, self.process_group)
        record_function(x, y)
        return self.act(self.drop(y))

    @torch.jit.unused
    def _forward_recorded(
        self, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, use_batch: bool, momentum: float
    ) -> Tensor:
        tape = open_tape()
        if not _can_run_again(x, self.eps, self.weight, self.bias, running_mean, running_var):
            x = F.batch_norm(x, running_mean, running_var, self.weight, self.bias, use_batch, momentum, self.eps)
            return self.act(self.drop(x))
        # A slope that is a tensor may be edited until backward.
        number = type(self.act) is nn.LeakyReLU and type(self.act.negative_slope) is float
        fused = number and self.act.inplace and type(self.drop) is nn.Identity
        slope = self.act.negative_slope if fused else None
        statistics = (running_mean, running_var, use_batch, momentum, self.eps)
        y, norm, function = run_norm(x, self.weight, self.bias, *statistics, slope)
        if function is not None:
            tape.add_norm(tape.find(x), norm, y, function)
        return y if fused else self.act(self.drop(y))

    @torch.jit.unused
    def _forward_in_region(
        self, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
    ) -> Tensor:
        """In training, with operators that give statistics alone, for `timm_tresnet.recompute.compiled` to save."""
        _check_values(x)
        count = x.numel() // x.shape[1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.no_grad():
            var, mean = torch.var_mean(x.to(dtype), dim=(0, 2, 3), correction=0)
            for running, statistic in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
                if running is not None:
                    running.data.copy_(momentum * statistic + (1 - momentum) * running)
        y = _NormFromStatistics.apply(x, self.weight, self.bias, mean, (var + self.eps).rsqrt(), self.eps)
        y = self.drop(y)
        if type(self.act) is nn.LeakyReLU:
            return F.leaky_relu(y, self.act.negative_slope)
        return F.relu(y) if type(self.act) is nn.ReLU else self.act(y)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", synchronized" if self.synchronized else "")


def _can_run_again(x: Tensor, eps: float, *of_channels: Tensor | None) -> bool:
    """Whether batch norm is sure to do the same again: other classes may not, and other layouts round otherwise."""
    return (
        type(x) is Tensor
        and isinstance(eps, int | float)
        and eps > 0  # about which F.batch_norm has something to say
        and all(each is None or (is_plain(each) and each.is_contiguous()) for each in of_channels)
    )


def run_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_batch: bool,
    momentum: float,
    eps: float,
    slope: float | None,
) -> tuple[Tensor, Any, Callable[[Tensor], Tensor] | None]:
    """Batch norm, and leaky ReLU in place unless slope is None.

    Returns:
        The output, the norm's autograd node, and what makes the output of x again; None if nobody is going to ask.
    """
    if use_batch:
        _check_values(x)
    # What torch.batch_norm calls, for the statistics that torch.batch_norm does not return.
    y, mean, rstd, _, _ = torch._batch_norm_impl_index(
        x, weight, bias, running_mean, running_var, use_batch, momentum, eps, torch.backends.cudnn.enabled
    )
    node = y.grad_fn
    if slope is not None:
        F.leaky_relu_(y, slope)
    if node is None or not x.numel():
        return y, node, None
    if use_batch:
        return y, node, make_normalization(x, mean, rstd, weight, bias, slope)
    return y, node, make_inference_normalization(x, running_mean, running_var, eps, weight, bias, slope)


def _check_values(x: Tensor) -> None:
    if x.numel() == x.shape[1]:
        raise ValueError(f"Batch norm needs more than one value per channel when training, got {tuple(x.shape)}")


class _NormFromStatistics(torch.autograd.Function):
    """Batch norm with statistics of the batch that are known, as the compiler computes it from its operators."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps = eps
        mean, rstd, weight, bias = (each[:, None, None] for each in (mean, rstd, weight, bias))
        y = (x - mean) * rstd * weight + bias
        # Not always y.to(x.dtype): where that changes nothing, the gradients of PyTorch 2.11's compiler are zero.
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad_y, x, weight.to(mean.dtype), None, None, mean, rstd, True, ctx.eps, [True, True, True]
        )
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None, None

"""Batch norm with activation in one module; backward recomputes its output from its input."""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.models import register_notrace_module
from torch import Tensor, nn

from timm_tresnet.models.layers.norm_arithmetic import check_values, run_norm
from timm_tresnet.models.layers.readers import read_activation
from timm_tresnet.models.layers.synchronized_norm import SynchronizedNorm, reduce_statistics
from timm_tresnet.recompute.compiled import is_in_region
from timm_tresnet.recompute.eligibility import is_plain, is_untouched
from timm_tresnet.recompute.program import call, reads
from timm_tresnet.recompute.run import Operation, Result, Run
from timm_tresnet.recompute.saved import Recomputed, Source, discard


@register_notrace_module
class ActivatedBatchNorm2d(BatchNormAct2d):
    """timm's batch norm with activation; its output need not be stored for backward.

    In a block, backward recomputes the output from this layer's input and a few numbers for each channel. In-Place ABN
    stores as much ("In-Place Activated BatchNorm", arXiv:1712.02616), but needs positive weights and an invertible
    activation. As a subclass of batch norm, this layer works with everything that timm and PyTorch do to batch norms.

    Args:
        num_features: number of channels, C.
        **kwargs: arguments of `timm.layers.BatchNormAct2d`.

    Shape:
        - input: (N, C, H, W)
        - output: (N, C, H, W)
    """

    def __init__(self, num_features: int, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        self.synchronized = False
        self.process_group: Any = None
        act: Any = self.act
        if hasattr(act, "inplace") and not isinstance(act, nn.LeakyReLU | nn.ReLU):
            act.inplace = False  # in place, other activations would copy their input for backward

    @torch.jit.ignore
    def synchronize(self, process_group: Any = None) -> None:
        """Compute batch statistics over all processes from now on, as `torch.nn.SyncBatchNorm` does.

        Unlike `SyncBatchNorm`, this works on every device, and its output is recomputed too.

        Args:
            process_group: the processes; None for all.
        """
        self.synchronized = True
        self.process_group = process_group

    def forward(self, x: Tensor) -> Tensor:
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            if self.num_batches_tracked is not None:
                _count_batch(self.num_batches_tracked)
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
        x = F.batch_norm(x, running_mean, running_var, self.weight, self.bias, use_batch, momentum, self.eps)
        return self.act(self.drop(x))

    @torch.jit.unused
    def fits_region(self) -> bool:
        """Whether this norm may be in a region (`timm_tresnet.recompute.compiled`), where statistics count once."""
        affine = self.weight is not None and self.bias is not None
        return affine and self.momentum is not None and not self.synchronized and type(self.drop) is nn.Identity

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
        return self.act(self.drop(self._normalize_synchronized(x, running_mean, running_var, momentum)))

    @torch.jit.unused
    def _normalize_synchronized(
        self, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
    ) -> Tensor:
        mean, var, count = reduce_statistics(x, self.process_group)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * count / (count - 1).clamp(min=1)).to(running_var.dtype), momentum)
        return SynchronizedNorm.apply(x, self.weight, self.bias, mean, var, count, self.eps, self.process_group)

    @torch.jit.unused
    def _forward_in_region(
        self, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
    ) -> Tensor:
        """Forward with separate operators for the statistics, which `timm_tresnet.recompute.compiled` saves."""
        check_values(x)
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


def _count_batch(count: Tensor) -> None:
    if not torch.jit.is_scripting():
        if is_in_region():  # checkpoint has saved the buffers; only their data may change
            count.data.copy_(count + 1)
            return
    count.add_(1)


@dataclass(slots=True, eq=False)
class Norm(Operation):
    """Batch norm and the activation after it.

    Args:
        module: the layer.
        normalize: returns the output, the norm's autograd node, and a function that recomputes the output from the
            input; the function is None without a node.
        act: the activation; None if there is none, or normalize includes it.
    """

    normalize: Callable[[Tensor], tuple[Tensor, Any, Callable[[Tensor], Tensor] | None]]
    act: Operation | None

    def run(self, x: Tensor, source: Source, run: Run) -> Result:
        y, node, recompute = self.normalize(x)
        made = None
        if source is not None and recompute is not None:
            if type(source) is Recomputed:
                custom = isinstance(node, torch.autograd.function.BackwardCFunction)
                discard(node._raw_saved_tensors[0] if custom else node._raw_saved_input, source.pack)
            made = Recomputed(recompute, (source,), y._version, is_result=node is not y.grad_fn)
        return (y, made) if self.act is None else self.act.run(y, made, run)


_get_fields = operator.itemgetter(
    *("_modules", "_parameters", "_buffers", "training", "track_running_stats", "momentum", "eps", "synchronized")
)


@reads(ActivatedBatchNorm2d)
def _read(norm: ActivatedBatchNorm2d) -> list[Operation]:
    """Read batch norm and activation; leaky ReLU becomes part of the norm, and an unusual norm is called as a whole."""
    children, parameters, buffers, training, tracks, momentum, eps, synchronized = _get_fields(norm.__dict__)
    weight, bias = parameters.get("weight"), parameters.get("bias")
    mean, var, count = buffers.get("running_mean"), buffers.get("running_var"), buffers.get("num_batches_tracked")
    act, drop = children.get("act"), children.get("drop")
    usual = (
        type(mean) is type(var) is type(count) is Tensor
        and (not training or (tracks and type(momentum) in (float, int)))
        and isinstance(eps, int | float)
        and eps > 0  # F.batch_norm raises an error otherwise
        and mean.is_contiguous()  # other layouts round differently
        and var.is_contiguous()
        and (weight is None or (is_plain(weight) and weight.is_contiguous()))
        and (bias is None or (is_plain(bias) and bias.is_contiguous()))
        and type(drop) is nn.Identity
        and is_untouched(drop)
    )
    if not usual:
        return [call(norm, is_saved=type(act) is not nn.Identity, is_repeatable=True)]
    if synchronized and training and norm._is_distributed():
        return [Norm(norm, functools.partial(_run_synchronized, norm), read_activation(act))]
    fused = type(act) is nn.LeakyReLU and act.inplace and type(act.negative_slope) is float and is_untouched(act)
    slope, behind = (act.negative_slope, None) if fused else (None, read_activation(act))
    momentum, count = (momentum, count) if training else (0.0, None)
    return [
        Norm(norm, functools.partial(run_norm, count, weight, bias, mean, var, training, momentum, eps, slope), behind)
    ]


def _run_synchronized(norm: ActivatedBatchNorm2d, x: Tensor) -> tuple[Tensor, Any, Callable[[Tensor], Tensor] | None]:
    momentum: Any = norm.momentum
    count: Any = norm.num_batches_tracked
    _count_batch(count)
    y = norm._normalize_synchronized(x, norm.running_mean, norm.running_var, momentum)
    return y, y.grad_fn, getattr(y.grad_fn, "recompute", None)


class _NormFromStatistics(torch.autograd.Function):
    """Batch norm with given batch statistics, as a composition of operators for the compiler.

    y = (x - mean) * rstd * weight + bias; mean and rstd are (C,). Backward is batch norm's own (arXiv:1502.03167,
    section 3), in which mean and rstd depend on x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps = eps
        mean, rstd, weight, bias = (each[:, None, None] for each in (mean, rstd, weight, bias))
        y = (x - mean) * rstd * weight + bias
        # Without the condition, a y.to() that changes nothing gives zero gradients in PyTorch 2.11's compiler.
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad_y, x, weight.to(mean.dtype), None, None, mean, rstd, True, ctx.eps, [True, True, True]
        )
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None, None

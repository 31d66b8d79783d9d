"""Batch norm and activation in one module, which says how its output is rebuilt from its input."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.models import register_notrace_module
from torch import Tensor, nn

from timm_tresnet import rebuild
from timm_tresnet.layers.synchronized_norm import SynchronizedNorm, make_affine, reduce_statistics, scale_and_shift

_Normalized = tuple[Tensor, Callable[..., Tensor], tuple[Tensor, ...]]


@register_notrace_module
class ActivatedBatchNorm2d(BatchNormAct2d):
    """timm's batch norm with activation, whose output need not be kept for backward.

    In training, `timm_tresnet.rebuild` keeps this layer's input and two numbers a channel. In-Place ABN keeps as much
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
                self.num_batches_tracked.add_(1)
                if self.momentum is None:  # cumulative average
                    momentum = 1.0 / float(self.num_batches_tracked)
        use_batch = self.training or (self.running_mean is None and self.running_var is None)
        known = not self.training or self.track_running_stats
        running_mean = self.running_mean if known else None
        running_var = self.running_var if known else None
        if not torch.jit.is_scripting():
            synchronized = self.training and self._is_distributed()
            if synchronized or rebuild.current() is not None:
                run = self._normalize_synchronized if synchronized else self._normalize
                return self._activate_recorded(x, *run(x, running_mean, running_var, use_batch, momentum))
        x = F.batch_norm(x, running_mean, running_var, self.weight, self.bias, use_batch, momentum, self.eps)
        return self.act(self.drop(x))

    @torch.jit.unused
    def _is_distributed(self) -> bool:
        return self.synchronized and _has_process_group() and torch.distributed.get_world_size(self.process_group) > 1

    @torch.jit.unused
    def _normalize(
        self, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, use_batch: bool, momentum: float
    ) -> _Normalized:
        """Output of batch norm, and the function and values that make it from x."""
        if use_batch and x.numel() == x.shape[1]:
            raise ValueError(f"Batch norm needs more than one value per channel when training, got {tuple(x.shape)}")
        # What torch.batch_norm calls, for the statistics that torch.batch_norm does not return.
        y, mean, rstd, *_ = torch._batch_norm_impl_index(
            x,
            self.weight,
            self.bias,
            running_mean,
            running_var,
            use_batch,
            momentum,
            self.eps,
            torch.backends.cudnn.enabled,
        )
        with torch.no_grad():
            if not use_batch:
                mean, rstd = running_mean, 1 / (running_var + self.eps).sqrt()
            if x.is_cuda:
                affine = () if self.weight is None else (self.weight, self.bias)
                if _has_process_group():
                    affine = tuple(each.clone() for each in affine)  # sharded training frees them after the forward
                return y, _normalize_on_cuda, (mean, rstd, *affine)
            return y, scale_and_shift, make_affine(mean, rstd, self.weight, self.bias)

    @torch.jit.unused
    def _normalize_synchronized(
        self, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, use_batch: bool, momentum: float
    ) -> _Normalized:
        mean, var, count = reduce_statistics(x, self.process_group)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * count / (count - 1).clamp(min=1)).to(running_var.dtype), momentum)
        y = SynchronizedNorm.apply(x, self.weight, self.bias, mean, var, count, self.eps, self.process_group)
        with torch.no_grad():
            return y, scale_and_shift, make_affine(mean, (var + self.eps).rsqrt(), self.weight, self.bias)

    @torch.jit.unused
    def _activate_recorded(
        self, x: Tensor, y: Tensor, normalize: Callable[..., Tensor], values: tuple[Tensor, ...]
    ) -> Tensor:
        rebuildable = isinstance(self.drop, nn.Identity) and rebuild.is_plain(self.drop) and rebuild.is_plain(self.act)
        if rebuildable and isinstance(self.act, nn.LeakyReLU | nn.ReLU) and self.act.inplace:
            # These keep their output for backward, so its recipe has to be there before they run.
            rebuild.record(y, lambda *inputs: self.act(normalize(*inputs)), x, *values, edits=1)
            return self.act(y)
        rebuild.record(y, normalize, x, *values)
        activated = self.act(self.drop(y))
        if rebuildable and not isinstance(self.act, nn.RReLU | nn.PReLU):
            rebuild.record(activated, self.act, y)  # not if random or trained
        return activated

    def extra_repr(self) -> str:
        return super().extra_repr() + (", synchronized" if self.synchronized else "")


def _normalize_on_cuda(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Batch norm with known statistics, in one kernel; at most one rounding from cuDNN's."""
    if not x.numel():  # which the kernel cannot take
        return x.clone()
    return torch.batch_norm_elemt(x, weight, bias, mean, rstd, 0.0)  # the last one is in rstd already


def _has_process_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()

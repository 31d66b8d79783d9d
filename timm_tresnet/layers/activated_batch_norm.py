"""Batch norm and activation in one module, which says how its output is rebuilt from its input."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.models import register_notrace_module
from torch import Tensor, nn

from timm_tresnet import rebuild


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
        if hasattr(self.act, "inplace") and not isinstance(self.act, nn.LeakyReLU | nn.ReLU):
            self.act.inplace = False  # the others copy their input for backward if they overwrite it

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
            if rebuild.current() is not None:
                return self._forward_recorded(x, running_mean, running_var, use_batch, momentum)
        x = F.batch_norm(x, running_mean, running_var, self.weight, self.bias, use_batch, momentum, self.eps)
        return self.act(self.drop(x))

    @torch.jit.unused
    def _forward_recorded(
        self, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, use_batch: bool, momentum: float
    ) -> Tensor:
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
            # Single precision or better, and one rounding in the product-sum, as in batch norm's kernel on the CPU.
            mean, rstd, weight, bias = (
                None if tensor is None else tensor.to(torch.promote_types(tensor.dtype, torch.float32))
                for tensor in (mean, rstd, self.weight, self.bias)
            )
            scale = rstd.clone() if weight is None else rstd * weight
            shift = torch.addcmul(torch.zeros_like(mean) if bias is None else bias, mean, scale, value=-1)
        if isinstance(self.act, nn.LeakyReLU | nn.ReLU) and self.act.inplace and isinstance(self.drop, nn.Identity):
            # These keep their output for backward, so its recipe has to be there before they run.
            rebuild.record(y, self._rebuild_activated, x, scale, shift, edits=1)
            return self.act(y)
        rebuild.record(y, scale_and_shift, x, scale, shift)
        activated = self.act(self.drop(y))
        if isinstance(self.drop, nn.Identity) and not isinstance(self.act, nn.RReLU | nn.PReLU):
            rebuild.record(activated, self.act, y)  # not if random or trained
        return activated

    def _rebuild_activated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.act(scale_and_shift(x, scale, shift))


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Affine map of each channel, x * scale + shift, by batch norm's own kernel and so in its arithmetic."""
    mean, var = torch.zeros_like(scale), torch.ones_like(scale)
    return torch.native_batch_norm(x, scale, shift, mean, var, False, 0.0, 0.0)[0]

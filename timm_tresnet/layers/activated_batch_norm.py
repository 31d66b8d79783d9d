"""Batch norm and activation in one module, which says how its output is rebuilt from its input."""

from typing import Any

import torch
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

    _forward_plain = BatchNormAct2d.forward

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and rebuild.current() is not None:
            return self._forward_recorded(x)
        return self._forward_plain(x)

    @torch.jit.unused
    def _forward_recorded(self, x: Tensor) -> Tensor:
        """Does what `timm.layers.BatchNormAct2d` does, and records how."""
        use_batch = self.training or self.running_mean is None
        if use_batch and x.numel() == x.shape[1]:
            raise ValueError(f"Batch norm needs more than one value per channel when training, got {tuple(x.shape)}")
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        update = not self.training or self.track_running_stats
        running_mean, running_var = (self.running_mean, self.running_var) if update else (None, None)
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
            scale = rstd if self.weight is None else rstd * self.weight
            shift = torch.zeros_like(mean) if self.bias is None else self.bias
            shift = torch.addcmul(shift, mean, scale, value=-1)  # one rounding, as in the kernel on the CPU
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

"""Stochastic depth that the compiler can rebuild around."""

import timm.layers
import torch
from torch import Tensor

from timm_tresnet.recompute.compiled import is_in_region


class DropPath(timm.layers.DropPath):
    """timm's stochastic depth (arXiv:1603.09382), which draws what that draws, but in a region not in place.

    Args:
        drop_prob: probability of dropping an image in training.
        scale_by_keep: whether the others are divided by 1 - drop_prob.

    Shape:
        - input: (N, ...)
        - output: (N, ...)
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if self.training and self.drop_prob > 0 and is_in_region():
                return self._forward_in_region(x)
        return timm.layers.drop_path(x, self.drop_prob, self.training, self.scale_by_keep)

    @torch.jit.unused
    def _forward_in_region(self, x: Tensor) -> Tensor:
        keep = 1 - self.drop_prob
        mask = torch.bernoulli(x.new_empty(x.shape[0], *[1] * (x.ndim - 1)), keep)
        return x * (mask / keep if keep > 0 and self.scale_by_keep else mask)

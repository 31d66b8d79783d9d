"""Stochastic depth whose output need not be kept for backward."""

import timm.layers
import torch
from timm.layers import drop_path
from torch import Tensor

from timm_tresnet import rebuild


class DropPath(timm.layers.DropPath):
    """timm's stochastic depth ("Deep Networks with Stochastic Depth", arXiv:1603.09382), with the same random numbers.

    In training, each image is dropped with a probability, and the others are scaled up.

    Shape:
        - input: (N, C, H, W)
        - output: (N, C, H, W)
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        scale = drop_path(x.new_ones(x.shape[0], 1, 1, 1), self.drop_prob, True, self.scale_by_keep)
        y = x * scale
        if not torch.jit.is_scripting():
            rebuild.record(y, torch.mul, x, scale)
        return y

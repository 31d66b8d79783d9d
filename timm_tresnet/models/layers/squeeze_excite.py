"""Squeeze-and-excitation, in the shape that TResNet uses it."""

import timm.layers
import torch
from torch import Tensor, nn

from timm_tresnet.models.layers.relu import ReLU


class SqueezeExcite(timm.layers.SEModule):
    """timm's squeeze-and-excitation: scale every channel by a gate computed from its mean (arXiv:1709.01507).

    TResNet places it where it costs least and leaves it out of the last stage ("Optimized SE Layers",
    arXiv:2003.13630).

    Args:
        channels: number of input and output channels, C.
        reduced_channels: number of channels between the two 1x1 convolutions.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - input: (N, C, H, W)
        - output: (N, C, H, W)
    """

    def __init__(
        self,
        channels: int,
        reduced_channels: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, rd_channels=reduced_channels, device=device, dtype=dtype)
        self.act = ReLU()
        self.gate = nn.Sigmoid()  # PyTorch's own class, which tools know

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        gate = self.gate(self.fc2(self.act(self.bn(self.fc1(gate)))))
        return x * gate

"""Squeeze-and-excitation, in the shape that TResNet uses it."""

import torch
from torch import Tensor, nn

from timm_tresnet.models.layers.relu import ReLU


class SqueezeExcite(nn.Module):
    """Scale every channel by a gate computed from the channel means (arXiv:1709.01507).

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
        super().__init__()
        self.fc1 = nn.Conv2d(channels, reduced_channels, kernel_size=1, device=device, dtype=dtype)
        self.act = ReLU()
        self.fc2 = nn.Conv2d(reduced_channels, channels, kernel_size=1, device=device, dtype=dtype)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        gate = self.gate(self.fc2(self.act(self.fc1(gate))))
        return x * gate

"""ReLU that works in place where that is safe."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_tresnet.recompute.compiled import is_in_region


class ReLU(nn.ReLU):
    """ReLU in place, but not where the compiler may run it again.

    Shape:
        - input: any
        - output: the input's
    """

    def __init__(self) -> None:
        super().__init__(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if is_in_region():
                return F.relu(x)
        return F.relu(x, inplace=self.inplace)

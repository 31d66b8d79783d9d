"""SpaceToDepth, the first step of TResNet's stem."""

import torch
import torch.fx
from torch import Tensor

from timm_tresnet.models.layers.regions import RunsInRegion
from timm_tresnet.recompute.program import call, reads
from timm_tresnet.recompute.run import Operation


@torch.fx.wrap
def space_to_depth(x: Tensor, block_size: int, min_size: int) -> Tensor:
    """Function of SpaceToDepth; a leaf for torch.fx, which cannot trace the check of the size."""
    batch, channels, height, width = x.shape[0], x.shape[1], x.shape[2], x.shape[3]
    if not torch.jit.is_tracing():  # tracing would freeze the comparison and warn about it
        if height % block_size or width % block_size or height < min_size or width < min_size:
            raise ValueError(
                f"SpaceToDepth needs H and W in multiples of {block_size}, at least {min_size}, got {height}x{width}; "
                "resize or pad the images"
            )
    rows, columns = height // block_size, width // block_size
    x = x.reshape(batch, channels, rows, block_size, columns, block_size)
    x = x.permute(0, 3, 5, 1, 2, 4)  # (N, row in patch, column in patch, C, rows, columns)
    return x.reshape(batch, block_size * block_size * channels, rows, columns)


class SpaceToDepth(RunsInRegion):
    """Move every block_size x block_size patch of pixels into the channels.

    TResNet's stem ("SpaceToDepth Stem", arXiv:2003.13630). Output channels run over (row in patch, column in patch,
    input channel), input channel fastest; the published stem weights depend on that order.

    Args:
        block_size: side of a patch, in pixels.
        min_size: smallest H and W that the following layers accept, in pixels.

    Shape:
        - input: (N, C, H, W), H and W multiples of block_size and at least min_size
        - output: (N, C * block_size**2, H / block_size, W / block_size)

    Raises:
        ValueError: if H or W is not a multiple of block_size or is smaller than min_size.
    """

    def __init__(self, block_size: int = 4, min_size: int = 1) -> None:
        super().__init__()
        self.block_size = block_size
        self.min_size = min_size

    @property
    def bs(self) -> int:
        """block_size, under timm's name."""
        return self.block_size

    def forward(self, x: Tensor) -> Tensor:
        return space_to_depth(x, self.block_size, self.min_size)

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}, min_size={self.min_size}"


@reads(SpaceToDepth)
def _read(module: SpaceToDepth) -> list[Operation]:
    return [call(module)]

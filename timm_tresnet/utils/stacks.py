"""Images of one shape or of several, each as one tensor."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixed:
    """Images of several shapes, one behind the other: a process hands over one tensor, however many images there are.

    Args:
        values: of all images.
        shapes: (C, H, W) of each.
    """

    values: Tensor
    shapes: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.shapes)

    def split(self) -> list[Tensor]:
        """The images."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        return [part.view(shape) for part, shape in zip(self.values.split(sizes), self.shapes, strict=True)]


def stack(images: Sequence[Tensor]) -> Tensor | Mixed:
    """Put images together: (N, C, H, W) if they have one shape."""
    shapes = tuple(tuple(image.shape) for image in images)
    if len(set(shapes)) == 1:
        return torch.stack(list(images))
    return Mixed(torch.cat([image.flatten() for image in images]), shapes)

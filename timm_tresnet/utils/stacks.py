"""Batches of images whose shapes may differ."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixed:
    """Images of different shapes in one flat tensor, which is fast to send to another process.

    Args:
        values: the values of all images, flattened and concatenated.
        shapes: (C, H, W) of each image.
    """

    values: Tensor
    shapes: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.shapes)

    def split(self) -> list[Tensor]:
        """Return the images."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        return [part.view(shape) for part, shape in zip(self.values.split(sizes), self.shapes, strict=True)]


def stack(images: Sequence[Tensor]) -> Tensor | Mixed:
    """Stack images to (N, C, H, W) if they have the same shape, else to a `Mixed`."""
    shapes = tuple(tuple(image.shape) for image in images)
    if len(set(shapes)) == 1:
        return torch.stack(list(images))
    return Mixed(torch.cat([image.flatten() for image in images]), shapes)

"""Image files in batches, read ahead by other processes."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.data
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from timm_tresnet.utils.images import read_image

_REDUCED = 2  # times what the network wants, at least, of JPEG files that are decoded smaller; as Pillow's thumbnails


@dataclass(frozen=True)
class File:
    """A file of a batch.

    Args:
        path: where it is.
        wanted: whether its result is; else it is there to make the batch what it was when the others were classified.
        error: why it cannot be read; None if it can.
    """

    path: Path
    wanted: bool
    error: str | None = None


@dataclass(frozen=True)
class Batch:
    """Files and, (N, in_chans, H, W) in 8 bits, the pixels of those that can be read; None if there are none."""

    files: list[File]
    pixels: Tensor | None


def plan_batches(
    paths: Iterable[Path],
    size: int,
    is_done: Callable[[Path], bool] = lambda path: False,
    process: int = 0,
    processes: int = 1,
) -> Iterator[list[File]]:
    """Batches of files, of those of a process among several, without what is done.

    Files are together in a batch whatever is done and however many processes there are, since a network's outputs can
    depend on the batch in their last digits. So a batch of which only some files are done is read as a whole.
    """
    paths = iter(paths)
    for number in itertools.count():
        batch = [File(path, not is_done(path)) for path in itertools.islice(paths, size)]
        if not batch:
            return
        if number % processes == process and any(file.wanted for file in batch):
            yield batch


class ImageFiles(Dataset):
    """Pixels of files, prepared for a network but for their normalisation.

    Args:
        config: of timm's transform, `timm_tresnet.weights.preprocessing.resolve_preprocessing`.
        as_stored: read images as timm's scripts do.
        fast_jpeg: decode JPEG files smaller where they have more than twice the pixels that the network wants.
    """

    def __init__(self, config: dict[str, Any], as_stored: bool = False, fast_jpeg: bool = False) -> None:
        self._transform = timm.data.create_transform(**config, normalize=False)
        self._as_stored, self._in_chans = as_stored, config["input_size"][0]
        resized = max(config["input_size"][1:]) / (config["crop_pct"] or 1)
        self._least_side = math.ceil(_REDUCED * resized) if fast_jpeg else None

    def __getitem__(self, file: File) -> tuple[File, Tensor | None]:
        try:
            image = read_image(file.path, self._as_stored, in_chans=self._in_chans, least_side=self._least_side)
            return file, self._transform(image)
        except ValueError as error:
            return File(file.path, file.wanted, str(error)), None


def read_batches(images: ImageFiles, plan: Iterable[list[File]], workers: int) -> DataLoader:
    """Batches of a plan, in its order.

    Args:
        images: reads a file.
        plan: the batches; is asked for one when a worker is free.
        workers: processes that read; 0 for none but this one.
    """
    return DataLoader(images, batch_sampler=plan, num_workers=workers, collate_fn=_collate)


def _collate(items: list[tuple[File, Tensor | None]]) -> Batch:
    pixels = [pixels for _, pixels in items if pixels is not None]
    return Batch([file for file, _ in items], torch.stack(pixels) if pixels else None)

"""Read image files in batches, ahead of the network, in worker processes."""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from timm_tresnet.utils.images import read_image
from timm_tresnet.utils.stacks import Mixed, stack
from timm_tresnet.weights.aspect_ratio import make_transform

_REDUCED = 2  # a reduced JPEG has at least this many times the network's side; Pillow's thumbnail() does the same


@dataclass(frozen=True)
class File:
    """A file of a batch.

    Args:
        path: the file.
        wanted: whether its result is needed. A file that is not wanted only keeps the batch the same as in the run that
            is resumed.
        error: why the file cannot be read; None if it can.
    """

    path: Path
    wanted: bool
    error: str | None = None


@dataclass(frozen=True)
class Batch:
    """A batch of files.

    Args:
        files: all files of the batch.
        pixels: of the N readable files, (N, in_chans, H, W) if they have one shape, uint8; None if no file is readable.
    """

    files: list[File]
    pixels: Tensor | Mixed | None


def plan_batches(
    paths: Iterable[Path],
    size: int,
    is_done: Callable[[Path], bool] = lambda path: False,
    process: int = 0,
    processes: int = 1,
) -> Iterator[list[File]]:
    """Yield this process's batches of files, without batches that are done.

    The last digits of a network's outputs can depend on the batch. So the same files are in a batch whatever is done
    and however many processes there are, and a batch that is partly done is read in full.

    Args:
        paths: all files.
        size: files in a batch.
        is_done: whether a file already has its result; called once for each file.
        process: number of this process, from 0.
        processes: number of processes; batches are dealt out in turn.
    """
    paths = iter(paths)
    for number in itertools.count():
        batch = [File(path, not is_done(path)) for path in itertools.islice(paths, size)]
        if not batch:
            return
        if number % processes == process and any(file.wanted for file in batch):
            yield batch


class ImageFiles(Dataset):
    """Pixels of image files, resized and cropped for a network but not normalised.

    Args:
        config: data config of timm, from `timm_tresnet.weights.preprocessing.resolve_preprocessing`.
        as_stored: read images as timm's scripts do, see `timm_tresnet.utils.images.read_image`.
        fast_jpeg: decode JPEG files at reduced size where a side is more than twice what the network needs.
        multiple: keep the aspect ratio, see `timm_tresnet.weights.aspect_ratio.make_transform`.
    """

    def __init__(
        self, config: dict[str, Any], as_stored: bool = False, fast_jpeg: bool = False, multiple: int | None = None
    ) -> None:
        self._transform = make_transform(config, multiple, normalize=False)
        self._as_stored, self._in_chans = as_stored, config["input_size"][0]
        resized = max(config["input_size"][1:]) / (config["crop_pct"] or 1)
        self._least_side = math.ceil(_REDUCED * resized) if fast_jpeg else None

    def __getitem__(self, path: str) -> Tensor | str:
        """Return the pixels of a file, or the reason why it cannot be read."""
        try:
            image = read_image(path, self._as_stored, in_chans=self._in_chans, least_side=self._least_side)
            return self._transform(image)
        except ValueError as error:
            return str(error)


def read_batches(images: ImageFiles, plan: Iterable[list[File]], workers: int) -> Iterator[Batch]:
    """Read the batches of a plan, in order.

    Args:
        images: reads and transforms a file.
        plan: the batches; consumed as workers become free.
        workers: processes that read files; 0 to read in this process.
    """
    handed_out: deque[list[File]] = deque()  # kept here, since sending them to a worker and back takes time
    loader = DataLoader(images, batch_sampler=_hand_out(plan, handed_out), num_workers=workers, collate_fn=_collate)
    for errors, pixels in loader:
        files = handed_out.popleft()
        if any(error is not None for error in errors):
            files = [replace(file, error=error) for file, error in zip(files, errors, strict=True)]
        yield Batch(files, pixels)


def _hand_out(plan: Iterable[list[File]], handed_out: deque[list[File]]) -> Iterator[list[str]]:
    """Yield the file names of each batch, for the workers."""
    for files in plan:
        handed_out.append(files)
        yield [str(file.path) for file in files]


def _collate(items: list[Tensor | str]) -> tuple[list[str | None], Tensor | Mixed | None]:
    """Return for each file the reason why it cannot be read, or None, and the pixels of the readable files."""
    pixels = [item for item in items if not isinstance(item, str)]
    return [item if isinstance(item, str) else None for item in items], stack(pixels) if pixels else None

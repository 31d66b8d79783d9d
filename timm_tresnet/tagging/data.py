"""Batches of labelled images, identical in every run with the same seed."""

import contextlib
import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from timm_tresnet.tagging.annotations import Example
from timm_tresnet.tagging.scores import UNKNOWN
from timm_tresnet.utils.images import read_image
from timm_tresnet.utils.stacks import stack


class LabelledImages(Dataset):
    """Images with a target for each label: 1 if present, 0 if absent, -1 if unknown.

    Random transforms depend only on the seed, the epoch and the image, not on the process, the worker or earlier draws.
    So a resumed run sees the same inputs as an uninterrupted one.

    Args:
        examples: the images.
        names: the labels, in the order of the network's outputs.
        transform: from `PIL.Image.Image` to a tensor (in_chans, H, W) of fixed size.
        image_size: side of that tensor, or height and width; an unreadable image is replaced by zeros of this size.
        seed: seed of random transforms.
        as_stored: read images as timm's scripts do, see `timm_tresnet.utils.images.read_image`.
        in_chans: channels of the tensor.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        names: Sequence[str],
        transform: Callable[[Any], Tensor],
        image_size: int | tuple[int, int],
        seed: int = 0,
        as_stored: bool = False,
        in_chans: int = 3,
    ) -> None:
        positions = {name: position for position, name in enumerate(names)}
        self.paths = [example.path for example in examples]
        self._labels = [[positions[label] for label in example.labels] for example in examples]
        self._absent = [
            None if example.absent is None else [positions[label] for label in example.absent] for example in examples
        ]
        self._num_labels = len(names)
        self._transform = transform
        self._stand_in_shape = (in_chans, *(2 * [image_size] if isinstance(image_size, int) else image_size))
        self._seed = seed
        self._read = functools.partial(read_image, as_stored=as_stored, in_chans=in_chans)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Return "image", "target", "index" and "readable" for (epoch, index); an unreadable image is all zeros."""
        epoch, index = key
        with _seeded(mix_seed(self._seed, epoch, index)):
            try:
                image, readable = self._transform(self._read(self.paths[index])), True
            except ValueError:  # one bad file must not end a run of days; the number is reported
                image, readable = torch.zeros(self._stand_in_shape), False
        return {"image": image, "target": self.make_target(index), "index": index, "readable": readable}

    def make_target(self, index: int) -> Tensor:
        """Return the target of an image, (labels,): 1, 0 or -1."""
        absent = self._absent[index]
        target = torch.full((self._num_labels,), 0.0 if absent is None else float(UNKNOWN))
        target[absent or []] = 0
        target[self._labels[index]] = 1
        return target

    def fingerprint(self) -> str:
        """Return a hash of the files' names and their known labels."""
        parts = zip(self.paths, self._labels, self._absent, strict=True)
        content = json.dumps(
            [[str(path), labels] if absent is None else [str(path), labels, absent] for path, labels, absent in parts]
        )
        return hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()

    def count_labels(self) -> Tensor:
        """Return how many images have each label, (labels,)."""
        return self._count(self._labels)

    def count_absent(self) -> Tensor:
        """Return how many images are known to lack each label, (labels,)."""
        complete = [labels for labels, absent in zip(self._labels, self._absent, strict=True) if absent is None]
        lacking = len(complete) - self._count(complete)
        return lacking + self._count([absent for absent in self._absent if absent is not None])

    def _count(self, positions: Sequence[Sequence[int]]) -> Tensor:
        flat = torch.tensor([position for part in positions for position in part], dtype=torch.long)
        return flat.bincount(minlength=self._num_labels)


class EpochSampler(DistributedSampler):
    """Samples one process's share of a data set, as pairs (epoch, index)."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in super().__iter__())


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch, Python and NumPy, which timm's transforms draw from; restore their states afterwards."""
    python, numbers = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numbers)


def mix_seed(*parts: int) -> int:
    """Mix several numbers into one seed; each of them changes the whole seed."""
    mixed = 0
    for part in parts:  # splitmix64's constant spreads neighbouring numbers
        mixed = ((mixed ^ part) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) % 2**63
    return mixed


def collate_mixed(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch whose images may be of several shapes."""
    images = stack([item.pop("image") for item in items])
    return {**default_collate(items), "image": images}


def make_loader(
    images: LabelledImages,
    batch_size: int,
    training: bool,
    workers: int,
    process: int,
    processes: int,
    seed: int,
    collate: Callable[[list[Any]], Any] | None = None,
) -> DataLoader:
    """Make the loader of one process's batches.

    In training, an incomplete last batch is dropped, as in timm's loader: batch norm's statistics of few images would
    distort the running ones. A data set smaller than a batch is one batch. In evaluation, all processes get the same
    number of images; some images may come twice.
    """
    share = -(-len(images) // processes)
    return DataLoader(
        images,
        batch_size=min(batch_size, share),
        sampler=EpochSampler(images, processes, process, shuffle=training, seed=seed),
        num_workers=workers,
        drop_last=training,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )

"""Images and their labels in batches, the same ones in every run with the same seed."""

import contextlib
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from timm_tresnet.tagging.annotations import Example
from timm_tresnet.utils.images import read_image


class LabelledImages(Dataset):
    """Images with a target of 0 or 1 for each label.

    What is drawn for an image depends on the seed, the epoch and the image alone: not on the process or the worker that
    draws it, nor on what was drawn before. So a run that is resumed sees what it would have seen.

    Args:
        examples: the images.
        names: the labels, in the order of the network's outputs.
        transform: from `PIL.Image.Image` to a tensor of one shape.
        image_size: side of that tensor, for the image that stands for one that cannot be read.
        seed: of what the transform draws.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        names: Sequence[str],
        transform: Callable[[Any], Tensor],
        image_size: int,
        seed: int = 0,
    ) -> None:
        positions = {name: position for position, name in enumerate(names)}
        self.paths = [example.path for example in examples]
        self._labels = [[positions[label] for label in example.labels] for example in examples]
        self._num_labels = len(names)
        self._transform = transform
        self._image_size = image_size
        self._seed = seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """The image of an index in an epoch: "image", "target", "index", and "readable", False where it is all 0."""
        epoch, index = key
        target = torch.zeros(self._num_labels)
        target[self._labels[index]] = 1
        with _seeded(mix_seed(self._seed, epoch, index)):
            try:
                image, readable = self._transform(read_image(self.paths[index])), True
            except ValueError:  # one bad file must not end a run of days; who trains is told how many there are
                image, readable = torch.zeros(3, self._image_size, self._image_size), False
        return {"image": image, "target": target, "index": index, "readable": readable}

    def fingerprint(self) -> str:
        """A hash of the files' names and their labels."""
        content = json.dumps([[str(path), labels] for path, labels in zip(self.paths, self._labels, strict=True)])
        return hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()

    def count_labels(self) -> Tensor:
        """How many images have each label."""
        flat = torch.tensor([label for labels in self._labels for label in labels], dtype=torch.long)
        return flat.bincount(minlength=self._num_labels)


class EpochSampler(DistributedSampler):
    """The part of a data set that a process gets in an epoch, as pairs of epoch and index."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in super().__iter__())


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from a seed with PyTorch, Python and NumPy, as timm's transforms do, and then go on as before."""
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
    """One seed from several numbers, each of which changes all of it."""
    mixed = 0
    for part in parts:  # the multiplier of splitmix64's increment, so that neighbours end far apart
        mixed = ((mixed ^ part) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) % 2**63
    return mixed


def make_loader(
    images: LabelledImages, batch_size: int, training: bool, workers: int, process: int, processes: int, seed: int
) -> DataLoader:
    """Batches of one of several processes.

    In training, a last batch that is not full is left out, as timm's loader does: of few images, batch norm learns
    statistics that are not those of the others. A data set that fills no batch is one batch. In evaluation each process
    gets as many images as the others, some of them twice.
    """
    share = -(-len(images) // processes)
    return DataLoader(
        images,
        batch_size=min(batch_size, share),
        sampler=EpochSampler(images, processes, process, shuffle=training, seed=seed),
        num_workers=workers,
        drop_last=training,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )

"""Images of one class each, in a folder for each class, as timm's scripts take them."""

import dataclasses
from collections import Counter
from pathlib import Path

import torch

from timm_tresnet.conversion.reading import name_some
from timm_tresnet.tagging.annotations import Annotations, Example
from timm_tresnet.tagging.forms import read_class_folders
from timm_tresnet.utils.images import printable

_VALIDATION = ("validation", "val", "valid", "eval", "evaluation")  # folders that timm takes for that


def read_folders(folder: Path, val: Path | None = None) -> tuple[Annotations, Annotations | None]:
    """Read class folders with timm's own reader, so that `validate.py` counts the same images as the same classes.

    Args:
        folder: holds a folder for each class, or a folder `train` that does, with one of `validation`, `val` and
            so on beside it.
        val: likewise, of images to measure with; None for those beside `train`.

    Returns:
        Images to train on, and those to measure with; None if there are none of their own. The classes are those of the
        first, in timm's order, where numbers in names count as numbers.

    Raises:
        OSError: if a folder cannot be read.
        ValueError: if there are fewer than two classes, images outside of them, or others to measure with.
    """
    if not folder.is_dir():
        raise ValueError(f"{printable(folder)} needs to be a folder with a folder for each class")
    training = _read(folder, "train")
    if len(training.names) < 2:
        raise ValueError(
            f"{training.called} needs two class folders or more, got {name_some(list(training.names)) or 'none'}; the "
            "folder of a data set holds a folder for each class, or `train` and `validation` that do"
        )
    if val is not None and not val.is_dir():
        raise ValueError(f"{printable(val)} needs to be a folder with a folder for each class")
    if val is None and not any((folder / name).is_dir() for name in _VALIDATION):
        return training, None
    measuring = _read(val or folder, "validation")
    unknown = sorted(set(measuring.names) - set(training.names))
    if unknown:
        raise ValueError(f"{measuring.called} has classes that {training.called} lacks: {name_some(unknown)}")
    return training, dataclasses.replace(measuring, names=training.names)


def _read(root: Path, split: str) -> Annotations:
    left_out: Counter[str] = Counter()
    folder, found = read_class_folders(root, split, left_out)
    outside = [printable(root / row.file) for row in found.rows if not row.labels[0]]
    if outside:
        raise ValueError(
            f"{printable(folder)} needs every image in the folder of its class, got {name_some(outside)} beside them"
        )
    examples = tuple(Example(root / row.file, row.labels) for row in found.rows)
    return Annotations(printable(folder), examples, found.names, left_out)


def hold_out_of_each(annotations: Annotations, share: float, seed: int) -> tuple[Annotations, Annotations]:
    """Split images at random into those to train on and a share of each class, at least one, to measure with.

    Raises:
        ValueError: if a class has a single image.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out: set[int] = set()
    for name in annotations.names:
        members = [index for index, example in enumerate(annotations.examples) if example.labels == (name,)]
        if len(members) < 2:
            raise ValueError(
                f"{annotations.called} has a single image of {name!r}, too few to hold one out; give others to measure "
                "with by --val"
            )
        order = torch.randperm(len(members), generator=generator).tolist()
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held_out |= {members[position] for position in order[:count]}
    kept, measured = (
        tuple(example for index, example in enumerate(annotations.examples) if (index in held_out) == wanted)
        for wanted in (False, True)
    )
    return dataclasses.replace(annotations, examples=kept), dataclasses.replace(annotations, examples=measured)

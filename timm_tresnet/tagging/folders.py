"""Images in class folders, the layout that timm's scripts read: each image has one class, its folder."""

import dataclasses
from collections import Counter
from pathlib import Path

import torch

from timm_tresnet.conversion.reading import shorten_names
from timm_tresnet.tagging.annotations import Annotations, Example
from timm_tresnet.tagging.forms import read_class_folders
from timm_tresnet.utils.images import printable

_VALIDATION = ("validation", "val", "valid", "eval", "evaluation")  # names that timm accepts for it


def read_folders(folder: Path, val: Path | None = None) -> tuple[Annotations, Annotations | None]:
    """Read class folders with timm's reader, so that `validate.py` counts the same images and classes.

    Args:
        folder: folder with a folder for each class, or with a folder `train` that has them and perhaps a folder
            `validation` (or `val` and so on) beside it.
        val: folder of the validation images, with the same layout; None for the validation folder in folder.

    Returns:
        The training images, and the validation images or None. The classes are those of the training images in timm's
        order, in which numbers in names are compared as numbers.

    Raises:
        OSError: if a folder cannot be read.
        ValueError: if there are fewer than two classes, images outside class folders, or validation images of classes
            without training images.
    """
    if not folder.is_dir():
        raise ValueError(f"{printable(folder)} needs to be a folder with a folder for each class")
    training = _read(folder, "train")
    if len(training.names) < 2:
        raise ValueError(
            f"{training.display_name} needs two class folders or more, got "
            f"{shorten_names(list(training.names)) or 'none'}; give it a folder for each class, or "
            "folders `train` and `validation` with a folder for each class"
        )
    if val is not None and not val.is_dir():
        raise ValueError(f"{printable(val)} needs to be a folder with a folder for each class")
    if val is None and not any((folder / name).is_dir() for name in _VALIDATION):
        return training, None
    measuring = _read(val or folder, "validation")
    unknown = sorted(set(measuring.names) - set(training.names))
    if unknown:
        raise ValueError(
            f"{measuring.display_name} has classes that {training.display_name} lacks: {shorten_names(unknown)}"
        )
    return training, dataclasses.replace(measuring, names=training.names)


def _read(root: Path, split: str) -> Annotations:
    left_out: Counter[str] = Counter()
    folder, found = read_class_folders(root, split, left_out)
    outside = [printable(root / row.file) for row in found.rows if not row.labels[0]]
    if outside:
        raise ValueError(
            f"{printable(folder)} needs every image in the folder of its class, got {shorten_names(outside)} outside "
            "class folders"
        )
    examples = tuple(Example(root / row.file, row.labels) for row in found.rows)
    return Annotations(printable(folder), examples, found.names, left_out)


def hold_out_of_each(annotations: Annotations, share: float, seed: int) -> tuple[Annotations, Annotations]:
    """Hold out a random share of each class, at least one image; return the training and the held-out images.

    Raises:
        ValueError: if a class has a single image.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out: set[int] = set()
    for name in annotations.names:
        members = [index for index, example in enumerate(annotations.examples) if example.labels == (name,)]
        if len(members) < 2:
            raise ValueError(
                f"{annotations.display_name} has a single image of {name!r}, too few to hold one out; give validation "
                "images with --val"
            )
        order = torch.randperm(len(members), generator=generator).tolist()
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held_out |= {members[position] for position in order[:count]}
    kept, measured = (
        tuple(example for index, example in enumerate(annotations.examples) if (index in held_out) == wanted)
        for wanted in (False, True)
    )
    return dataclasses.replace(annotations, examples=kept), dataclasses.replace(annotations, examples=measured)

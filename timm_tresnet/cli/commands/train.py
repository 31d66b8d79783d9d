"""`timm-tresnet train` trains a network for images of one class each."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_tresnet.cli.options import between
from timm_tresnet.cli.training import Row, add_held_out, add_training_options, run_training

ABOUT = {
    "help": "train a network on folders of images, one for each class",
    "description": "Train a network on images of one class each, from pretrained weights, and write a folder that "
    "classify, demo and export load as local-dir:FOLDER, with class names and preprocessing. Defaults are those of "
    "the recipe transfer; for every feature of timm's train.py, see `timm-tresnet recipe`. Runs under torchrun too. "
    "Needs the extra `tagging`.",
}
EXAMPLE = "train flowers --model tresnet_m --output flower_classifier"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    from timm_tresnet.tagging.settings import ClassSettings

    usual = ClassSettings()
    data = parser.add_argument_group("data")
    data.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="holds a folder for each class, or `train` and `validation` that do, as timm's train.py takes it",
    )
    data.add_argument(
        "--val", type=Path, metavar="FOLDER", help="of images to measure with (default: `validation` in FOLDER)"
    )
    add_held_out(data, usual)
    rows: list[Row] = [
        ("min-lr", between(0, 1), "lowest learning rate, for other schedules than onecycle"),
        ("smoothing", between(0, 0.99), "of the targets"),
        ("aa", str, "augmentation, such as rand-m9-mstd0.5; '' for none"),
        ("reprob", between(0, 1), "probability of erasing a part of an image"),
        ("hflip", between(0, 1), "probability of mirroring an image"),
    ]
    add_training_options(parser, usual, rows)


def run(words: Sequence[str], *, folder: Path, val: Path | None, **options: Any) -> int:
    """Train, say how it goes, and write the folder."""
    from timm_tresnet.tagging.settings import ClassSettings

    def read() -> Any:
        from timm_tresnet.tagging.folders import read_folders

        return read_folders(folder, val)

    return run_training(words, read, ClassSettings, **options)

"""`timm-tresnet train-tagger` trains a network that gives an image any number of labels."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_tresnet.cli.options import at_least, between
from timm_tresnet.cli.training import add_held_out, add_training_options, run_training

ABOUT = {
    "help": "train a network that gives an image any number of labels",
    "description": "Train a network on images with any number of labels, and write a folder that classify and export "
    "take as local-dir:FOLDER, with label names and a threshold for each label. Settings that are not given are those "
    "of official training (Alibaba-MIIL's ASL and ML_Decoder). Runs under torchrun too. Needs the extra `tagging`.",
}
EXAMPLE = "train-tagger labels.csv --images photos --head ml_decoder --output tagger"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    from timm_tresnet.tagging.settings import LOSSES, Settings

    usual = Settings()
    data = parser.add_argument_group("data")
    data.add_argument(
        "annotations",
        type=Path,
        metavar="ANNOTATIONS",
        help="COCO's .json, a .csv with the columns file and labels, or a folder with metadata.jsonl",
    )
    data.add_argument(
        "--images", type=Path, metavar="FOLDER", help="that file names are relative to (default: the annotations')"
    )
    data.add_argument("--val", type=Path, metavar="ANNOTATIONS", help="of images to measure with")
    data.add_argument("--val-images", type=Path, metavar="FOLDER", help="as --images (default: the annotations')")
    add_held_out(data, usual)
    data.add_argument(
        "--labels", type=Path, metavar="FILE", help="the labels, one a line (default: those in ANNOTATIONS)"
    )
    data.add_argument("--separator", metavar="TEXT", help="between the labels in a cell of a .csv (default: ;)")
    data.add_argument("--column", metavar="NAME", help="with the labels (default: labels, tags or label)")
    data.add_argument("--skip-missing", action="store_true", help="leave out images whose files do not exist")
    data.add_argument(
        "--skip-unknown", action="store_true", help="leave out labels that are not in --labels or ANNOTATIONS"
    )
    data.add_argument(
        "--keep-empty", action="store_true", help="keep images without labels (default: they are left out)"
    )

    rows = [
        ("gamma-neg", at_least(0, float), "of the asymmetric loss"),
        ("gamma-pos", at_least(0, float), "of the asymmetric loss"),
        ("clip", between(0, 0.99), "of the asymmetric loss"),
        ("cutout", between(0, 1), "side of the square that is painted over, as a share; 0 for none"),
        ("randaugment", between(0, 30, int), "magnitude; 0 for none"),
    ]
    add_training_options(parser, usual, rows)
    parser.add_argument("--loss", choices=LOSSES, default=usual.loss, help="(default: %(default)s)")


def run(
    words: Sequence[str],
    *,
    annotations: Path,
    images: Path | None,
    val: Path | None,
    val_images: Path | None,
    labels: Path | None,
    separator: str | None,
    column: str | None,
    skip_missing: bool,
    skip_unknown: bool,
    keep_empty: bool,
    **options: Any,
) -> int:
    """Train, say how it goes, and write the folder."""
    from timm_tresnet.tagging.annotations import Annotations, Reading, read_annotations, read_names
    from timm_tresnet.tagging.settings import Settings

    def read() -> tuple[Annotations, Annotations | None]:
        names = read_names(labels) if labels else None
        reading = Reading(images, separator, column, names, skip_missing, skip_unknown, keep_empty)
        training = read_annotations(annotations, reading)
        if not val:
            return training, None
        return training, read_annotations(val, dataclasses.replace(reading, images=val_images, names=training.names))

    return run_training(words, read, Settings, **options)

"""`timm-tresnet train-tagger` trains a network that gives an image any number of labels."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_tresnet.cli.options import FORMS, READING_OPTIONS, add_reading_options, at_least, between, make_reading
from timm_tresnet.cli.training import add_held_out, add_training_options, run_training

ABOUT = {
    "help": "train a network that gives an image any number of labels",
    "description": "Train a network on images with any number of labels, and write a folder that classify and export "
    "load as local-dir:FOLDER, with label names and a threshold for each label. Defaults are those of official "
    "training (Alibaba-MIIL's ASL and ML_Decoder). Runs under torchrun too. Needs the extra `tagging`.",
}
EXAMPLE = "train-tagger labels.csv --images photos --head ml_decoder --output tagger"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    from timm_tresnet.tagging.settings import LOSSES, UNKNOWNS, Settings

    usual = Settings()
    data = parser.add_argument_group("data")
    data.add_argument(
        "annotations",
        type=Path,
        metavar="ANNOTATIONS",
        help=FORMS,
    )
    add_reading_options(data)
    data.add_argument("--val", type=Path, metavar="ANNOTATIONS", help="of images to measure with")
    data.add_argument("--val-images", type=Path, metavar="FOLDER", help="as --images (default: the annotations')")
    add_held_out(data, usual)
    rows = [
        ("gamma-neg", at_least(0, float), "of the asymmetric loss"),
        ("gamma-pos", at_least(0, float), "of the asymmetric loss"),
        ("clip", between(0, 0.99), "of the asymmetric loss"),
        ("gamma-unknown", at_least(0, float), "of the asymmetric loss, for --unknown selective"),
        ("unknown-top-k", at_least(0), "unknown labels an image that are left out, for --unknown selective"),
        ("prior-threshold", between(0, 1), "above which a label of --prior is left out where it is unknown"),
        ("cutout", between(0, 1), "side of the square that is painted over, as a share; 0 for none"),
        ("randaugment", between(0, 30, int), "magnitude; 0 for none"),
    ]
    add_training_options(parser, usual, rows)
    for name, choices in (("loss", LOSSES), ("unknown", UNKNOWNS)):
        parser.add_argument(f"--{name}", choices=choices, default=getattr(usual, name), help="(default: %(default)s)")
    parser.add_argument(
        "--prior", type=Path, metavar="FILE", help="how often each label is there, a .csv, for --unknown selective"
    )
    parser.add_argument(
        "--pos-weight",
        metavar="FILE|balanced",
        help="how much each label counts where it is there, a .csv; balanced: as much as where it is absent",
    )


def run(
    words: Sequence[str],
    *,
    annotations: Path,
    val: Path | None,
    val_images: Path | None,
    prior: Path | None,
    pos_weight: str | None,
    **options: Any,
) -> int:
    """Train, say how it goes, and write the folder."""
    from timm_tresnet.tagging.annotations import Annotations, read_annotations, read_numbers
    from timm_tresnet.tagging.settings import Settings

    names: tuple[str, ...] = ()
    reading_options = {name: options.pop(name) for name in READING_OPTIONS}

    def read() -> tuple[Annotations, Annotations | None]:
        nonlocal names
        reading = make_reading(reading_options)
        training = read_annotations(annotations, reading)
        names = training.names
        if not val:
            return training, None
        return training, read_annotations(val, dataclasses.replace(reading, images=val_images, names=names))

    def make_settings(**settings: Any) -> Settings:
        weights = pos_weight if pos_weight in (None, "balanced") else read_numbers(Path(pos_weight), names)
        return Settings(**settings, prior=read_numbers(prior, names) if prior else None, pos_weight=weights)

    return run_training(words, read, make_settings, **options)

"""`timm-tresnet train-tagger` trains a network that gives an image any number of labels."""

import argparse
import ast
import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_tresnet.cli.commands import CommandError
from timm_tresnet.cli.options import at_least, between
from timm_tresnet.utils.errors import summarise

ABOUT = {
    "help": "train a network that gives an image any number of labels",
    "description": "Train a network on images with any number of labels, and write a folder that classify and export "
    "take as local-dir:FOLDER, with label names and a threshold for each label. Settings that are not given are those "
    "of official training (Alibaba-MIIL's ASL and ML_Decoder). Runs under torchrun too. Needs the extra `tagging`.",
}
EXAMPLE = "train-tagger labels.csv --images photos --head ml_decoder --output tagger"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    from timm_tresnet.tagging.settings import DEVICES, LOSSES, PRECISIONS, SCHEDULES, Settings

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
    data.add_argument(
        "--held-out",
        type=between(0, 0.9),
        default=usual.held_out,
        metavar="SHARE",
        help="without --val, share of the images to measure with (default: %(default)s)",
    )
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

    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="checkpoints go into FOLDER.training meanwhile"
    )
    output.add_argument("--resume", action="store_true", help="go on with a training that was stopped, if there is one")
    output.add_argument("--overwrite", action="store_true", help="replace what an earlier training has left")

    network = parser.add_argument_group("network")
    network.add_argument(
        "--model",
        default=usual.model,
        metavar="NAME",
        help="weights to start from, as --model of classify (default: %(default)s)",
    )
    network.add_argument("--from-scratch", action="store_true", help="start from random weights")
    network.add_argument(
        "--head", metavar="NAME", help="linear, bottleneck or ml_decoder (default: that of the weights)"
    )
    network.add_argument(
        "--model-kwargs",
        nargs="*",
        type=_argument,
        default=[],
        metavar="NAME=VALUE",
        help="further arguments of the network, such as num_groups=100 drop_path_rate=0.1",
    )
    network.add_argument("--image-size", type=at_least(20), metavar="PIXELS", help="(default: that of the weights)")

    training = parser.add_argument_group("training")
    whole, real = at_least(1), at_least(0, float)
    for name, kind, what in (
        ("epochs", whole, "how often each image is seen"),
        ("batch-size", whole, "images in a step, of each process"),
        ("accumulate", whole, "steps whose gradients are added up"),
        ("opt", str, "an optimizer of timm"),
        ("lr", real, "highest learning rate"),
        ("weight-decay", real, "not of biases and norms"),
        ("warmup-epochs", at_least(0), "for other schedules than onecycle"),
        ("gamma-neg", real, "of the asymmetric loss"),
        ("gamma-pos", real, "of the asymmetric loss"),
        ("clip", between(0, 0.99), "of the asymmetric loss"),
        ("ema-decay", between(0, 1), "of the moving average of the weights"),
        ("cutout", between(0, 1), "side of the square that is painted over, as a share; 0 for none"),
        ("randaugment", between(0, 30, int), "magnitude; 0 for none"),
        ("seed", at_least(0), "of all that is drawn"),
    ):
        training.add_argument(
            f"--{name}",
            type=kind,
            default=getattr(usual, name.replace("-", "_")),
            help=f"{what} (default: %(default)s)",
        )
    for name, choices in (("sched", SCHEDULES), ("loss", LOSSES)):
        training.add_argument(f"--{name}", choices=choices, default=getattr(usual, name), help="(default: %(default)s)")
    training.add_argument("--precision", choices=PRECISIONS, help="(default: 16-mixed with CUDA, else 32-true)")
    training.add_argument("--channels-last", action="store_true")
    training.add_argument("--sync-bn", action="store_true", help="batch norm over all processes")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", choices=DEVICES, default="auto", help="(default: %(default)s)")
    machine.add_argument(
        "-j",
        "--workers",
        type=at_least(0),
        default=min(8, os.cpu_count() or 1),
        help="that read images (default: %(default)s)",
    )


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"needs NAME=VALUE, got {text}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):  # text without quotes
        return name, value


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
    output: Path,
    resume: bool,
    overwrite: bool,
    head: str | None,
    model_kwargs: list[tuple[str, Any]],
    device: str,
    workers: int,
    **settings: Any,
) -> int:
    """Train, say how it goes, and write the folder."""
    from timm_tresnet.tagging.annotations import Reading, describe_left_out, read_annotations, read_names
    from timm_tresnet.tagging.settings import Settings

    try:
        from timm_tresnet.tagging.training import Place, is_first_process, train_tagger
    except ModuleNotFoundError as error:
        raise CommandError(
            f"training needs the package {error.name}, which is not installed; pip install 'timm-tresnet[tagging]'"
        ) from error

    first = is_first_process()

    def say(line: str) -> None:
        if first:
            from tqdm import tqdm

            tqdm.write(line)  # above a progress bar, if there is one

    model_args = dict(model_kwargs)
    if head:
        model_args["head"] = head
    try:
        reading = Reading(
            images, separator, column, read_names(labels) if labels else None, skip_missing, skip_unknown, keep_empty
        )
        training = read_annotations(annotations, reading)
        measuring = None
        if val:
            measuring = read_annotations(val, dataclasses.replace(reading, images=val_images, names=training.names))
        for each in filter(None, (training, measuring)):
            if left_out := describe_left_out(each):
                say(left_out)
        train_tagger(
            training,
            measuring,
            Settings(**settings, model_args=model_args),
            Place(output, resume, overwrite),
            device=device,
            workers=workers,
            command=shlex.join(["timm-tresnet", *words]),
            say=say,
        )
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot train: {summarise(error)}") from error
    return 0

"""What `timm-tresnet train` and `train-tagger` have in common: options, and how a training is run and reported."""

import argparse
import ast
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timm_tresnet.cli.commands import CommandError
from timm_tresnet.cli.options import at_least, between
from timm_tresnet.utils.errors import summarise
from timm_tresnet.utils.extras import how_to_install

Row = tuple[str, Callable[[str], Any], str]  # name of an option, what makes its value of a text, help


def add_training_options(parser: argparse.ArgumentParser, usual: Any, rows: Sequence[Row]) -> None:
    """Add all options but those about the data.

    Args:
        parser: of the command.
        usual: settings with the defaults.
        rows: options of the training that the other command does not have.
    """
    from timm_tresnet.tagging.settings import DEVICES, PRECISIONS, SCHEDULES

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
        "--head", metavar="NAME", help="linear, bottleneck, ml_decoder or query2label (default: that of the weights)"
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
    every: tuple[Row, ...] = (
        ("epochs", whole, "how often each image is seen"),
        ("batch-size", whole, "images in a step, of each process"),
        ("accumulate", whole, "steps whose gradients are added up"),
        ("opt", str, "an optimizer of timm"),
        ("lr", real, "highest learning rate"),
        ("weight-decay", real, "not of biases and norms"),
        ("warmup-epochs", at_least(0), "for other schedules than onecycle"),
        ("ema-decay", between(0, 1), "of the moving average of the weights"),
        *rows,
        ("seed", at_least(0), "of all that is drawn"),
    )
    for name, kind, what in every:
        training.add_argument(
            f"--{name}",
            type=kind,
            default=getattr(usual, name.replace("-", "_")),
            help=f"{what} (default: %(default)s)",
        )
    training.add_argument("--sched", choices=SCHEDULES, default=usual.sched, help="(default: %(default)s)")
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


def add_held_out(group: Any, usual: Any) -> None:
    """Add the option that says how many images are measured with."""
    group.add_argument(
        "--held-out",
        type=between(0, 0.9),
        default=usual.held_out,
        metavar="SHARE",
        help="without --val, share of the images to measure with (default: %(default)s)",
    )


def run_training(
    words: Sequence[str],
    read: Callable[[], tuple[Any, Any]],
    make_settings: Callable[..., Any],
    *,
    output: Path,
    resume: bool,
    overwrite: bool,
    head: str | None,
    model_kwargs: list[tuple[str, Any]],
    device: str,
    workers: int,
    **settings: Any,
) -> int:
    """Train, say how it goes, and write the folder.

    Args:
        words: of the whole command line.
        read: gives the annotations to train on, and those to measure with or None.
        make_settings: makes settings of the options that are not named here.
        output: folder that the training ends with.
        resume: go on with a training that was stopped.
        overwrite: replace what an earlier one has left.
        head: of the network; None for that of the weights.
        model_kwargs: further arguments of the network.
        device: as `train_network` takes it.
        workers: likewise.
        **settings: of the training.
    """
    from timm_tresnet.tagging.annotations import list_notes

    try:
        from timm_tresnet.tagging.training import TrainingFolder, is_first_process, train_network
    except ModuleNotFoundError as error:
        raise CommandError(
            f"training needs the package {error.name}, which is not installed; {how_to_install('tagging')}"
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
        training, measuring = read()
        for each in filter(None, (training, measuring)):
            for note in list_notes(each):
                say(note)
        train_network(
            training,
            measuring,
            make_settings(**settings, model_args=model_args),
            TrainingFolder(output, resume, overwrite),
            device=device,
            workers=workers,
            command=shlex.join(["timm-tresnet", *words]),
            say=say,
        )
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot train: {summarise(error)}") from error
    return 0

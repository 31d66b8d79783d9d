"""`timm-tresnet export` writes a network for another engine."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from timm_tresnet.cli.commands import CommandError, load_model, warn_of_assumed
from timm_tresnet.cli.options import at_least, between
from timm_tresnet.utils.errors import summarise

ABOUT = {
    "help": "write a network for another engine",
    "description": "Write a network with its weights as one artifact for another engine, checked against PyTorch, and "
    "a JSON file beside it with input shape, preprocessing and classes.",
}
EXAMPLE = "export test_tresnet --format onnx --output network.onnx"


class _Formats:
    """Names of the formats, read when they are needed: importing them imports PyTorch."""

    def __iter__(self) -> Iterator[str]:
        from timm_tresnet.deployment import FORMATS

        return iter(FORMATS)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("model", metavar="NAME", help="a model with weights, as --model of `timm-tresnet classify`")
    parser.add_argument("--format", required=True, choices=_Formats(), metavar="FORMAT", help="one of %(choices)s")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the file, with the format's suffix")
    parser.add_argument("--int8", action="store_true", help="quantise, in formats that can; needs --calibration")
    parser.add_argument(
        "--calibration", type=Path, metavar="FOLDER", help="images like those that the network will see, some hundreds"
    )
    parser.add_argument(
        "--min-agreement",
        type=between(0, 1),
        default=0.9,
        metavar="P",
        help="refuse int8 that puts the same class first as float32 on a smaller share of images (default: 0.9)",
    )
    parser.add_argument(
        "--batch", type=_batch, default="dynamic", metavar="N", help="images in a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--size", type=at_least(1), nargs=2, metavar=("H", "W"), help="size of the images, in pixels (default: dynamic)"
    )


def _batch(text: str) -> int | None:
    return None if text == "dynamic" else at_least(1)(text)


def run(
    words: Sequence[str],
    *,
    model: str,
    format: str,
    output: Path,
    int8: bool,
    calibration: Path | None,
    min_agreement: float,
    batch: int | None,
    size: Sequence[int] | None,
) -> int:
    """Export the network and print how far the artifact agrees with it."""
    from timm_tresnet.deployment import description_path, export_model

    if int8 != bool(calibration):
        raise CommandError("--int8 and --calibration FOLDER go together")
    network = load_model(model)
    warn_of_assumed(network)
    try:
        fixed = (size[0], size[1]) if size else None
        description = export_model(network, output, format, batch, fixed, calibration, min_agreement)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise CommandError(f"cannot export {model}: {summarise(error)}") from error
    check = description["check"]
    print(f"{output}: {description['model']}, {description['format']}, {description['precision']}")
    print(f"{description_path(output)}: input, preprocessing and class names")
    if not int8:
        print(f"logits equal PyTorch's within {check['max_relative_error']:.0e} (relative L2)")
        return 0
    print(
        f"same first class as float32 on {check['top1_agreement']:.1%} of {check['held_out_images']} images held out; "
        f"calibrated on {check['calibration_images']}"
    )
    if check["skipped_images"]:
        print(f"timm-tresnet: skipped {check['skipped_images']} images that cannot be read", file=sys.stderr)
    return 1 if check["skipped_images"] else 0

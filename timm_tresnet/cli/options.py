"""Types of arguments, for `add_argument(type=...)`, and the options of comparisons."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def new_file(text: str) -> Path:
    """Type of an argument: a file for results that does not exist yet."""
    path = Path(text)
    if path.exists():
        raise argparse.ArgumentTypeError(f"{path} exists already; results are never overwritten, name a new file")
    return path


def at_least(least: int, kind: type = int) -> Callable[[str], Any]:
    """Type of an argument: a number from least on."""

    def number(text: str) -> float:
        value = kind(text)
        if not value >= least:  # nan neither
            raise argparse.ArgumentTypeError(f"needs a number from {least} on, got {value}")
        return value

    return number


def between(least: float, most: float, kind: type = float) -> Callable[[str], Any]:
    """Type of an argument: a number from least to most."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:  # nan neither
            raise argparse.ArgumentTypeError(f"needs a number from {least} to {most}, got {value}")
        return value

    return number


def image_size(text: str) -> int:
    """Type of an argument: the side of images, in pixels."""
    size = int(text)
    if size < 32 or size % 4:
        raise argparse.ArgumentTypeError(f"needs a multiple of 4 from 32 on, got {size}")
    return size


def add_reading_options(parser: Any) -> None:
    """Add the fields of `timm_tresnet.tagging.forms.ReadingOptions` to a parser or group.

    Args:
        parser: gets the options; `make_reading` reads them.
    """
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="that file names are relative to (default: the annotations')"
    )
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="the labels, one a line (default: those in ANNOTATIONS)"
    )
    parser.add_argument(
        "--other-names",
        type=Path,
        metavar="FILE",
        help="a .csv of labels in ANNOTATIONS and the names to call them by, as OpenImages' class-descriptions.csv",
    )
    parser.add_argument(
        "--separator", metavar="TEXT", help="between labels (default: ; in a table, a comma in a .txt beside an image)"
    )
    parser.add_argument("--column", metavar="NAME", help="with the labels (default: labels, tags, label or LabelName)")
    parser.add_argument(
        "--file-column", metavar="NAME", help="with the names of files (default: file, file_name, image or the like)"
    )
    parser.add_argument("--skip-missing", action="store_true", help="leave out images whose files do not exist")
    parser.add_argument(
        "--skip-unknown", action="store_true", help="leave out labels that are not in --labels or ANNOTATIONS"
    )
    parser.add_argument(
        "--keep-empty", action="store_true", help="keep images without labels (default: they are left out)"
    )
    parser.add_argument(
        "--outside",
        action="store_true",
        help="accept images outside --images: absolute paths, .. and links (default: refused)",
    )


def add_engine_options(parser: Any) -> None:
    """Add the options of artifacts, in place of --model, to a parser or group."""
    parser.add_argument(
        "--engine",
        nargs=2,
        metavar=("ENGINE", "ARTIFACT"),
        help="run a file that `timm-tresnet export` wrote, in the engine torch, onnx or openvino, instead of a model",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="load an ARTIFACT of the engine torch, which can run anything on this machine; those of the others cannot",
    )


def add_machine_options(parser: Any) -> None:
    """Add the options of where and how fast a network runs, to a parser or group; `choose_device` takes the device."""
    from timm_tresnet.tagging.settings import DEVICES

    parser.add_argument("--device", choices=DEVICES, default="auto", help="(default: %(default)s)")
    parser.add_argument("--amp", choices=["bfloat16", "float16"], help="autocast to this dtype")
    parser.add_argument("--channels-last", action="store_true", help="lay images and weights out with channels last")
    parser.add_argument(
        "--compile", action="store_true", help="fold and compile the network first, which takes a minute on a CPU"
    )
    parser.add_argument("--batch-size", type=at_least(1), default=32, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "-j", "--workers", type=at_least(0), metavar="N", help=f"that read images (default: {default_workers()})"
    )


def add_keep_ratio(parser: Any) -> None:
    """Add the option of images that keep their aspect ratio to a parser or group."""
    parser.add_argument(
        "--keep-ratio",
        action="store_true",
        help="show the network whole images in their aspect ratio, their short side as long as the network's images, "
        "as ML-Danbooru's --keep_ratio (default: as the weights say, which squash or crop them)",
    )


def default_workers() -> int:
    """How many processes read images, of each of those that torchrun starts on this machine."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, (os.cpu_count() or 1) // local))


def choose_device(device: str) -> str:
    """The device that an option asks for; of several processes on a machine, each gets the next GPU.

    Raises:
        ValueError: if this machine has no such device.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    first = next(name for name in there if there[name])
    if device == "auto":
        device = first
    if not there[device]:
        raise ValueError(f"this machine has no {device}; --device {first}")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return device


def make_reading(options: dict[str, Any], **others: Any) -> Any:
    """A `timm_tresnet.tagging.forms.ReadingOptions` of `READING_OPTIONS`.

    Raises:
        OSError: if a file that is named cannot be read.
        ValueError: if it is not what it should be.
    """
    from timm_tresnet.tagging.annotations import ReadingOptions, read_names, read_other_names

    fields = dict(options)
    labels, other_names = fields.pop("labels"), fields.pop("other_names")
    return ReadingOptions(
        **fields,
        names=read_names(labels) if labels else None,
        other_names=read_other_names(other_names) if other_names else None,
        **others,
    )


READING_OPTIONS: tuple[str, ...] = ("images", "labels", "other_names", "separator", "column", "file_column")
READING_OPTIONS += ("skip_missing", "skip_unknown", "keep_empty", "outside")
FORMS = (
    "a .json of COCO, LVIS or Label Studio, CVAT's .xml, a .csv or .tsv, a folder with metadata.jsonl or with a .txt "
)
FORMS += "beside each image"


def add_comparison_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every comparison of `timm_tresnet.bench.comparison` has."""
    parser.add_argument("--batch-size", type=at_least(1), default=8)
    parser.add_argument("--rounds", type=at_least(1), default=5, help="default: %(default)s")
    parser.add_argument(
        "--memory-gb",
        type=at_least(0, float),
        metavar="GB",
        help="limit for the largest batch (default: CPU 16, CUDA what the GPU has)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--max-batch", type=at_least(0), help="CUDA: where to end the search for the largest batch; 0: none"
    )
    parser.add_argument("--amp", choices=["bfloat16", "float16"], help="autocast to this dtype; float16 on CUDA only")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true", help="run every network under torch.compile")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="file for the results, must not exist yet")

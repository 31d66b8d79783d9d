"""Types of arguments, for `add_argument(type=...)`, and the options of comparisons."""

import argparse
from collections.abc import Callable
from pathlib import Path


def new_file(text: str) -> Path:
    """A file for results that is not there yet."""
    path = Path(text)
    if path.exists():
        raise argparse.ArgumentTypeError(f"{path} exists already; results are never overwritten, name a new file")
    return path


def at_least(least: int, kind: type = int) -> Callable[[str], float]:
    """What makes a number and refuses smaller ones."""

    def number(text: str) -> float:
        value = kind(text)
        if not value >= least:  # nan neither
            raise argparse.ArgumentTypeError(f"needs a number from {least} on, got {value}")
        return value

    return number


def between(least: float, most: float, kind: type = float) -> Callable[[str], float]:
    """What makes a number and refuses smaller and greater ones."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:  # nan neither
            raise argparse.ArgumentTypeError(f"needs a number from {least} to {most}, got {value}")
        return value

    return number


def image_size(text: str) -> int:
    """The side of images, in pixels."""
    size = int(text)
    if size < 32 or size % 4:
        raise argparse.ArgumentTypeError(f"needs a multiple of 4 from 32 on, got {size}")
    return size


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

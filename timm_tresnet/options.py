"""Command-line options of `timm_tresnet.benchmark`, apart from it so that parsing them need not import torch."""

import argparse
from pathlib import Path


def image_size(text: str) -> int:
    """The side of images from an argument, in pixels: for `add_argument(type=...)`."""
    size = int(text)
    if size < 32 or size % 4:
        raise argparse.ArgumentTypeError(f"needs a multiple of 4 from 32 on, got {size}")
    return size


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every comparison of `timm_tresnet.benchmark` has."""
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--memory-gb", type=float, default=16, metavar="GB", help="CPU: limit for the largest batch")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--max-batch", type=int, help="CUDA: where to end the search for the largest batch; 0: none")
    parser.add_argument("--amp", choices=["bfloat16", "float16"], help="autocast to this dtype; float16 on CUDA only")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true", help="run every network under torch.compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the results, must not exist yet")

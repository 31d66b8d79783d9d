"""`timm-tresnet benchmark` measures speed and training memory on this machine."""

import argparse
import functools
import shlex
from collections.abc import Sequence
from typing import Any

from timm_tresnet.cli.commands import CommandError
from timm_tresnet.cli.options import add_comparison_options, image_size

ABOUT = {
    "help": "measure speed and training memory on this machine",
    "description": "Measure networks side by side in one run: images a second in training and in inference, with "
    "ratios to the first one's in the same rounds, and memory kept for backward. Weights are random. "
    "benchmarks/paper_tables.py in the repository is the long form.",
}
EXAMPLE = "benchmark resnet50 tresnet_m --rounds 3"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        default=["resnet50", "built-in:tresnet_m", "tresnet_m"],
        help="names for timm.create_model; built-in:NAME is timm's own TResNet (default: %(default)s)",
    )
    parser.add_argument("--image-size", type=image_size, default=224, metavar="PIXELS", help="default: %(default)s")
    add_comparison_options(parser)


def run(words: Sequence[str], *, models: Sequence[str], image_size: int, **comparison: Any) -> int:
    """Compare the models with the options of a comparison; the words stand in the results."""
    from timm_tresnet.bench.comparison import Candidate, check_options, run_comparison
    from timm_tresnet.bench.measuring import make_network

    names = list(dict.fromkeys(models))
    candidates = [Candidate(name, functools.partial(make_network, name), names[0], image_size) for name in names]
    settings = argparse.Namespace(models=models, image_size=image_size, **comparison)
    try:
        check_options(settings)
        return run_comparison(candidates, settings, shlex.join(["timm-tresnet", *words]))
    except ValueError as error:
        raise CommandError(str(error)) from error

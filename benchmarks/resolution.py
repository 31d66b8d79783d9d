"""How time and memory of training and the time of inference grow with the resolution, against the FLOPs.

    python benchmarks/resolution.py --json benchmarks/results/resolution.json

Ratios are to ResNet-50 at the same resolution, in the same rounds.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial

from timm_tresnet.benchmark import BUILTIN_PREFIX, Candidate, make_network, parse_options, run_comparison
from timm_tresnet.commands.options import image_size
from timm_tresnet.tresnet import ARCHITECTURES

REFERENCE = "resnet50"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write the results."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description="How time and memory grow with the resolution.")
    parser.add_argument("--model", choices=list(ARCHITECTURES), default="tresnet_m")
    parser.add_argument(
        "--image-sizes",
        nargs="+",
        type=image_size,
        default=[112, 160, 224, 288, 352, 448],
        metavar="N",
        help="in pixels",
    )
    settings = parse_options(parser, words)
    makers = {
        name: partial(make_network, name) for name in (REFERENCE, BUILTIN_PREFIX + settings.model, settings.model)
    }
    candidates = [
        Candidate(name, make, REFERENCE, size) for size in settings.image_sizes for name, make in makers.items()
    ]
    return run_comparison(candidates, settings, shlex.join(["python", "benchmarks/resolution.py", *words]))


if __name__ == "__main__":
    sys.exit(main())

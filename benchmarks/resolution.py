"""Training time, training memory and inference time against the resolution and the FLOPs.

    python benchmarks/resolution.py --json benchmarks/results/resolution.json

Ratios are to ResNet-50 at the same resolution, in the same rounds.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from command_line import format_command, parse_comparison

from timm_tresnet.bench.comparison import Candidate, run_comparison
from timm_tresnet.bench.measuring import BUILTIN_PREFIX, make_network
from timm_tresnet.cli.options import image_size
from timm_tresnet.variants import ARCHITECTURES

REFERENCE = "resnet50"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write the results."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description="Time and memory against the resolution.")
    parser.add_argument("--model", choices=list(ARCHITECTURES), default="tresnet_m")
    parser.add_argument(
        "--image-sizes",
        nargs="+",
        type=image_size,
        default=[112, 160, 224, 288, 352, 448],
        metavar="N",
        help="in pixels",
    )
    settings = parse_comparison(parser, words)
    makers = {
        name: partial(make_network, name) for name in (REFERENCE, BUILTIN_PREFIX + settings.model, settings.model)
    }
    candidates = [
        Candidate(name, make, REFERENCE, size) for size in settings.image_sizes for name, make in makers.items()
    ]
    return run_comparison(candidates, settings, format_command(__file__, words))


if __name__ == "__main__":
    sys.exit(main())

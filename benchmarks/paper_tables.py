"""Measure the paper's tables again (arXiv:2003.13630): TResNet beside the networks that it is compared with.

    python benchmarks/paper_tables.py --json benchmarks/results/paper_tables.json

For each network: size, bytes stored for backward, the largest training batch (measured on CUDA; on a CPU computed from
stored bytes, and labelled so), and images a second in training (forward, backward, SGD with momentum) and in inference,
with ratios to ResNet-50 in the same rounds. Weights are random, since speed and memory do not depend on them. Top-1 is
the published one, with each source's training; nothing is trained here.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from command_line import format_command, parse_comparison

from timm_tresnet.bench.comparison import Candidate, run_comparison
from timm_tresnet.bench.measuring import make_network
from timm_tresnet.cli.options import image_size

_PAPER = "arXiv:2003.13630"
_TIMM = "timm, results/results-imagenet.csv"

# network -> side of the images if not 224 pixels, published ImageNet top-1 at that size, source
PUBLISHED: dict[str, tuple[int | None, float | None, str | None]] = {
    "resnet50": (None, 79.0, _PAPER),
    "resnet50d": (None, 79.3, _PAPER),
    "resnext50_32x4d": (None, 79.4, _PAPER),
    "seresnext50_32x4d": (None, 79.9, _PAPER),
    "efficientnet_b1": (240, 79.2, _PAPER),
    "mixnet_l": (None, 79.0, _PAPER),
    "mobilenetv3_large_100": (None, 75.784, f"{_TIMM}: mobilenetv3_large_100.ra_in1k"),
    "built-in:tresnet_m": (None, 80.8, _PAPER),
    "tresnet_m": (None, 80.8, _PAPER),
    "tresnet_l": (None, 81.5, _PAPER),
    "tresnet_xl": (None, 82.0, _PAPER),
    "tresnet_v2_l": (None, 83.91, f"{_TIMM}: tresnet_v2_l.miil_in21k_ft_in1k, pretrained on ImageNet-21k"),
    "test_tresnet": (None, None, None),
}
DEFAULT = [name for name in PUBLISHED if name != "test_tresnet"]


def annotate(row: dict[str, Any]) -> dict[str, Any]:
    """Return the published accuracy of a row if it is for the same image size."""
    size, top1, source = PUBLISHED[row["row"]]
    if row["image_size"] != (size or 224):
        top1 = source = None
    return {"top1": top1, "top1_source": source}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write the results."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description="TResNet beside the networks of its paper's tables.")
    parser.add_argument("--models", nargs="+", choices=list(PUBLISHED), default=DEFAULT, help="resnet50 is added")
    parser.add_argument("--image-size", type=image_size, help="in pixels, for all (default: 224; efficientnet_b1 240)")
    settings = parse_comparison(parser, words)
    settings.models = list(dict.fromkeys(["resnet50", *settings.models]))
    candidates = [
        Candidate(name, partial(make_network, name), "resnet50", settings.image_size or PUBLISHED[name][0] or 224)
        for name in settings.models
    ]
    return run_comparison(candidates, settings, format_command(__file__, words), annotate)


if __name__ == "__main__":
    sys.exit(main())

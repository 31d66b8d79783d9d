"""Ablation of speed and memory: each of the paper's ingredients is switched off or replaced alone.

    python benchmarks/ablation.py --json benchmarks/results/ablation.json

Ratios are to the whole network in the same rounds. Accuracy is not measured here but, at a small scale, in
ablation_accuracy.py.
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
from timm_tresnet.variants import ARCHITECTURES

FULL = "as published"
# change -> arguments of the model
VARIATIONS: dict[str, dict[str, Any]] = {
    FULL: {},
    "stem: 7x7 convolution, max pool": {"stem": "conv7x7"},
    "no anti-aliasing": {"aa_layer": False},
    "activations stored": {"recompute": "none"},
    "expansions recomputed too": {"recompute": "expansions"},
    "bottlenecks in every stage": {"block": "bottleneck"},
    "no squeeze-and-excitation": {"use_se": False},
    "squeeze-and-excitation in every stage": {"use_se": True},
    "ReLU for LeakyReLU": {"act_layer": "relu"},
    "SiLU for LeakyReLU": {"act_layer": "silu"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write the results."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description="Speed and memory of TResNet without each of its ingredients.")
    parser.add_argument("--model", choices=list(ARCHITECTURES), default="tresnet_m")
    parser.add_argument("--image-size", type=image_size, default=224)
    settings = parse_comparison(parser, words)
    candidates = [
        Candidate(name, partial(make_network, settings.model, **arguments), FULL, settings.image_size)
        for name, arguments in VARIATIONS.items()
    ]
    return run_comparison(candidates, settings, format_command(__file__, words))


if __name__ == "__main__":
    sys.exit(main())

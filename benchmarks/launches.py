"""Overhead of recomputation where launches dominate: a step of a narrow network on small images, in one thread.

    python benchmarks/launches.py --json benchmarks/results/launches.json

Tensors are so small that a step's time is spent in Python, autograd and dispatch. Time is the thread's own processor
time, the least of all steps; the networks take turns. Ratios are to timm's built-in.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from command_line import format_command
from torch import Tensor, nn
from training_memory import BUILTIN

from timm_tresnet.bench.measuring import BUILTIN_PREFIX, DTYPES, make_network
from timm_tresnet.bench.results import start_results, write_results
from timm_tresnet.cli.options import at_least, new_file
from timm_tresnet.utils.tables import format_markdown

MODEL, WIDTH_FACTOR = "tresnet_m", 0.125


def make_networks() -> dict[str, nn.Module]:
    """Make the built-in, and ours with every setting, in training mode."""
    networks = {BUILTIN: make_network(BUILTIN_PREFIX + MODEL, width_factor=WIDTH_FACTOR)}
    for setting in ("none", "activations", "expansions"):
        networks[setting] = make_network(MODEL, width_factor=WIDTH_FACTOR, recompute=setting)
    networks["checkpointing"] = make_network(MODEL, width_factor=WIDTH_FACTOR)
    networks["checkpointing"].set_grad_checkpointing()
    return {name: network.train() for name, network in networks.items()}


def measure_step(network: nn.Module, images: Tensor, amp: str | None = None) -> tuple[float, float]:
    """Return milliseconds of the forward, under autocast to amp (a key of DTYPES), and of the backward."""
    network.zero_grad()
    start = time.thread_time()
    with torch.autocast("cpu", dtype=DTYPES.get(amp), enabled=amp is not None):
        loss = network(images).square().mean()
    middle = time.thread_time()
    loss.backward()
    return (middle - start) * 1e3, (time.thread_time() - middle) * 1e3


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write the results."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description="Overhead of recomputation where launches dominate.")
    parser.add_argument("--steps", type=at_least(1), default=40, help="default: %(default)s")
    parser.add_argument("--batch-size", type=at_least(1), default=2, help="default: %(default)s")
    parser.add_argument("--image-size", type=at_least(32), default=32, help="default: %(default)s")
    parser.add_argument("--amp", choices=list(DTYPES), help="autocast to this dtype")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="file for the results, must not exist yet")
    settings = parser.parse_args(words)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = start_results(format_command(__file__, words), "cpu", settings)
    networks = make_networks()
    images = torch.randn(settings.batch_size, 3, settings.image_size, settings.image_size)
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in networks}
    for _ in range(settings.steps):
        for name, network in networks.items():
            steps[name].append(measure_step(network, images, settings.amp))
    least = {name: min(map(sum, times)) for name, times in steps.items()}
    for name, times in steps.items():
        forward, backward = (min(column) for column in zip(*times, strict=True))
        row = {"row": name, "step_ms": least[name], "forward_ms": forward, "backward_ms": backward}
        results["rows"].append({**row, "step_ratio": least[name] / least[BUILTIN]})
    titles = ["", "step, ms", "to the built-in", "forward, ms", "backward, ms"]
    names = ["step_ms", "step_ratio", "forward_ms", "backward_ms"]
    print(format_markdown(titles, [[row["row"], *(f"{row[name]:.2f}" for name in names)] for row in results["rows"]]))
    if settings.json:
        write_results(results, settings.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

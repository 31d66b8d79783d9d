"""Measure networks side by side in one run: training and inference speed, memory stored for backward, and size.

Ratios within a run transfer to other machines better than absolute numbers. So the networks take turns, A-B-A-B, and
each time is divided into the reference's time of the same round.
"""

import argparse
import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from timm_tresnet.bench.measuring import (
    autocast,
    choose_memory_format,
    compute_largest_batch,
    compute_loss,
    find_largest_batch,
    make_batch,
    measure_kept,
    measure_size,
    read_clock,
)
from timm_tresnet.bench.results import format_spread, start_results, write_results
from timm_tresnet.utils.tables import format_markdown

REPEATS = {"cpu": 1, "cuda": 4}  # steps in a row; on a GPU, the CPU then runs ahead as in training
_DEFAULT_GB = 16.0
_DEFAULT_MAX_BATCH = 8192


@dataclass(frozen=True)
class Candidate:
    """A network to measure.

    Args:
        name: name in the results; candidates with the same name share the network.
        make: makes the network: images (N, 3, H, W) to logits (N, 1000).
        reference: name of the candidate to divide by; the one with the same image size if there is one.
        image_size: side of the images, in pixels.
    """

    name: str
    make: Callable[[], nn.Module]
    reference: str
    image_size: int = 224


class _Bench:
    """The networks and batches of a comparison."""

    def __init__(self, settings: argparse.Namespace) -> None:
        self.settings = settings
        self.memory_format = choose_memory_format(settings.channels_last)
        self.networks: dict[str, tuple[nn.Module, nn.Module, torch.optim.Optimizer]] = {}

    def network(self, candidate: Candidate) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
        """Return the network, its runnable form (compiled if requested), and its optimizer."""
        if candidate.name not in self.networks:
            plain = candidate.make().to(self.settings.device).to(memory_format=self.memory_format)
            running: Any = torch.compile(plain, dynamic=False) if self.settings.compile else plain
            optimizer = torch.optim.SGD(plain.parameters(), lr=0.0, momentum=0.9)  # same work, constant weights
            self.networks[candidate.name] = plain, running, optimizer
        return self.networks[candidate.name]

    def batch(self, size: int, image_size: int) -> tuple[Tensor, Tensor]:
        return make_batch(size, image_size, self.settings.device, self.memory_format)

    def train(self, candidate: Candidate, size: int, repeats: int = 1) -> float:
        """Return the mean time of repeats training steps in seconds: forward, backward, SGD with momentum."""
        _, running, optimizer = self.network(candidate)
        running.train()
        images, labels = self.batch(size, candidate.image_size)
        start = read_clock(self.settings.device)
        for _ in range(repeats):
            optimizer.zero_grad()
            compute_loss(running, images, labels, self.settings.amp).backward()
            optimizer.step()
        return (read_clock(self.settings.device) - start) / repeats

    def infer(self, candidate: Candidate, size: int, repeats: int = 1) -> float:
        """Return the mean time of repeats forwards in eval mode, in seconds."""
        _, running, _ = self.network(candidate)
        running.eval()
        images, _ = self.batch(size, candidate.image_size)
        with torch.inference_mode(), autocast(self.settings.device, self.settings.amp):
            start = read_clock(self.settings.device)
            for _ in range(repeats):
                running(images)
            return (read_clock(self.settings.device) - start) / repeats

    def memory(self, candidate: Candidate) -> dict[str, Any]:
        """Measure the memory that a training step stores for backward, and the largest batch."""
        plain, running, optimizer = self.network(candidate)
        size = self.settings.batch_size
        self.train(candidate, size)  # warm up kernels and compiled code
        optimizer.zero_grad()
        kept_mb = measure_kept(running, *self.batch(size, candidate.image_size), self.settings.amp) / size / 1e6
        params_m = sum(parameter.numel() for parameter in plain.parameters()) / 1e6
        if self.settings.max_batch and not self.settings.compile:  # it would compile again for every size
            limit = self.settings.memory_gb
            guess = compute_largest_batch(params_m, kept_mb, limit or torch.cuda.mem_get_info()[1] / 1e9)
            step = functools.partial(self.train, candidate)
            largest = find_largest_batch(step, self.settings.max_batch, limit, guess)
            self.networks.clear()  # each network gets all of the memory
            how = "measured" if limit is None else f"measured in {limit:g} GB"
        else:
            limit = _DEFAULT_GB if self.settings.memory_gb is None else self.settings.memory_gb
            largest = compute_largest_batch(params_m, kept_mb, limit)
            how = f"computed for {limit:g} GB from kept bytes"
        return {"kept_mb": kept_mb, "largest_batch": largest, "largest_batch_how": how}


def compare(candidates: Sequence[Candidate], settings: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """Measure candidates in turns.

    Args:
        candidates: at least one; each one's reference is among them.
        settings: what `timm_tresnet.cli.options.add_comparison_options` adds.

    Returns:
        A dict for each candidate, with the fields that benchmarks/README.md describes, and whether the run is complete.
        After Ctrl-C, finished measurements are included; the rest is None or missing from the lists.
    """
    bench = _Bench(settings)
    measures = {"train": bench.train, "inference": bench.infer}
    seconds: dict[str, list[list[float]]] = {name: [] for name in measures}  # by round, then by candidate
    memory: list[dict[str, Any]] = []
    sizes = []
    complete = False
    total = len(candidates) * (2 * settings.rounds + 4)
    bar_format = "[{bar:30}] {n_fmt}/{total_fmt} {desc}"
    with tqdm(total=total, disable=None, bar_format=bar_format, ascii=" #") as bar, suppress(KeyboardInterrupt):
        for candidate in candidates:
            bar.set_description_str(f"size of {candidate.name}")
            sizes.append(measure_size(candidate.make(), candidate.image_size))
            bar.update()
        for candidate in candidates:
            bar.set_description_str(f"memory of {candidate.name}, {candidate.image_size} px")
            memory.append(bench.memory(candidate))
            bar.update()
        for turn in range(settings.rounds + 1):
            measured: dict[str, list[float]] = {name: [] for name in measures}
            for candidate, (quantity, measure) in itertools.product(candidates, measures.items()):
                bar.set_description_str(f"round {turn}: {quantity}, {candidate.name}, {candidate.image_size} px")
                repeats = REPEATS[settings.device] if turn else 1
                measured[quantity].append(measure(candidate, settings.batch_size, repeats))
                bar.update()
            if turn:  # round 0 is for warming up
                for quantity, values in measured.items():
                    seconds[quantity].append(values)
        complete = True
    return _summarize(candidates[: len(sizes)], sizes, memory, seconds, settings.batch_size), complete


def _summarize(
    candidates: Sequence[Candidate],
    sizes: Sequence[dict[str, float]],
    memory: Sequence[dict[str, Any]],
    seconds: dict[str, list[list[float]]],
    batch_size: int,
) -> list[dict[str, Any]]:
    rows = []
    for index, candidate in enumerate(candidates):
        reference = _find_reference(candidate, candidates)
        row: dict[str, Any] = {"row": candidate.name, "image_size": candidate.image_size, **sizes[index]}
        missing = {"kept_mb": None, "largest_batch": None, "largest_batch_how": None}
        row |= memory[index] if index < len(memory) else missing
        for quantity, rounds in seconds.items():
            row[f"{quantity}_images_per_s"] = [batch_size / values[index] for values in rounds]
            row[f"{quantity}_ratios"] = [values[reference] / values[index] for values in rounds]
        rows.append(row)
    return rows


def _find_reference(candidate: Candidate, candidates: Sequence[Candidate]) -> int:
    named = [index for index, other in enumerate(candidates) if other.name == candidate.reference]
    same = [index for index in named if candidates[index].image_size == candidate.image_size]
    return (same or named)[0]


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of `compare` as a Markdown table; speeds are medians, with the spread of their ratios."""
    titles = ["", "px", "M params", "GMACs", "M activations", "kept, MB an image", "largest batch"]
    titles += ["training, images/s", "inference, images/s"]
    table = []
    for row in rows:
        cells = [row["row"], str(row["image_size"])]
        cells += [f"{row['params_m']:.1f}", f"{row['gmacs']:.2f}", f"{row['activations_m']:.1f}"]
        cells += ["" if row["kept_mb"] is None else f"{row['kept_mb']:.1f}", str(row["largest_batch"] or "")]
        for quantity in ("train", "inference"):
            speeds = row[f"{quantity}_images_per_s"]
            cells.append(
                f"{statistics.median(speeds):.1f}, {format_spread(row[f'{quantity}_ratios'])}" if speeds else ""
            )
        table.append(cells)
    how = {row["largest_batch_how"]: None for row in rows if row["largest_batch_how"]}
    return "\n".join([format_markdown(titles, table), "", *(f"Largest batch: {each}." for each in how)])


def check_options(settings: argparse.Namespace) -> None:
    """Check --device, --amp and --max-batch against each other and the machine; set the default of --max-batch.

    On CUDA, turns on cuDNN's benchmark mode.

    Raises:
        ValueError: if they contradict each other; the message says what to do.
    """
    if settings.device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda needs a GPU, and PyTorch finds none; leave it out to measure on the CPU")
        settings.max_batch = _DEFAULT_MAX_BATCH if settings.max_batch is None else settings.max_batch
        torch.backends.cudnn.benchmark = True  # as timm's scripts do
    elif settings.amp == "float16" or settings.max_batch is not None:
        raise ValueError("--amp float16 and --max-batch need --device cuda")


def run_comparison(
    candidates: Sequence[Candidate],
    settings: argparse.Namespace,
    command: str,
    annotate: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: {},
) -> int:
    """Measure candidates, print a table and write the results, even partial ones after Ctrl-C.

    Args:
        candidates: see `compare`.
        settings: see `compare`; checked options, all of which except `json` are recorded in the results.
        command: the command to record in the results.
        annotate: returns additional fields for a row.

    Returns:
        Exit status: 0, or 130 after Ctrl-C.
    """
    torch.manual_seed(0)
    results = start_results(command, settings.device, settings)
    rows, complete = compare(candidates, settings)
    results["rows"] = [{**row, **annotate(row)} for row in rows]
    print(format_table(results["rows"]))
    if settings.json:
        write_results(results, settings.json)
    if not complete:
        print("interrupted: only finished measurements are shown", file=sys.stderr)
    return 0 if complete else 130

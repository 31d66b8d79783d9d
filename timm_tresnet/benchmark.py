"""Measures networks side by side in one run: speed in training and in inference, memory kept for backward, size.

Absolute numbers say little about another machine, ratios within a run say more: the networks take turns, A-B-A-B, and
each time becomes a ratio to the reference's in the same round.
"""

import argparse
import copy
import datetime
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import timm.models.tresnet
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from timm_tresnet.commands.options import add_comparison_options
from timm_tresnet.tresnet import ARCHITECTURES  # the built-in takes the same layers, width_factor and v2

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
BUILTIN_PREFIX = "built-in:"
REPEATS = {"cpu": 1, "cuda": 4}  # steps in a row, for the CPU to run ahead of a GPU as in training
_CLASSES = 1000
_DEFAULT_GB = 16.0
_DEFAULT_MAX_BATCH = 8192

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would log when it starts and stops; read at its first use


@dataclass(frozen=True)
class Candidate:
    """A network to measure.

    Args:
        name: as it stands in the results; candidates of one name share the network.
        make: returns the network: images (N, 3, H, W) to logits (N, 1000).
        reference: name of the candidate that ratios are taken to: the one of the same image size if there is one.
        image_size: side of the images, in pixels.
    """

    name: str
    make: Callable[[], nn.Module]
    reference: str
    image_size: int = 224


def make_network(name: str, **kwargs: Any) -> nn.Module:
    """A network with random weights for 1000 classes.

    Args:
        name: a name for `timm.create_model`; behind "built-in:", a TResNet as timm itself has it.
        kwargs: more arguments of the model.

    Raises:
        ValueError: if timm knows no such model, or has no such TResNet.
    """
    variant = name.removeprefix(BUILTIN_PREFIX)
    if variant != name:
        if variant not in ARCHITECTURES:
            raise ValueError(f"{name}: built-in models to compare with are {', '.join(ARCHITECTURES)}, got {variant!r}")
        return timm.models.tresnet.TResNet(num_classes=_CLASSES, **ARCHITECTURES[variant], **kwargs)
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"timm knows no model {name!r}; `timm.list_models()` names those that it knows")
    return timm.create_model(name, num_classes=_CLASSES, **kwargs)


# ---- what is measured


def choose_memory_format(channels_last: bool) -> torch.memory_format:
    """What `--channels-last` stands for, with and without it."""
    return torch.channels_last if channels_last else torch.contiguous_format


def read_clock(device: str) -> float:
    """Seconds, at a moment when the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def make_batch(
    size: int, image_size: int, device: str, memory_format: torch.memory_format = torch.contiguous_format
) -> tuple[Tensor, Tensor]:
    """Seeded images (N, 3, H, W) and labels (N,), made where they are used."""
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(size, 3, image_size, image_size, generator=generator, device=device)
    labels = torch.randint(0, _CLASSES, (size,), generator=generator, device=device)
    return images.contiguous(memory_format=memory_format), labels


def compute_loss(network: nn.Module, images: Tensor, labels: Tensor, amp: str | None = None) -> Tensor:
    """Loss of a forward, under autocast to the dtype `amp` names, if any."""
    with torch.autocast(images.device.type, dtype=DTYPES.get(amp, torch.bfloat16), enabled=amp is not None):
        return F.cross_entropy(network(images).float(), labels)


def measure_kept(network: nn.Module, images: Tensor, labels: Tensor, amp: str | None = None) -> int:
    """Bytes that a training forward keeps while its loss is held, the loss itself among them.

    Args:
        network: takes images, returns logits (N, classes); in training mode, and warmed up if it is compiled.
        images: (N, 3, H, W); the forward gets a copy.
        labels: (N,); the forward gets a copy.
        amp: dtype of autocast, a key of DTYPES; None for no autocast.
    """
    gc.collect()
    if images.is_cuda:
        before = torch.cuda.memory_allocated()
        loss = compute_loss(network, images.clone(), labels.clone(), amp)
        gc.collect()
        kept = torch.cuda.memory_allocated() - before
        del loss
        return kept
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = compute_loss(network, images.clone(), labels.clone(), amp)
        gc.collect()
    del loss  # not before the profile ends: what backward needs must not be freed in it
    return sum(event.self_cpu_memory_usage for event in profile.events())


def count_flops(network: nn.Module, image_size: int) -> int:
    """Floating-point operations for one image; a multiply-add is two. Moves the network to the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.to("meta")(torch.empty(1, 3, image_size, image_size, device="meta"))
    return counter.get_total_flops()


def measure_size(network: nn.Module, image_size: int) -> dict[str, float]:
    """Millions of parameters, and for one image billions of multiply-adds and millions of activations.

    Activations are what convolutions and linear layers put out, as in timm's tables.
    """
    network = copy.deepcopy(network).eval()
    activations = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal activations
        activations += output.numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    flops = count_flops(network, image_size)
    return {
        "params_m": sum(parameter.numel() for parameter in network.parameters()) / 1e6,
        "gmacs": flops / 2e9,
        "activations_m": activations / 1e6,
    }


def profile(run: Callable[[], object], title: str, device: str, repeats: int = 10) -> str:
    """Milliseconds of a run on the device, and the operations that take the most of them, as a Markdown table."""
    for _ in range(3):
        run()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(repeats):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
    own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    # A GPU's kernels stand there by themselves too, besides the operations that they belong to.
    events = [event for event in profiler.key_averages() if event.key.startswith("aten::") or device == "cpu"]
    times = {event.key: getattr(event, own) / 1e3 / repeats for event in events}  # us to ms
    total = sum(times.values())
    lines = [f"| {title} | ms of {total:.1f} | share |", "|---|---|---|"]
    for key, time_ms in sorted(times.items(), key=lambda item: -item[1])[:10]:
        lines.append(f"| {key} | {time_ms:.2f} | {time_ms / total:.1%} |")
    return "\n".join(lines)


def find_largest_batch(
    step: Callable[[int], object], max_batch: int, memory_gb: float | None = None, guess: int | None = None
) -> int:
    """The largest batch with which `step(batch)` does not run out of a GPU's memory, by bisection, to one percent.

    cuDNN does not try several algorithms meanwhile, which would take minutes for each size.

    Args:
        step: runs with a batch of that size.
        max_batch: where to end.
        memory_gb: what PyTorch may allocate, in gigabytes (1e9 bytes); None for what the GPU has.
        guess: where to begin; every new size takes cuDNN seconds.
    """
    if memory_gb is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gb * 1e9 / torch.cuda.mem_get_info()[1]))
    tries_algorithms, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    fits, fails = 0, max_batch + 1
    size, stride = (fits + fails) // 2 if guess is None else guess, 0.03
    try:
        while fails - fits > max(1, fits // 100):
            size = min(max(size, fits + 1), fails - 1)
            gc.collect()
            torch.cuda.empty_cache()
            try:
                step(size)
                fits = size
            except torch.cuda.OutOfMemoryError:
                fails = size
            if guess is None or (fits and fails <= max_batch):
                size = (fits + fails) // 2
            else:  # away from the guess, faster and faster
                size = int(fits * (1 + stride)) if fits else int(fails * (1 - stride))
                stride = min(2 * stride, 0.5)
    finally:
        torch.backends.cudnn.benchmark = tries_algorithms
        if memory_gb is not None:
            torch.cuda.set_per_process_memory_fraction(1.0)
    return fits


def compute_largest_batch(params_m: float, kept_mb: float, memory_gb: float) -> int:
    """Images for which what a training step keeps fits, beside float32 weights, gradients and momentum (12 bytes each).

    An upper bound: the peak of a step is above what is kept.

    Args:
        params_m: millions of parameters.
        kept_mb: kept for backward, in megabytes (1e6 bytes) an image.
        memory_gb: the limit, in gigabytes (1e9 bytes).
    """
    return max(0, int((memory_gb * 1e3 - 12 * params_m) / kept_mb))


class _Bench:
    """The networks and batches of a comparison."""

    def __init__(self, settings: argparse.Namespace) -> None:
        self.settings = settings
        self.memory_format = choose_memory_format(settings.channels_last)
        self.networks: dict[str, tuple[nn.Module, nn.Module, torch.optim.Optimizer]] = {}

    def network(self, candidate: Candidate) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
        """The network, what runs it, and its optimizer."""
        if candidate.name not in self.networks:
            plain = candidate.make().to(self.settings.device, memory_format=self.memory_format)
            running = torch.compile(plain, dynamic=False) if self.settings.compile else plain
            optimizer = torch.optim.SGD(plain.parameters(), lr=0.0, momentum=0.9)  # all the work, and weights stay
            self.networks[candidate.name] = plain, running, optimizer
        return self.networks[candidate.name]

    def batch(self, size: int, image_size: int) -> tuple[Tensor, Tensor]:
        return make_batch(size, image_size, self.settings.device, self.memory_format)

    def train(self, candidate: Candidate, size: int, repeats: int = 1) -> float:
        """Seconds of a training step, forward, backward, SGD with momentum: the mean of some in a row."""
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
        """Seconds of a forward in eval mode: the mean of some in a row."""
        _, running, _ = self.network(candidate)
        running.eval()
        images, _ = self.batch(size, candidate.image_size)
        amp = self.settings.amp
        dtype = DTYPES.get(amp, torch.bfloat16)
        with torch.inference_mode(), torch.autocast(images.device.type, dtype=dtype, enabled=amp is not None):
            start = read_clock(self.settings.device)
            for _ in range(repeats):
                running(images)
            return (read_clock(self.settings.device) - start) / repeats

    def memory(self, candidate: Candidate) -> dict[str, Any]:
        """What a training step keeps, and the largest batch."""
        plain, running, optimizer = self.network(candidate)
        size = self.settings.batch_size
        self.train(candidate, size)  # for kernels, and compiled code, to be there
        optimizer.zero_grad()
        kept_mb = measure_kept(running, *self.batch(size, candidate.image_size), self.settings.amp) / size / 1e6
        params_m = sum(parameter.numel() for parameter in plain.parameters()) / 1e6
        if self.settings.max_batch and not self.settings.compile:  # else it would compile for every size tried
            limit = self.settings.memory_gb
            guess = compute_largest_batch(params_m, kept_mb, limit or torch.cuda.mem_get_info()[1] / 1e9)
            step = functools.partial(self.train, candidate)
            largest = find_largest_batch(step, self.settings.max_batch, limit, guess)
            self.networks.clear()  # each has the memory for itself
            how = "measured" if limit is None else f"measured in {limit:g} GB"
            return {"kept_mb": kept_mb, "largest_batch": largest, "largest_batch_how": how}
        limit = _DEFAULT_GB if self.settings.memory_gb is None else self.settings.memory_gb
        largest = compute_largest_batch(params_m, kept_mb, limit)
        how = f"computed for {limit:g} GB from kept bytes"
        return {"kept_mb": kept_mb, "largest_batch": largest, "largest_batch_how": how}


class Progress:
    """A bar on stderr.

    Args:
        total: steps there will be.
        visible: whether to draw; None for where stderr is a terminal.
    """

    def __init__(self, total: int, visible: bool | None = None) -> None:
        self.total, self.done = total, 0
        self.visible = sys.stderr.isatty() if visible is None else visible

    def advance(self, doing: str) -> None:
        """Say what is done next, one step further."""
        if self.visible:
            filled = "#" * (30 * self.done // self.total)
            print(f"\r[{filled:<30}] {self.done}/{self.total} {doing:<40.40}", end="", file=sys.stderr, flush=True)
        self.done += 1

    def end(self) -> None:
        """Leave the bar's line."""
        if self.visible:
            print(file=sys.stderr)


def compare(candidates: Sequence[Candidate], settings: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """Measure candidates in turns.

    Args:
        candidates: at least one; each one's reference is among them.
        settings: what `add_comparison_options` adds.

    Returns:
        A dict for each candidate, with the fields that benchmarks/README.md describes, and whether all of it was done:
        with Ctrl-C, what is complete stays, the rest is None or missing from the lists.
    """
    bench = _Bench(settings)
    seconds: dict[str, list[list[float]]] = {"train": [], "inference": []}  # for each round, those of every candidate
    memory: list[dict[str, Any]] = []
    progress = Progress(len(candidates) * (2 * settings.rounds + 4))
    sizes = []
    complete = True
    try:
        for candidate in candidates:
            progress.advance(f"size of {candidate.name}")
            sizes.append(measure_size(candidate.make(), candidate.image_size))
        for candidate in candidates:
            progress.advance(f"memory of {candidate.name}, {candidate.image_size} px")
            memory.append(bench.memory(candidate))
        for turn in range(settings.rounds + 1):
            measured: dict[str, list[float]] = {"train": [], "inference": []}
            for candidate in candidates:
                for quantity, measure in (("train", bench.train), ("inference", bench.infer)):
                    progress.advance(f"round {turn}: {quantity}, {candidate.name}, {candidate.image_size} px")
                    repeats = REPEATS[settings.device] if turn else 1
                    measured[quantity].append(measure(candidate, settings.batch_size, repeats))
            if turn:  # round 0 is for warming up
                for quantity, values in measured.items():
                    seconds[quantity].append(values)
    except KeyboardInterrupt:
        complete = False
    progress.end()
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


# ---- where it ran, and what is printed and written


def describe_machine(device: str) -> dict[str, dict[str, Any]]:
    """Hardware and versions, as they stand in the results."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "hardware": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # with the build, which the package's metadata leave out
            "timm": timm.__version__,
            "timm-tresnet": importlib.metadata.version("timm-tresnet"),
        },
    }


def start_results(
    command: str,
    device: str,
    settings: argparse.Namespace,
    unrecorded: Sequence[str] = (),
    packages: Sequence[str] = (),
) -> dict[str, Any]:
    """Results without rows: what makes them, when and on what; printed too.

    Args:
        command: that makes these results.
        device: as for `describe_machine`.
        settings: every option.
        unrecorded: options that are left out beside `json`, such as folders of the machine.
        packages: whose versions are recorded too, where they are installed.
    """
    machine = describe_machine(device)
    machine["versions"] |= {
        name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)
    }
    recorded = {name: value for name, value in vars(settings).items() if name not in ("json", *unrecorded)}
    today = datetime.date.today().isoformat()
    results = {"command": command, "date": today, **machine, "settings": recorded, "rows": []}
    print(format_machine(results), flush=True)
    return results


def format_machine(results: dict[str, Any]) -> str:
    """The command, and where it ran."""
    machine = ", ".join(f"{name} {value}" for name, value in {**results["hardware"], **results["versions"]}.items())
    return f"{results['date']}: {results['command']}\n{machine}\n"


def format_spread(values: Sequence[float]) -> str:
    """Median and range of ratios, empty for none."""
    return f"{statistics.median(values):.2f}x ({min(values):.2f}-{max(values):.2f})" if values else ""


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `compare` as a Markdown table; speeds are medians, with their ratios' spread."""
    titles = ["", "px", "M params", "GMACs", "M activations", "kept, MB an image", "largest batch"]
    titles += ["training, images/s", "inference, images/s"]
    table = [titles, ["---"] * len(titles)]
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
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    how = {row["largest_batch_how"]: None for row in rows if row["largest_batch_how"]}
    return "\n".join([*lines, "", *(f"Largest batch: {each}." for each in how)])


def write_new(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        FileExistsError: if there is one of that name; the text is then beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    unfinished.write_text(text)
    if path.exists():
        raise FileExistsError(f"{path} came to exist meanwhile and is left as it is; the results are in {unfinished}")
    unfinished.rename(path)


def check_options(settings: argparse.Namespace) -> None:
    """Check --device, --amp and --max-batch against each other and the machine, and set the last one's default.

    On CUDA, PyTorch is told to try cuDNN's algorithms and take the fastest.

    Raises:
        ValueError: if they contradict; says what to do.
    """
    if settings.device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda needs a GPU, and PyTorch finds none; leave it out to measure on the CPU")
        settings.max_batch = _DEFAULT_MAX_BATCH if settings.max_batch is None else settings.max_batch
        torch.backends.cudnn.benchmark = True  # as timm's scripts do
    elif settings.amp == "float16" or settings.max_batch is not None:
        raise ValueError("--amp float16 and --max-batch need --device cuda")


def parse_options(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Add the options to those of a script, parse and check them; a mistake ends the process."""
    add_comparison_options(parser)
    settings = parser.parse_args(words)
    try:
        check_options(settings)
    except ValueError as error:
        parser.error(str(error))
    return settings


def run_comparison(
    candidates: Sequence[Candidate],
    settings: argparse.Namespace,
    command: str,
    annotate: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: {},
) -> int:
    """Measure candidates, print a table and write the results, also those that Ctrl-C leaves.

    Args:
        candidates: as for `compare`.
        settings: what `add_comparison_options` adds, checked; all but `json` stands in the results.
        command: that makes these results.
        annotate: returns more fields for a row.

    Returns:
        Exit status: 0, or 130 after Ctrl-C.
    """
    torch.manual_seed(0)
    results = start_results(command, settings.device, settings)
    rows, complete = compare(candidates, settings)
    results["rows"] = [{**row, **annotate(row)} for row in rows]
    print(format_table(results["rows"]))
    if settings.json:
        write_new(settings.json, json.dumps(results, indent=2) + "\n")
    if not complete:
        print("interrupted: these are the measurements that were complete", file=sys.stderr)
    return 0 if complete else 130

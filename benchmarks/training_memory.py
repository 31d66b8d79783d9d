"""Training memory and time: bytes kept for backward, peak and time of a step, against timm's built-in and ResNet-50.

    python benchmarks/training_memory.py --json benchmarks/results/NAME.json

- kept: bytes that a training forward has allocated and not freed while only its loss is alive, from PyTorch's memory
  profiler. They count whatever keeps them: autograd, a hook, checkpointing's closures or compiled code. The forward has
  its own copies of images and labels, which count if they are kept. Parameters and buffers existed before; copies of
  them, which autocast and the compiler make, count.
- peak: growth of resident memory in one step (`VmHWM` and `VmRSS` of Linux), after a warm-up step.
- time: time of a step, in rounds over all rows, as a ratio to the built-in (or `--reference`) in the same round:
  median (min-max).

Kept and peak are measured in a process for each row, at `--batch-size`; times in one process, at `--time-batch-size`.

On CUDA (`--device cuda`), kept and peak are allocations of `torch.cuda`, all in one process; the largest batch is
measured, and a time is the mean of a few steps in a row. float16 runs without loss scaling, which does not affect
memory. A step replayed from CUDA graphs allocates nothing: its peak is the memory that PyTorch has reserved for the
graphs, and its kept bytes are unknown.
"""

import argparse
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from command_line import check_or_exit, format_command
from profiles import profile
from timm.layers import convert_splitbn_model, freeze_batch_norm_2d
from torch import Tensor, nn

from timm_tresnet.bench.comparison import REPEATS
from timm_tresnet.bench.measuring import (
    BUILTIN_PREFIX,
    DTYPES,
    choose_memory_format,
    compute_loss,
    find_largest_batch,
    make_batch,
    make_network,
    measure_kept,
    read_clock,
)
from timm_tresnet.bench.results import format_spread, start_results, write_results
from timm_tresnet.cli.options import at_least, new_file
from timm_tresnet.utils.tables import format_markdown
from timm_tresnet.variants import ARCHITECTURES

BUILTIN = "built-in"
_CLEAR_REFS = Path("/proc/self/clear_refs")


def make_builtin(model: str) -> nn.Module:
    """Make timm's built-in TResNet with the layers and widths of ours."""
    return make_network(BUILTIN_PREFIX + model)


def make_ours(recompute: str, model: str) -> nn.Module:
    """Make this package's TResNet with a setting of `recompute`."""
    return make_network(model, recompute=recompute)


def make_checkpointed(model: str) -> nn.Module:
    """Make this package's TResNet with gradient checkpointing."""
    network = make_ours("activations", model)
    network.set_grad_checkpointing()
    return network


def make_converted(convert: Callable[[nn.Module], nn.Module], model: str) -> nn.Module:
    """Make this package's TResNet with its batch norms replaced by timm's."""
    return convert(make_ours("activations", model))


def compile_apart(make: Callable[[str], nn.Module], budget: float, model: str, cuda_graphs: bool = False) -> nn.Module:
    """Compile a network with an activation memory budget; 1.0 is PyTorch's default."""

    # One backend for each network: networks of one class share compiled code, even with different budgets.
    def backend(graph: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        with torch._functorch.config.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs, config_patches={"triton.cudagraphs": cuda_graphs})

    return torch.compile(make(model), backend=backend, fullgraph=True, dynamic=False)


def make_regions(ends: str, model: str) -> nn.Module:
    """Make this package's TResNet with other ends of the compiler's regions."""
    network = make_ours("activations", model)
    for stage in (network.body.layer1, network.body.layer2, network.body.layer3, network.body.layer4):
        stage.stores_output = functools.partial(REGION_ENDS[ends], len(stage))
    return network


REGION_ENDS: dict[str, Callable[[int, int], bool]] = {  # of a stage's length and a block's position
    "body": lambda blocks, position: False,  # one region of the whole body
    "stages": lambda blocks, position: position == blocks - 1,
    "pairs": lambda blocks, position: (blocks - position) % 2 == 1,
    "blocks": lambda blocks, position: True,
}

ROWS: dict[str, Callable[[str], nn.Module]] = {  # row -> function from the model's name to the network
    "resnet50": lambda model: make_network("resnet50"),
    BUILTIN: make_builtin,
    "none": functools.partial(make_ours, "none"),
    "activations": functools.partial(make_ours, "activations"),
    "expansions": functools.partial(make_ours, "expansions"),
    "checkpointing": make_checkpointed,
}
CONVERTED_ROWS: dict[str, Callable[[str], nn.Module]] = {
    "split-bn": functools.partial(make_converted, functools.partial(convert_splitbn_model, num_splits=2)),
    "frozen-bn": functools.partial(make_converted, freeze_batch_norm_2d),
}
COMPILED = "compiled"  # prefix of a row's name; alone for the built-in
COMPILED_ROWS: dict[str, Callable[[str], nn.Module]] = {
    COMPILED: functools.partial(compile_apart, make_builtin, 1.0),
    **{f"{COMPILED}-{budget}": functools.partial(compile_apart, make_builtin, budget) for budget in (0.8, 0.5, 0.3)},
    **{
        f"{COMPILED}-{row}": functools.partial(compile_apart, ROWS[row], 1.0)
        for row in ("resnet50", "none", "activations", "expansions", "checkpointing")
    },
}
REGION_ROWS: dict[str, Callable[[str], nn.Module]] = {
    f"{COMPILED}-regions-{ends}": functools.partial(compile_apart, functools.partial(make_regions, ends), 1.0)
    for ends in REGION_ENDS
}
GRAPHS = f"{COMPILED}-graphs"  # prefix of a row's name; alone for the built-in
GRAPH_ROWS: dict[str, Callable[[str], nn.Module]] = {
    GRAPHS: functools.partial(compile_apart, make_builtin, 1.0, cuda_graphs=True),
    **{
        f"{GRAPHS}-{row}": functools.partial(compile_apart, ROWS[row], 1.0, cuda_graphs=True)
        for row in ("resnet50", "activations", "expansions", "checkpointing")
    },
}
EVERY_ROW = {**ROWS, **CONVERTED_ROWS, **COMPILED_ROWS, **REGION_ROWS, **GRAPH_ROWS}


def make_row(row: str, settings: argparse.Namespace) -> nn.Module:
    """Make the network of a row, in training mode, with the device and memory format of the settings."""
    network = EVERY_ROW[row](settings.model)
    return network.to(settings.device, memory_format=choose_memory_format(settings.channels_last)).train()


def _make_batch(size: int, settings: argparse.Namespace) -> tuple[Tensor, Tensor]:
    return make_batch(size, settings.image_size, settings.device, choose_memory_format(settings.channels_last))


def measure_peak(network: nn.Module, images: Tensor, labels: Tensor, amp: str | None = None) -> int | None:
    """Return the peak of a training step in bytes, above the memory before it; None where it cannot be read."""
    gc.collect()
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compute_loss(network, images, labels, amp).backward()
        return torch.cuda.max_memory_allocated() - before
    if not _CLEAR_REFS.exists():
        return None
    before = _read_status("VmRSS")
    _CLEAR_REFS.write_text("5")  # sets VmHWM to VmRSS
    compute_loss(network, images, labels, amp).backward()
    return _read_status("VmHWM") - before


def _read_status(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024  # in kB


def measure_reserved(network: nn.Module, images: Tensor, labels: Tensor, amp: str | None = None) -> int:
    """Return the bytes that PyTorch reserves for CUDA graphs of a training step, without gradients."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):  # warming up, recording, replaying
        network.zero_grad()
        compute_loss(network, images, labels, amp).backward()
    torch.cuda.empty_cache()
    gradients = sum(parameter.nbytes for parameter in network.parameters())
    return torch.cuda.memory_reserved() - before - gradients


def measure_network(row: str, network: nn.Module, settings: argparse.Namespace) -> dict[str, int | None]:
    """Measure kept bytes and peak of a row's network; it is compiled and warmed up afterwards."""
    images, labels = _make_batch(settings.batch_size, settings)
    if row in GRAPH_ROWS:
        return {"peak": measure_reserved(network, images, labels, settings.amp), "kept": None}
    # Warm up gradients, kernels and compiled code, which is specific to the batch size.
    compute_loss(network, images, labels, settings.amp).backward()
    memory = {"peak": measure_peak(network, images, labels, settings.amp)}
    memory["kept"] = measure_kept(network, images, labels, settings.amp)
    return memory


def measure_largest_batch(network: nn.Module, settings: argparse.Namespace, peak: int | None) -> int:
    """Find the largest batch whose training step fits, starting from an estimate by the peak at another batch."""

    def step(size: int) -> None:
        network.zero_grad()
        compute_loss(network, *_make_batch(size, settings), settings.amp).backward()

    guess = None
    if peak and settings.device == "cuda":
        limit = settings.memory_gb or torch.cuda.mem_get_info()[1] / 1e9
        guess = int((1e9 * limit - torch.cuda.memory_allocated()) * settings.batch_size / peak)
    return find_largest_batch(step, settings.max_batch, settings.memory_gb, guess)


def measure_memory(row: str, settings: argparse.Namespace) -> dict[str, int | None]:
    """Measure kept bytes and peak of a row, and on CUDA its largest batch; on the CPU in a process of its own."""
    network = make_row(row, settings)
    memory = measure_network(row, network, settings)
    if settings.max_batch and not row.startswith(COMPILED):  # compiled again for every size
        memory["largest_batch"] = measure_largest_batch(network, settings, memory["peak"])
    return memory


def measure_times(networks: dict[str, nn.Module], settings: argparse.Namespace) -> dict[str, list[float]]:
    """Measure milliseconds of a training step for each row's network and round; the rows take turns."""
    images, labels = _make_batch(settings.time_batch_size, settings)
    step_ms: dict[str, list[float]] = {row: [] for row in networks}
    for turn in range(settings.rounds + 1):
        for row, network in networks.items():
            print(f"times: round {turn} of {settings.rounds}, {row}", file=sys.stderr)
            repeats = REPEATS[settings.device] if turn else 1
            start = read_clock(settings.device)
            for _ in range(repeats):
                _step(network, images, labels, settings)
            if turn:  # round 0 is for warming up
                step_ms[row].append(1e3 * (read_clock(settings.device) - start) / repeats)
    return step_ms


def _step(network: nn.Module, images: Tensor, labels: Tensor, settings: argparse.Namespace) -> None:
    network.zero_grad()
    compute_loss(network, images, labels, settings.amp).backward()


def profile_network(row: str, network: nn.Module, settings: argparse.Namespace) -> str:
    """Return the profile of a training step of a row's network as a Markdown table."""
    images, labels = _make_batch(settings.time_batch_size, settings)
    title = f"{row}, batch {settings.time_batch_size}"
    kernels = row.startswith(COMPILED)
    if kernels and settings.device == "cpu":
        torch._inductor.config.cpp.enable_kernel_profile = True  # else they are one event
    return profile(lambda: _step(network, images, labels, settings), title, settings.device, 3, kernels)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the results."""
    words = list(sys.argv[1:] if argv is None else argv)
    settings = parse(words)
    torch.manual_seed(0)
    if settings.memory_of:
        print(json.dumps(measure_memory(settings.memory_of, settings)))
        return

    command = format_command(__file__, words)
    results = start_results(command, settings.device, settings, unrecorded=("memory_of", "rows"))
    if settings.device == "cpu" and not _CLEAR_REFS.exists():
        print(f"the peak needs Linux's {_CLEAR_REFS}, which does not exist here; its column is empty", file=sys.stderr)
    if settings.profile:
        for row in settings.rows:
            print(profile_network(row, make_row(row, settings), settings), end="\n\n", flush=True)
        return
    if settings.device == "cuda":
        memory = {row: measure_memory(row, settings) for row in settings.rows}
    else:
        memory = {row: _measure_memory_in_process(row, words) for row in settings.rows}
    step_ms = {}
    if settings.rounds:
        step_ms = measure_times({row: make_row(row, settings) for row in settings.rows}, settings)
    results["rows"] = summarize(memory, step_ms, settings.batch_size, settings.reference)
    print(format_table(results["rows"]))
    if settings.json:
        write_results(results, settings.json)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse and check the options; a mistake ends the process."""
    every_row = list(EVERY_ROW)
    parser = argparse.ArgumentParser(
        description="Training memory and time: bytes kept for backward, peak of a step, step time."
    )
    parser.add_argument("--model", choices=list(ARCHITECTURES), default="tresnet_m")
    parser.add_argument("--rows", nargs="+", choices=every_row, default=list(ROWS), help=f"default: {', '.join(ROWS)}")
    parser.add_argument("--compile", action="store_true", help="add the compiled rows, which take minutes each")
    parser.add_argument(
        "--reference", choices=every_row, default=BUILTIN, help=f"reference of ratios (default: {BUILTIN})"
    )
    parser.add_argument("--image-size", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--batch-size", type=at_least(1), default=32, help="batch size for kept and peak")
    parser.add_argument("--time-batch-size", type=at_least(1), default=8)
    parser.add_argument("--rounds", type=at_least(0), default=7, help="rounds of times; 0 for no times")
    parser.add_argument("--amp", choices=list(DTYPES), help="autocast to this dtype; float16 on CUDA only")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--max-batch", type=at_least(0), help="CUDA: upper end of the search for the largest batch; 0: none"
    )
    parser.add_argument(
        "--memory-gb", type=at_least(0, float), metavar="GB", help="CUDA: memory limit of it (default: the GPU's)"
    )
    parser.add_argument("--profile", action="store_true", help="print profiles only")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="file for the results, must not exist yet")
    parser.add_argument("--memory-of", choices=every_row, help=argparse.SUPPRESS)  # for the process of a row
    settings = parser.parse_args(words)

    if settings.profile and settings.json:
        parser.error("--profile only prints tables; leave out --json")
    if settings.image_size < 64 or settings.image_size % 4:
        parser.error(f"--image-size needs a multiple of 4 from 64 on, got {settings.image_size}")
    check_or_exit(parser, settings)
    if settings.device == "cpu" and not GRAPH_ROWS.keys().isdisjoint([*settings.rows, settings.memory_of]):
        parser.error(f"rows that begin with {GRAPHS} use CUDA graphs and need --device cuda")
    settings.rows = list(dict.fromkeys([*settings.rows, *(COMPILED_ROWS if settings.compile else ())]))
    return settings


def _measure_memory_in_process(row: str, words: Sequence[str]) -> dict[str, int | None]:
    print(f"memory: {row}", file=sys.stderr)
    command = [sys.executable, __file__, "--memory-of", row, *words]
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "262144",  # glibc keeps smaller freed blocks, which would stay in VmRSS
    }
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        sys.exit(f"The process that measures {row} ended with status {process.returncode}; its message is above")
    return json.loads(process.stdout.splitlines()[-1])


def summarize(
    memory: dict[str, dict[str, int | None]], step_ms: dict[str, list[float]], batch_size: int, reference: str = BUILTIN
) -> list[dict[str, Any]]:
    """Return rows of the results: megabytes (1e6 bytes) an image, milliseconds, and ratios to the reference.

    Args:
        memory: results of `measure_memory` by row.
        step_ms: result of `measure_times`; empty without times.
        batch_size: images in a batch of `memory`.
        reference: reference row of the ratios; without it, there are no ratios.
    """
    rows = []
    for name, measured in memory.items():
        row: dict[str, Any] = {"row": name}
        for quantity in ("kept", "peak"):
            own, other = measured[quantity], memory.get(reference, {}).get(quantity)
            row[f"{quantity}_mb"] = None if own is None else own / batch_size / 1e6
            row[f"{quantity}_ratio"] = None if own is None or not other else own / other
        if step_ms:
            row["step_ms"] = step_ms[name]
        if reference in step_ms:
            row["step_ratios"] = [own / other for own, other in zip(step_ms[name], step_ms[reference], strict=True)]
        if "largest_batch" in measured:
            row["largest_batch"] = measured["largest_batch"]
        rows.append(row)
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of the results as a Markdown table."""
    titles = ["", "kept for backward, MB an image", "peak of a step, MB an image", "time of a step", "largest batch"]
    table = []
    for row in rows:
        cells = [row["row"]]
        for quantity in ("kept", "peak"):
            value, ratio = row[f"{quantity}_mb"], row[f"{quantity}_ratio"]
            cells.append("" if value is None else f"{value:.1f}" + ("" if ratio is None else f" ({ratio:.2f}x)"))
        ratios = row.get("step_ratios")
        if ratios:
            cells.append(format_spread(ratios))
        else:
            cells.append(f"{statistics.median(row['step_ms']):.0f} ms" if "step_ms" in row else "")
        cells.append(str(row.get("largest_batch", "")))
        table.append(cells)
    columns = len(titles) if any("largest_batch" in row for row in rows) else -1
    return format_markdown(titles[:columns], [cells[:columns] for cells in table])


if __name__ == "__main__":
    main()

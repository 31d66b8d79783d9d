"""What training keeps for backward, what a step peaks at and what it costs, against timm's built-in and ResNet-50.

    python benchmarks/training_memory.py --json benchmarks/results/NAME.json

- kept: bytes that a training forward has allocated and not freed again while only its loss is held. The allocator is
  asked (PyTorch's memory profiler), so it does not matter who keeps them: autograd, a hook, checkpointing's closures or
  compiled code. The forward gets its own copies of images and labels, which count if they are kept. Parameters and
  buffers were there before; copies of them, as autocast and the compiler make, are kept and count.
- peak: resident memory over one step above that before it (`VmHWM` and `VmRSS` of Linux), after a step for warming up.
- time: a step, in rounds over all rows, as a ratio to the built-in (or `--reference`) in the same round:
  median (min-max).

Kept and peak are taken in a process for each row, at `--batch-size`; times in one process, at `--time-batch-size`.

On CUDA (`--device cuda`), kept and peak are what `torch.cuda` has allocated, all in one process, the largest batch that
fits is looked for, and a time is the mean of a few steps in a row. float16 runs without loss scaling, on which memory
does not depend. A step that is replayed from CUDA graphs allocates nothing: its peak is the memory that PyTorch has
reserved for the graphs, and what it keeps is not known.
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
    """The built-in TResNet with the layers and widths of ours."""
    return make_network(BUILTIN_PREFIX + model)


def make_ours(recompute: str, model: str) -> nn.Module:
    """This package's TResNet with a setting of `recompute`."""
    return make_network(model, recompute=recompute)


def make_checkpointed(model: str) -> nn.Module:
    """This package's TResNet with every block recomputed in backward."""
    network = make_ours("activations", model)
    network.set_grad_checkpointing()
    return network


def make_converted(convert: Callable[[nn.Module], nn.Module], model: str) -> nn.Module:
    """This package's TResNet with its batch norms replaced by timm's."""
    return convert(make_ours("activations", model))


def compile_apart(make: Callable[[str], nn.Module], budget: float, model: str, cuda_graphs: bool = False) -> nn.Module:
    """A network, compiled with an activation memory budget; 1.0 is PyTorch's default."""

    # A backend for each network, because networks of one class share what is compiled, whatever the budget is by then.
    def backend(graph: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        with torch._functorch.config.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs, config_patches={"triton.cudagraphs": cuda_graphs})

    return torch.compile(make(model), backend=backend, fullgraph=True, dynamic=False)


def make_regions(ends: str, model: str) -> nn.Module:
    """This package's TResNet, whose regions for the compiler end elsewhere than they do."""
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

ROWS: dict[str, Callable[[str], nn.Module]] = {  # row -> what makes the network, from the model's name
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
COMPILED = "compiled"  # before the name of a row, or alone for the built-in
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
GRAPHS = f"{COMPILED}-graphs"  # before the name of a row, or alone for the built-in
GRAPH_ROWS: dict[str, Callable[[str], nn.Module]] = {
    GRAPHS: functools.partial(compile_apart, make_builtin, 1.0, cuda_graphs=True),
    **{
        f"{GRAPHS}-{row}": functools.partial(compile_apart, ROWS[row], 1.0, cuda_graphs=True)
        for row in ("resnet50", "activations", "expansions", "checkpointing")
    },
}
EVERY_ROW = {**ROWS, **CONVERTED_ROWS, **COMPILED_ROWS, **REGION_ROWS, **GRAPH_ROWS}


def make_row(row: str, settings: argparse.Namespace) -> nn.Module:
    """The network of a row, in training mode, on the device and in the memory format of the settings."""
    network = EVERY_ROW[row](settings.model)
    return network.to(settings.device, memory_format=choose_memory_format(settings.channels_last)).train()


def _make_batch(size: int, settings: argparse.Namespace) -> tuple[Tensor, Tensor]:
    return make_batch(size, settings.image_size, settings.device, choose_memory_format(settings.channels_last))


def measure_peak(network: nn.Module, images: Tensor, labels: Tensor, amp: str | None = None) -> int | None:
    """Bytes that a training step takes at most on top of what the process has; None where they cannot be read."""
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
    """Bytes that PyTorch reserves for CUDA graphs of a training step, gradients left out as in the peak."""
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
    """Bytes kept and peak of a row's network, whose compiled code is there afterwards."""
    images, labels = _make_batch(settings.batch_size, settings)
    if row in GRAPH_ROWS:
        return {"peak": measure_reserved(network, images, labels, settings.amp), "kept": None}
    # For gradients, kernels and compiled code to be there; of the same size, which compiled code is made for.
    compute_loss(network, images, labels, settings.amp).backward()
    memory = {"peak": measure_peak(network, images, labels, settings.amp)}
    memory["kept"] = measure_kept(network, images, labels, settings.amp)
    return memory


def measure_largest_batch(network: nn.Module, settings: argparse.Namespace, peak: int | None) -> int:
    """Largest batch whose training step fits, looked for from where the peak at another batch says it is."""

    def step(size: int) -> None:
        network.zero_grad()
        compute_loss(network, *_make_batch(size, settings), settings.amp).backward()

    guess = None
    if peak and settings.device == "cuda":
        limit = settings.memory_gb or torch.cuda.mem_get_info()[1] / 1e9
        guess = int((1e9 * limit - torch.cuda.memory_allocated()) * settings.batch_size / peak)
    return find_largest_batch(step, settings.max_batch, settings.memory_gb, guess)


def measure_memory(row: str, settings: argparse.Namespace) -> dict[str, int | None]:
    """Bytes kept and peak of a row, on CUDA its largest batch too; on the CPU for a process of its own."""
    network = make_row(row, settings)
    memory = measure_network(row, network, settings)
    if settings.max_batch and not row.startswith(COMPILED):  # these would be compiled for every size tried
        memory["largest_batch"] = measure_largest_batch(network, settings, memory["peak"])
    return memory


def measure_times(networks: dict[str, nn.Module], settings: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of a training step, for each row's network and each round; the rows take turns."""
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
    """Where the time of a training step of a row's network goes, as a Markdown table."""
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
        print(f"the peak needs {_CLEAR_REFS} of Linux, which is not here: its column stays empty", file=sys.stderr)
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
    """Options from a command line, checked; a mistake ends the process."""
    every_row = list(EVERY_ROW)
    parser = argparse.ArgumentParser(
        description="What training keeps for backward, what a step peaks at and what it costs."
    )
    parser.add_argument("--model", choices=list(ARCHITECTURES), default="tresnet_m")
    parser.add_argument("--rows", nargs="+", choices=every_row, default=list(ROWS), help=f"default: {', '.join(ROWS)}")
    parser.add_argument("--compile", action="store_true", help="add the compiled rows, which take minutes each")
    parser.add_argument("--reference", choices=every_row, default=BUILTIN, help=f"of ratios (default: {BUILTIN})")
    parser.add_argument("--image-size", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--batch-size", type=at_least(1), default=32, help="for kept and peak")
    parser.add_argument("--time-batch-size", type=at_least(1), default=8)
    parser.add_argument("--rounds", type=at_least(0), default=7, help="for the times; 0 to leave them out")
    parser.add_argument("--amp", choices=list(DTYPES), help="autocast to this dtype; float16 on CUDA only")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--max-batch", type=at_least(0), help="CUDA: where to end the search for the largest batch; 0: none"
    )
    parser.add_argument(
        "--memory-gb", type=at_least(0, float), metavar="GB", help="CUDA: limit for it (default: what the GPU has)"
    )
    parser.add_argument("--profile", action="store_true", help="print where the time goes, measure nothing else")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="file for the results, must not exist yet")
    parser.add_argument("--memory-of", choices=every_row, help=argparse.SUPPRESS)  # what the process of a row is told
    settings = parser.parse_args(words)

    if settings.profile and settings.json:
        parser.error("--profile prints a table and has nothing for --json")
    if settings.image_size < 64 or settings.image_size % 4:
        parser.error(f"--image-size needs a multiple of 4 from 64 on, got {settings.image_size}")
    check_or_exit(parser, settings)
    if settings.device == "cpu" and not GRAPH_ROWS.keys().isdisjoint([*settings.rows, settings.memory_of]):
        parser.error(f"rows that begin with {GRAPHS} need --device cuda, as CUDA graphs do")
    settings.rows = list(dict.fromkeys([*settings.rows, *(COMPILED_ROWS if settings.compile else ())]))
    return settings


def _measure_memory_in_process(row: str, words: Sequence[str]) -> dict[str, int | None]:
    print(f"memory: {row}", file=sys.stderr)
    command = [sys.executable, __file__, "--memory-of", row, *words]
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "262144",  # glibc keeps smaller blocks when they are freed, and VmRSS with them
    }
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        sys.exit(f"The process that measures {row} ended with status {process.returncode}; its message is above")
    return json.loads(process.stdout.splitlines()[-1])


def summarize(
    memory: dict[str, dict[str, int | None]], step_ms: dict[str, list[float]], batch_size: int, reference: str = BUILTIN
) -> list[dict[str, Any]]:
    """Rows of the results: megabytes (1e6 bytes) an image, milliseconds, and ratios to the reference if it is a row.

    Args:
        memory: what `measure_memory` returns, by row.
        step_ms: what `measure_times` returns; empty if times are left out.
        batch_size: images in a batch of `memory`.
        reference: row that the ratios are to.
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
    """Rows of the results as a Markdown table."""
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

"""What training keeps for backward, what a step peaks at and what it costs, against timm's built-in and ResNet-50.

    python benchmarks/training_memory.py --json benchmarks/results/training_memory.json

- kept: bytes of the storages that a training forward allocates and that are alive while only the loss is held, and the
  image itself; parameters and buffers are not counted.
- peak: resident memory over one step above that before it (`VmHWM` and `VmRSS` of Linux), a process for each row.
- time: a whole step, in rounds over all rows, each as a ratio to the built-in in the same round; median (min-max).

On CUDA (`--device cuda`), peak is `torch.cuda.max_memory_allocated`; that path has not been run on a GPU yet.
"""

import argparse
import datetime
import functools
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import timm.models.tresnet
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BUILTIN = "timm's built-in"
MODELS = ("tresnet_m", "tresnet_l", "tresnet_xl", "tresnet_v2_l")


def make_checkpointed(model: str) -> nn.Module:
    """Ours, with every block recomputed in backward."""
    network = timm.create_model(model)
    network.set_grad_checkpointing()
    return network


ROWS: dict[str, Callable[[str], nn.Module]] = {  # row -> function that makes the network, from the model's name
    "resnet50": lambda model: timm.create_model("resnet50"),
    BUILTIN: lambda model: getattr(timm.models.tresnet, model)(),
    "none": functools.partial(timm.create_model, rebuild="none"),
    "activations": functools.partial(timm.create_model, rebuild="activations"),
    "expansions": functools.partial(timm.create_model, rebuild="expansions"),
    "checkpointing": make_checkpointed,
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations inside have allocated and that are still alive."""

    def __init__(self, ignored: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignored}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes and storage._cdata not in self._ignored:
                    self._sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._sizes.pop, storage._cdata, None)
        return result

    @property
    def total(self) -> int:
        """Bytes alive now."""
        gc.collect()
        return sum(self._sizes.values())


def make_batch(batch_size: int, image_size: int, device: str) -> tuple[Tensor, Tensor]:
    """Seeded images (N, 3, H, W) and labels (N,)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, image_size, image_size, generator=generator)
    return images.to(device), torch.randint(0, 1000, (batch_size,), generator=generator).to(device)


def compute_loss(network: nn.Module, batch: tuple[Tensor, Tensor], amp: bool) -> Tensor:
    """Loss of a training forward, with bfloat16 autocast if asked for."""
    with torch.autocast(batch[0].device.type, dtype=torch.bfloat16, enabled=amp):
        return F.cross_entropy(network(batch[0]).float(), batch[1])


def measure_kept(network: nn.Module, batch: tuple[Tensor, Tensor], amp: bool = False) -> int:
    """Bytes that a training forward keeps for backward, the images among them.

    Args:
        network: takes images (N, 3, H, W); is put into training mode.
        batch: images and labels.
        amp: whether to run under bfloat16 autocast.
    """
    network.train()
    with LiveBytes(ignored=[*network.parameters(), *network.buffers(), *batch]) as live:
        loss = compute_loss(network, batch, amp)
        kept = live.total
    del loss
    return kept + batch[0].untyped_storage().nbytes()


def measure_peak(network: nn.Module, batch: tuple[Tensor, Tensor], amp: bool) -> int | None:
    """Bytes that one training step needs on top of what the process has; None where they cannot be read."""
    network.train()
    compute_loss(network, tuple(part[:2] for part in batch), amp).backward()  # gradients and kernels are there after it
    gc.collect()
    if batch[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compute_loss(network, batch, amp).backward()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    before = _read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    compute_loss(network, batch, amp).backward()
    return _read_status("VmHWM") - before


def _read_status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure_times(networks: dict[str, nn.Module], batch: tuple[Tensor, Tensor], rounds: int, amp: bool) -> Any:
    """Seconds of a step, for each network and round; the networks take turns."""
    seconds: dict[str, list[float]] = {row: [] for row in networks}
    for turn in range(rounds + 1):
        for row, network in networks.items():
            network.zero_grad()
            start = time.perf_counter()
            compute_loss(network.train(), batch, amp).backward()
            if batch[0].is_cuda:
                torch.cuda.synchronize()
            if turn:  # the first is for warming up
                seconds[row].append(time.perf_counter() - start)
        print(f"\rtimes: round {turn} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return seconds


def describe_machine(device: str) -> dict[str, Any]:
    """Hardware and versions, as they stand in the results."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
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
            "torch": torch.__version__,
            "timm": timm.__version__,
            "timm_tresnet": version("timm-tresnet"),
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description="What training keeps, peaks at and costs.")
    parser.add_argument("--model", choices=MODELS, default="tresnet_m")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--image-size", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--batch-size", type=int, default=32, help="for the peak")
    parser.add_argument("--time-batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7, help="for the times; 0 to leave them out")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="file for the results, must not exist yet")
    parser.add_argument("--peak-of", choices=list(ROWS), help=argparse.SUPPRESS)  # the process of one row
    arguments = parser.parse_args(argv)
    if arguments.json and arguments.json.exists():
        parser.error(f"{arguments.json} exists already; results are never overwritten, name a new file")
    torch.manual_seed(0)
    if arguments.peak_of:
        network = ROWS[arguments.peak_of](arguments.model).to(arguments.device)
        batch = make_batch(arguments.batch_size, arguments.image_size, arguments.device)
        print(json.dumps(measure_peak(network, batch, arguments.amp)))
        return

    networks = {row: ROWS[row](arguments.model).to(arguments.device) for row in arguments.rows}
    small = make_batch(2, arguments.image_size, arguments.device)
    rows = []
    for row, network in networks.items():
        print(f"memory: {row}", file=sys.stderr)
        peak = _peak_in_process(row, arguments)
        kept = measure_kept(network, small, arguments.amp) / 2
        rows.append({"row": row, "kept_mb": kept / 1e6, "peak_mb": peak and peak / arguments.batch_size / 1e6})
    if arguments.rounds:
        batch = make_batch(arguments.time_batch_size, arguments.image_size, arguments.device)
        seconds = measure_times(networks, batch, arguments.rounds, arguments.amp)
        for row in rows:
            row["step_ms"] = 1e3 * statistics.median(seconds[row["row"]])
            if BUILTIN in seconds:
                pairs = zip(seconds[row["row"]], seconds[BUILTIN], strict=True)
                row["step_ratios"] = [own / builtin for own, builtin in pairs]
    words = ["python", "benchmarks/training_memory.py", *(sys.argv[1:] if argv is None else argv)]
    results = {
        "command": shlex.join(words),
        "date": datetime.date.today().isoformat(),
        **describe_machine(arguments.device),
        "settings": {name: value for name, value in vars(arguments).items() if name not in ("json", "peak_of", "rows")},
        "rows": rows,
    }
    print(format_table(results))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        unfinished = arguments.json.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(results, indent=2) + "\n")
        os.replace(unfinished, arguments.json)


def _peak_in_process(row: str, arguments: argparse.Namespace) -> int | None:
    command = [sys.executable, __file__, "--peak-of", row, "--model", arguments.model, "--device", arguments.device]
    command += ["--image-size", str(arguments.image_size), "--batch-size", str(arguments.batch_size)]
    command += ["--amp"] if arguments.amp else []
    # Without the threshold, glibc keeps freed blocks, and resident memory says little about what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout)


def format_table(results: dict[str, Any]) -> str:
    """Results as a Markdown table, with the machine above it."""
    builtin = next((row for row in results["rows"] if row["row"] == BUILTIN), {})

    def against_builtin(row: dict[str, Any], field: str) -> str:
        if row[field] is None:
            return ""
        ratio = f" ({row[field] / builtin[field]:.2f}x)" if builtin.get(field) else ""
        return f"{row[field]:.1f}{ratio}"

    lines = [
        f"{results['settings']['model']}, {results['date']}: {results['command']}",
        ", ".join(f"{name} {value}" for name, value in {**results["hardware"], **results["versions"]}.items()),
        "",
        "| | kept for backward, MB an image | peak of a step, MB an image | step time |",
        "|---|---|---|---|",
    ]
    for row in results["rows"]:
        ratios = row.get("step_ratios")
        spread = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else ""
        kept, peak = against_builtin(row, "kept_mb"), against_builtin(row, "peak_mb")
        lines.append(f"| {row['row']} | {kept} | {peak} | {spread} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

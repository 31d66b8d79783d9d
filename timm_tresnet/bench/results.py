"""Results of a measurement: the machine's description and a JSON file."""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from timm_tresnet.utils.files import atomic_write


def describe_machine(device: str) -> dict[str, dict[str, Any]]:
    """Return hardware and versions for the results."""
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
            "torch": torch.__version__,  # includes the build, unlike the package's metadata
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
    """Make and print the head of the results: command, date, machine and settings; without rows.

    Args:
        command: the command to record.
        device: see `describe_machine`.
        settings: all options.
        unrecorded: options to leave out besides `json`, such as local folders.
        packages: further packages whose versions are recorded if they are installed.
    """
    machine = describe_machine(device)
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            machine["versions"][name] = importlib.metadata.version(name)
    recorded = {name: value for name, value in vars(settings).items() if name not in ("json", *unrecorded)}
    today = datetime.date.today().isoformat()
    results = {"command": command, "date": today, **machine, "settings": recorded, "rows": []}
    where = ", ".join(f"{name} {value}" for name, value in {**machine["hardware"], **machine["versions"]}.items())
    print(f"{today}: {command}\n{where}\n", flush=True)
    return results


def format_spread(values: Sequence[float]) -> str:
    """Format median and range of ratios; "" for none."""
    return f"{statistics.median(values):.2f}x ({min(values):.2f}-{max(values):.2f})" if values else ""


def write_results(results: dict[str, Any], path: Path) -> None:
    """Write results as a JSON file, atomically.

    Raises:
        FileExistsError: if the file exists; the message says where the results are.
    """
    with atomic_write(path, overwrite=False) as unfinished:
        unfinished.write_text(json.dumps(results, indent=2) + "\n")

"""What a measurement leaves: a line about where it ran, and a file of results."""

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

from timm_tresnet.utils.files import whole


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
    """Median and range of ratios, empty for none."""
    return f"{statistics.median(values):.2f}x ({min(values):.2f}-{max(values):.2f})" if values else ""


def write_results(results: dict[str, Any], path: Path) -> None:
    """Write a JSON file that appears whole or not at all.

    Raises:
        FileExistsError: if there is one of that name; says where the results are.
    """
    with whole(path, overwrite=False) as unfinished:
        unfinished.write_text(json.dumps(results, indent=2) + "\n")

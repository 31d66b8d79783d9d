"""Profile a network with PyTorch's profiler."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType

from timm_tresnet.bench.measuring import run_profiler
from timm_tresnet.utils.tables import format_markdown

_LONGEST = 100  # characters of a name
_COMPILED = re.compile(r"graph_\d+_cpp_")  # the compiler's kernels on a CPU
_CONVOLUTION = re.compile(r"aten::\w*convolution")


def profile(run: Callable[[], object], title: str, device: str, repeats: int = 10, kernels: bool = False) -> str:
    """Return a Markdown table of the slowest operations of a run, with their milliseconds on the device.

    Where the compiler's kernels on a CPU are among them, two sums come first.

    Args:
        run: the function to profile.
        title: title of the table.
        device: "cpu" or "cuda".
        repeats: measured runs, after three for warm-up.
        kernels: list a GPU's kernels instead of PyTorch's operations; compiled code has few operations.
    """
    for _ in range(3):
        run()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with run_profiler(activities=activities) as profiler:
        for _ in range(repeats):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
    own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = profiler.key_averages()
    if device == "cuda":  # events include a GPU's kernels besides the operations that launch them
        events = [event for event in events if (_is_kernel(event) if kernels else event.key.startswith("aten::"))]
    times = {event.key[:_LONGEST]: 0.0 for event in events}  # names of C++ kernels are several lines long
    for event in events:
        times[event.key[:_LONGEST]] += getattr(event, own) / 1e3 / repeats  # us to ms
    total = sum(times.values())
    slowest = sorted(times.items(), key=lambda item: -item[1])[:10]
    compiled = {key: time_ms for key, time_ms in times.items() if _COMPILED.match(key)}
    if compiled:
        slowest.insert(0, (f"all {len(compiled)} kinds of the compiler's kernels", sum(compiled.values())))
        convolutions = sum(time_ms for key, time_ms in times.items() if _CONVOLUTION.match(key))
        slowest.insert(0, ("all convolutions, forward and backward", convolutions))
    rows = [[key, f"{time_ms:.2f}", f"{time_ms / total:.1%}"] for key, time_ms in slowest]
    return format_markdown([title, f"ms of {total:.1f}", "share"], rows)


def _is_kernel(event: Any) -> bool:
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation

"""Where the time of a network goes, by PyTorch's profiler."""

from collections.abc import Callable

import torch

from timm_tresnet.bench.measuring import run_profiler
from timm_tresnet.utils.tables import format_markdown


def profile(run: Callable[[], object], title: str, device: str, repeats: int = 10) -> str:
    """Milliseconds of a run on the device, and the operations that take the most of them, as a Markdown table."""
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
    # A GPU's kernels stand there by themselves too, besides the operations that they belong to.
    events = [event for event in profiler.key_averages() if event.key.startswith("aten::") or device == "cpu"]
    times = {event.key: getattr(event, own) / 1e3 / repeats for event in events}  # us to ms
    total = sum(times.values())
    slowest = sorted(times.items(), key=lambda item: -item[1])[:10]
    rows = [[key, f"{time_ms:.2f}", f"{time_ms / total:.1%}"] for key, time_ms in slowest]
    return format_markdown([title, f"ms of {total:.1f}", "share"], rows)

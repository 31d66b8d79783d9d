"""Measure one network: size, operations, memory stored for backward, and the largest batch that fits."""

import copy
import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import timm
import timm.models.tresnet
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from timm_tresnet.utils.names import suggest
from timm_tresnet.variants import ARCHITECTURES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
BUILTIN_PREFIX = "built-in:"
_CLASSES = 1000
# timm's built-in TResNet has only these arguments.
_BUILTIN = {name: row for name, row in ARCHITECTURES.items() if row.keys() <= {"layers", "width_factor", "v2"}}


def make_network(name: str, **kwargs: Any) -> nn.Module:
    """Make a network with random weights for 1000 classes.

    Args:
        name: a name for `timm.create_model`; with the prefix "built-in:", timm's own TResNet.
        kwargs: further arguments of the model.

    Raises:
        ValueError: if timm does not know the model, or has no such TResNet.
    """
    variant = name.removeprefix(BUILTIN_PREFIX)
    if variant != name:
        if variant not in _BUILTIN:
            raise ValueError(
                f"{name}: a built-in model needs to be one of {', '.join(_BUILTIN)}, got {variant!r}"
                f"{suggest(variant, _BUILTIN)}"
            )
        return timm.models.tresnet.TResNet(num_classes=_CLASSES, **_BUILTIN[variant], **kwargs)
    if not timm.is_model(name.partition(".")[0]):
        meant = suggest(name, timm.list_models(), limit=3)
        raise ValueError(f"timm knows no model {name!r}{meant or '; see timm.list_models()'}")
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:  # an unknown tag
        meant = suggest(name, timm.list_models(f"{name.partition('.')[0]}.*", include_tags=True), limit=3)
        raise ValueError(f"timm knows no weights {name!r}{meant}") from error
    return timm.create_model(name, num_classes=_CLASSES, **kwargs)


def choose_memory_format(channels_last: bool) -> torch.memory_format:
    """Return the memory format for `--channels-last`."""
    return torch.channels_last if channels_last else torch.contiguous_format


def read_clock(device: str) -> float:
    """Return the time in seconds, after the device has finished all of its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def make_batch(
    size: int, image_size: int, device: str, memory_format: torch.memory_format = torch.contiguous_format
) -> tuple[Tensor, Tensor]:
    """Make seeded images (N, 3, H, W) and labels (N,) on the device."""
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(size, 3, image_size, image_size, generator=generator, device=device)
    labels = torch.randint(0, _CLASSES, (size,), generator=generator, device=device)
    return images.contiguous(memory_format=memory_format), labels


def autocast(device: str, amp: str | None) -> torch.autocast:
    """Return autocast to a dtype, a key of DTYPES; disabled for None."""
    return torch.autocast(device, dtype=DTYPES[amp] if amp else torch.bfloat16, enabled=amp is not None)


def compute_loss(network: nn.Module, images: Tensor, labels: Tensor, amp: str | None = None) -> Tensor:
    """Compute the cross-entropy loss of a forward under autocast to amp, a key of DTYPES; None for no autocast."""
    with autocast(images.device.type, amp):
        return F.cross_entropy(network(images).float(), labels)


@contextmanager
def run_profiler(**kwargs: Any) -> Iterator[torch.profiler.profile]:
    """PyTorch's profiler, without its log lines on stderr.

    Args:
        kwargs: arguments of `torch.profiler.profile`.
    """
    chosen = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = chosen or "6"  # read when the first profiler of the process starts
    try:
        with torch.profiler.profile(**kwargs) as profiler:
            yield profiler
    finally:
        if chosen is None:
            del os.environ["KINETO_LOG_LEVEL"]


def measure_kept(network: nn.Module, images: Tensor, labels: Tensor, amp: str | None = None) -> int:
    """Return the bytes that a training forward keeps while its loss is alive, including the loss.

    Args:
        network: network from images to logits (N, classes); in training mode, and warmed up if it is compiled.
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
    with run_profiler(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = compute_loss(network, images.clone(), labels.clone(), amp)
        gc.collect()
    del loss  # only after the profile, so that no freed bytes are counted
    return sum(event.self_cpu_memory_usage for event in profiler.events())


def count_flops(network: nn.Module, image_size: int, in_chans: int = 3) -> int:
    """Count floating-point operations for one image, two for a multiply-add. Moves the network to the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.to("meta")(torch.empty(1, in_chans, image_size, image_size, device="meta"))
    return counter.get_total_flops()


def measure_size(network: nn.Module, image_size: int) -> dict[str, float]:
    """Return millions of parameters and, for one image, billions of multiply-adds and millions of activations.

    Activations are output values of convolutions and linear layers, as in timm's tables.
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


def find_largest_batch(
    step: Callable[[int], object], max_batch: int, memory_gb: float | None = None, guess: int | None = None
) -> int:
    """Find the largest batch size whose step fits into the GPU's memory, by bisection, to one percent.

    cuDNN's benchmark mode is off meanwhile; it would take minutes for each size.

    Args:
        step: runs a step with the given batch size.
        max_batch: largest size to try.
        memory_gb: memory that PyTorch may allocate, in gigabytes (1e9 bytes); None for all of the GPU's.
        guess: first size to try, since every new size costs cuDNN seconds; None for half of max_batch.
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
            else:  # away from the guess in growing steps
                size = int(fits * (1 + stride)) if fits else int(fails * (1 - stride))
                stride = min(2 * stride, 0.5)
    finally:
        torch.backends.cudnn.benchmark = tries_algorithms
        if memory_gb is not None:
            torch.cuda.set_per_process_memory_fraction(1.0)
    return fits


def compute_largest_batch(params_m: float, kept_mb: float, memory_gb: float) -> int:
    """Estimate the largest batch size from the bytes stored for backward.

    Float32 weights, gradients and momentum take 12 bytes a parameter besides. The result is an upper bound: a step's
    peak is above its stored bytes.

    Args:
        params_m: millions of parameters.
        kept_mb: memory stored for backward, in megabytes (1e6 bytes) an image.
        memory_gb: memory limit, in gigabytes (1e9 bytes).
    """
    return max(0, int((memory_gb * 1e3 - 12 * params_m) / kept_mb))

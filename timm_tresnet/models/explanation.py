"""Explain which parts of a network are recomputed, why others are not, and how much memory each part stores."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_tresnet.recompute.stage import Body, Stage, observers
from timm_tresnet.utils.tables import format_markdown


class Part(NamedTuple):
    """Memory that a part of a network stores for backward.

    Args:
        name: name of the module; a stage includes all of its blocks.
        reason: why nothing in the part is recomputed; None if something is.
        stored_mb: megabytes (1e6 bytes) an image that the part stores.
        plain_mb: megabytes an image that the part stores in plain PyTorch.
    """

    name: str
    reason: str | None
    stored_mb: float
    plain_mb: float


class _Meter(TorchDispatchMode):
    """Counts bytes of live tensors, by the module that was running when they were created."""

    only_looks = True  # a mode that observes only; recomputation stays active

    def __init__(self, own: list[Tensor]) -> None:
        super().__init__()
        self.reasons: dict[nn.Module, str | None] = {}
        self.sizes: dict[nn.Module | None, int] = {}
        self._current: nn.Module | None = None
        self._own = [tensor.untyped_storage() for tensor in own]
        self._seen = {storage._cdata for storage in self._own}

    def enter(self, module: nn.Module, reason: str | None) -> None:
        self._current = module
        self.reasons[module] = 'recompute="none"' if reason == "" else reason

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), self._current)
        return result

    def _add(self, storage: torch.UntypedStorage, module: nn.Module | None) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.sizes[module] = self.sizes.get(module, 0) + size
            weakref.finalize(storage, self._drop, key, size, module)

    def _drop(self, key: int, size: int, module: nn.Module | None) -> None:
        self._seen.discard(key)
        self.sizes[module] -= size


def explain(network: nn.Module, images: Tensor) -> list[Part]:
    """Run a network forward twice, with and without recomputation, and compare the memory that each part stores.

    Running statistics and the random state are restored afterwards.

    Args:
        network: a TResNet, in the mode to explain.
        images: (N, C, H, W).
    """
    reasons, stored = _measure(network, images)
    with _storing_everything(network):
        _, plain = _measure(network, images)
    parts: list[Part] = []
    for name, module in network.named_modules():
        if module in reasons:
            megabytes = (sizes.get(module, 0) / images.shape[0] / 1e6 for sizes in (stored, plain))
            parts.append(Part(name, reasons[module], *megabytes))
    for name, module in network.named_modules():
        blocks = [part for part in parts if part.name.startswith(f"{name}.")] if isinstance(module, Stage) else []
        if blocks:
            whole = [part for part in parts if part.name == name or part in blocks]
            reason = None if any(part.reason is None for part in blocks) else "none of its blocks is recomputed"
            total = Part(name, reason, sum(part.stored_mb for part in whole), sum(part.plain_mb for part in whole))
            parts = [part for part in parts if part.name != name]
            parts.insert(parts.index(blocks[0]), total)
    return parts


def format_parts(parts: list[Part]) -> str:
    """Format the result of `explain` as a table."""
    rows = [
        [
            part.name,
            "yes" if part.reason is None else f"no: {part.reason}",
            f"{part.stored_mb:.2f}",
            f"{part.plain_mb:.2f}",
        ]
        for part in parts
    ]
    return format_markdown(["", "recomputed", "stored, MB an image", "plain PyTorch, MB an image"], rows)


def _measure(network: nn.Module, images: Tensor) -> tuple[dict[nn.Module, str | None], dict[nn.Module | None, int]]:
    """Return reasons and stored bytes by module."""
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    meter = _Meter([images, *network.parameters(), *network.buffers()])
    observers.append(meter.enter)
    devices = [images.device] if images.is_cuda else []
    try:
        with torch.random.fork_rng(devices), torch.enable_grad(), meter:
            output = network(images)
        sizes = dict(meter.sizes)  # while the output's graph is alive
        del output
    finally:
        observers.remove(meter.enter)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return meter.reasons, sizes


@contextmanager
def _storing_everything(network: nn.Module) -> Iterator[None]:
    bodies = [module for module in network.modules() if isinstance(module, Body)]
    before = [(body, dict(body.__dict__)) for body in bodies]
    for body in bodies:
        body.recompute = "none"
        if isinstance(body, Stage):
            body.grad_checkpointing = False
    try:
        yield
    finally:
        for body, fields in before:
            body.__dict__.update(fields)

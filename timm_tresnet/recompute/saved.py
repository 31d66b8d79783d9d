"""What stands for a tensor that autograd has saved: the tensor itself, or how it is made again."""

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_is_grad_enabled, _is_autocast_enabled = torch.is_grad_enabled, torch._C._is_any_autocast_enabled
_get_pass = torch._C._current_graph_task_id  # -1 outside of backward passes


class Kept:
    """A tensor as it is, with the version it must still have when it is used."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # with its graph it could be part of a cycle through autograd, never to be freed
        self.version = tensor._version

    def use(self) -> None:
        """Say that one more will ask, which does not matter here."""

    def take(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"A tensor of shape {tuple(self.tensor.shape)} that backward needs has been modified by an inplace "
                f"operation after it was used (version {self.tensor._version}, needed {self.version}); modify a clone "
                "of it instead"
            )
        return self.tensor


class Values(dict[int, dict[int, list[Any]]]):
    """What the backward passes through a graph have made and not yet given to all who ask, by the number of the pass.

    Of each pass it is the value, and the number of those who have not asked yet, by the id of what stands for the
    tensor. A pass drops what it has made at its end: not all who could ask do where not every gradient is wanted, and
    the graph may live on. If it fails, the next one of its thread does.
    """

    def __init__(self) -> None:
        super().__init__()
        self._latest: dict[int, int] = {}  # by thread

    def __missing__(self, number: int) -> dict[int, list[Any]]:
        thread = threading.get_ident()
        self._drop(thread)
        self._latest[thread] = number
        values = self[number] = {}
        torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._drop, thread))
        return values

    def _drop(self, thread: int) -> None:
        self.pop(self._latest.pop(thread, -1), None)


class Rebuilt:
    """A tensor as the function and the inputs that make it.

    Args:
        function: makes the tensor from inputs.
        inputs: what function takes.
        values: shared by all that is made in one forward.
        version: that of the tensor, once it has been made.
        in_place: whether function overwrites the first of its inputs.
    """

    __slots__ = ("function", "inputs", "values", "version", "in_place", "uses", "stride")

    def __init__(
        self,
        function: Callable[..., Tensor],
        inputs: tuple["Kept | Rebuilt", ...],
        values: Values,
        version: int = 0,
        in_place: bool = False,
    ) -> None:
        self.function = function
        self.inputs = inputs
        self.values = values
        self.version = version
        self.in_place = in_place
        self.uses = 0  # how many ask for it in one backward pass
        self.stride: tuple[int, ...] | None = None

    def use(self) -> None:
        """Say that one more will ask."""
        self.uses += 1
        if self.uses == 1:
            for source in self.inputs:
                source.use()

    def pack(self, tensor: Tensor) -> "Kept | Rebuilt":
        """What stands for a saved tensor: this, if the tensor is still what function makes."""
        if self.version != tensor._version:
            return Kept(tensor)
        self.stride = tensor.stride()
        self.use()
        return self

    def take(self) -> Tensor:
        if self.uses == 1 or (number := _get_pass()) < 0:
            return self._make()
        values = self.values[number]
        held = values.get(id(self))
        if held is None:
            value = self._make()
            values[id(self)] = [value, self.uses - 1]
            return value
        held[1] -= 1
        if not held[1]:
            del values[id(self)]
        return held[0]

    def _make(self) -> Tensor:
        if self.in_place and not (type(self.inputs[0]) is Rebuilt and self.inputs[0].uses == 1):
            value = self.function(self.inputs[0].take().clone())  # others have it too
        elif len(self.inputs) == 1:
            value = self.function(self.inputs[0].take())
        else:
            value = self.function(*[source.take() for source in self.inputs])
        if self.stride is not None and value.stride() != self.stride:
            value = torch.empty_strided(value.shape, self.stride, dtype=value.dtype, device=value.device).copy_(value)
        return value


class Blank:
    """A tensor whose values do not matter: a linear function's backward asks for its input and does not read it."""

    __slots__ = ("shape", "stride", "dtype", "device")

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.stride, self.dtype, self.device = tensor.shape, tensor.stride(), tensor.dtype, tensor.device

    def take(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def release(saved: Any, source: Rebuilt) -> bool:
    """Let go of what an autograd node has saved, to be rebuilt; False if it is nothing, or others have hooks there."""
    try:
        saved.register_hooks(source.pack, _unpack)
    except RuntimeError:
        return False
    return True


def release_values(saved: Any) -> None:
    """Let go of what an autograd node has saved and does not read; it stays where others have hooks."""
    with contextlib.suppress(RuntimeError):
        saved.register_hooks(Blank, Blank.take)


def keep(saved: Any) -> Kept | None:
    """What an autograd node has saved, for others to be made from it too; None as in `release`."""
    kept: list[Kept] = []

    def pack(tensor: Tensor) -> Kept:
        kept.append(Kept(tensor))
        return kept[0]

    try:
        saved.register_hooks(pack, _unpack)
    except RuntimeError:
        return None
    return kept[0]


def _unpack(packed: Kept | Rebuilt) -> Tensor:
    if not _is_grad_enabled() and not _is_autocast_enabled():  # as in nearly every backward
        return packed.take()
    source = packed
    while type(source) is Rebuilt:
        source = source.inputs[0]
    with torch.no_grad(), torch.autocast(source.tensor.device.type, enabled=False):
        return packed.take()

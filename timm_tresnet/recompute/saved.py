"""Sources of saved tensors: the tensor itself, or the function and inputs that recompute it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

_is_grad_enabled, _is_autocast_enabled = torch.is_grad_enabled, torch._C._is_any_autocast_enabled
_get_pass = torch._C._current_graph_task_id  # -1 outside of backward passes

_watched: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weights that backward uses again
_handles: list[Any] = []  # of the hook on optimizers
_REFUSALS = ("Calling register_hooks on a saved tensor", "Trying to backward through the graph a second time")


class Stored:
    """A tensor, and the version that it must still have in backward."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # with its graph it could be part of a cycle through autograd, never to be freed
        self.version = tensor._version

    def add_consumer(self) -> None:
        """A stored tensor needs no count."""

    def materialize(self) -> Tensor:
        if self.tensor._version != self.version and not torch.compiler.is_compiling():  # which has no versions
            what = f"A tensor of shape {tuple(self.tensor.shape)} that backward needs"
            versions = f"version {self.tensor._version}, needed {self.version}"
            raise RuntimeError(f"{what} has been modified by an inplace operation ({versions}); modify a clone of it")
        return self.tensor


class Recomputed:
    """A tensor as the function and the inputs that compute it.

    All consumers in one backward pass share the value. It is freed after the last of them, or at the end of the pass,
    as some do not run if not every gradient is asked for.

    Args:
        function: computes the tensor from inputs.
        inputs: sources of the function's arguments.
        version: version of the tensor after forward has computed it.
        is_result: whether the tensor's own node has saved it, see `discard_result`.
    """

    __slots__ = ("function", "inputs", "version", "is_result", "consumers", "stride", "_shared")

    def __init__(
        self,
        function: Callable[..., Tensor],
        inputs: tuple["Stored | Recomputed", ...],
        version: int = 0,
        is_result: bool = False,
    ) -> None:
        self.function = function
        self.inputs = inputs
        self.version = version
        self.is_result = is_result
        self.consumers = 0  # consumers in one backward pass
        self.stride: tuple[int, ...] | None = None
        self._shared: list[Any] = []  # number of the pass, value, consumers left

    def add_consumer(self) -> None:
        """Count one more consumer."""
        self.consumers += 1
        if self.consumers == 1:
            for source in self.inputs:
                source.add_consumer()

    def pack(self, tensor: Tensor) -> "Stored | Recomputed":
        """Pack hook. Returns this handle, or a stored copy of the tensor if it was modified."""
        if self.version != tensor._version:
            return Stored(tensor)
        self.stride = tensor.stride()
        self.add_consumer()
        return self

    def materialize(self) -> Tensor:
        # Compiled autograd, while it traces backward, can neither read the pass's number nor call back at its end.
        if self.consumers == 1 or torch.compiler.is_compiling() or (number := _get_pass()) < 0:
            return self._make()
        shared = self._shared
        if not shared or shared[0] != number:  # of a pass that failed, or of another thread
            shared = self._shared = [number, self._make(), self.consumers]
            torch.autograd.Variable._execution_engine.queue_callback(shared.clear)  # it must not hold self
        value = shared[1]
        shared[2] -= 1
        if not shared[2]:
            shared.clear()
        return value

    def _make(self) -> Tensor:
        value = self.function(*[source.materialize() for source in self.inputs])
        if self.stride is not None and value.stride() != self.stride:
            value = torch.empty_strided(value.shape, self.stride, dtype=value.dtype, device=value.device).copy_(value)
        return value


Source = Stored | Recomputed | None  # of a tensor; None: it must stay where autograd has saved it


def discard_result(y: Tensor, source: Source) -> None:
    """Discard y from the node that has computed it. The next operation must not be user code, which may edit y."""
    if type(source) is Recomputed and source.is_result:
        source.is_result = False
        node: Any = y.grad_fn
        discard(node._raw_saved_result, source.pack)


def unpack(packed: Stored | Recomputed) -> Tensor:
    """Unpack hook. Recomputes without grad mode and autocast; the dtypes are those of forward."""
    if not _is_grad_enabled() and not _is_autocast_enabled():  # as in nearly every backward
        return packed.materialize()
    source = packed
    while isinstance(source, Recomputed):
        source = source.inputs[0]
    with torch.no_grad(), torch.autocast(source.tensor.device.type, enabled=False):
        return packed.materialize()


def discard(saved: Any, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor] = unpack) -> None:
    """Put hooks on a tensor that an autograd node has saved, unless it has saved none or other hooks are there."""
    try:
        saved.register_hooks(pack, unpack)
    except RuntimeError as error:
        if not str(error).startswith(_REFUSALS):  # such as an error that a signal handler raises meanwhile
            raise


def watch(weights: Iterable[Tensor]) -> None:
    """Raise the version of weights after each step of an optimizer; fused optimizers do not do so themselves."""
    for weight in weights:
        _watched[weight] = None
    if not _handles:
        _handles.append(register_optimizer_step_post_hook(_raise_versions))


def _raise_versions(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():  # a compiled step raises them
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in _watched:
                torch.autograd.graph.increment_version(parameter)

"""Which activations are kept for backward, and how the rest are rebuilt.

Autograd keeps every tensor that a backward formula needs. In a block of TResNet most of them are cheap to compute from
a convolution's output: batch norm is an affine map once its statistics are known; the activation, the product with the
squeeze-and-excitation gate and the sum with the shortcut are pointwise. So the convolutions' outputs stay and backward
rebuilds the rest. In-Place ABN, which the paper uses (arXiv:1712.02616), keeps as many tensors, but activations, and
inverts them: weights must be positive, activations invertible, digits are lost. Here the arithmetic is the forward's.

A bottleneck, from top to bottom, with what is kept in [ ] and what is rebuilt in ( )::

    (input)                 or [input], see below
       |-- conv1 --> [x1]
       |             norm, activation --> (y1)
       |             conv2 --> [x2]
       |             norm, activation --> (y2)
       |             * gate --> (p2)
       |             conv3 --> [x3]   or (x3), with the setting "expansions": conv3 runs again on p2
       |             norm
       '---------- + ReLU --> (output)

The output is rebuilt from x3 and the input, which is the output of the block before: a chain, so some outputs in a
stage are kept. A stage's first block has a convolution in its shortcut, which begins a new chain.

How it works: while a tape is open (`recording`), a layer that makes a tensor from others says how (`record`). When
autograd then wants to keep that tensor, a hook (`torch.autograd.graph.saved_tensors_hooks`) keeps the recipe instead.
Backward asks the recipe, which computes the tensor once, shares it among all who ask and drops it after the last one.
A recipe stands for a tensor only if storage, shape, strides and version counter are those of the moment it was made, so
whatever users splice in, replace or edit in place is kept as usual: it costs memory, not correctness.

Grad checkpointing is the same with more recipes (`repeating_convolutions`): every second block's output is kept, and
each convolution runs again. Unlike `torch.utils.checkpoint` it need not repeat what was small enough to keep:
statistics, gates, random masks.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

SETTINGS = ("none", "activations", "expansions")

_state = threading.local()


class _Kept:
    """A tensor as it is, with the version it must still have when it is used."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # with its graph it could be part of a cycle through autograd, never to be freed
        self.version = tensor._version

    def take(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"A tensor of shape {tuple(self.tensor.shape)} that backward needs was modified in place after it was "
                f"used (version {self.tensor._version}, needed {self.version}); modify a clone of it instead"
            )
        return self.tensor


class _Recipe:
    """A tensor as the function and the inputs that make it."""

    __slots__ = ("function", "inputs", "uses", "_left", "_value")

    def __init__(self, function: Callable[..., Tensor], inputs: list["_Kept | _Recipe"]) -> None:
        self.function = function
        self.inputs = inputs
        self.uses = 0  # how many ask for it in one backward
        self._left = 0
        self._value: Tensor | None = None

    def take(self) -> Tensor:
        if self._value is None:
            self._value = self.function(*[source.take() for source in self.inputs])
            self._left = self.uses
        value = self._value
        self._left -= 1
        if self._left <= 0:
            self._value = None
        return value


class _Tape:
    """Recipes of the tensors made in one forward, found by their storage."""

    def __init__(self, setting: str) -> None:
        self.setting = setting
        self.repeats_convolutions = False
        self.recipes: dict[int, tuple[StorageWeakRef, tuple[Any, ...], _Recipe]] = {}  # by the storage's address
        self.weights: list[Tensor] = []  # of the convolutions among them

    def add(self, tensor: Tensor, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], edits: int) -> None:
        recipe = _Recipe(function, [self.pack(source) for source in inputs])
        storage = tensor.untyped_storage()
        # The weak reference keeps a freed storage's address from being reused: no later tensor is mistaken for it.
        self.recipes[storage._cdata] = StorageWeakRef(storage), _fingerprint(tensor, edits), recipe

    def pack(self, tensor: Tensor) -> _Kept | _Recipe:
        found = self.recipes.get(tensor.untyped_storage()._cdata)
        if found is None or found[1] != _fingerprint(tensor):
            return _Kept(tensor)
        found[2].uses += 1
        return found[2]

    def clear(self) -> None:
        self.recipes.clear()
        self.weights.clear()


def _fingerprint(tensor: Tensor, edits: int = 0) -> tuple[Any, ...]:
    return (
        tensor._version + edits,
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
    )


def _unpack(packed: _Kept | _Recipe) -> Tensor:
    if not torch.is_grad_enabled():  # as in every backward without create_graph
        return packed.take()
    with torch.no_grad():
        return packed.take()


@contextmanager
def recording(setting: str) -> Iterator[None]:
    """Open a tape for the forward pass inside; what is open already stays as it is.

    Hooks of others around it win: `torch.utils.checkpoint` and `torch.autograd.graph.save_on_cpu` work by them.

    Args:
        setting: one of SETTINGS; with "none", nothing is recorded.
    """
    if setting == "none" or not torch.is_grad_enabled() or current() is not None or _others_hook():
        yield
        return
    tape = _state.tape = _Tape(setting)
    try:
        with torch.autograd.graph.saved_tensors_hooks(tape.pack, _unpack):
            yield
    finally:
        _state.tape = None
        tape.clear()  # autograd holds the hooks, hence the tape, until the last tensor is released


def _others_hook() -> bool:
    # PyTorch has no public way to ask, but refuses hooks on a saved tensor if those around have been registered there.
    node = torch.ones((), device="cpu", requires_grad=True).exp().grad_fn
    try:
        node._raw_saved_result.register_hooks(torch.neg, torch.neg)
    except RuntimeError:
        return True
    return False


@contextmanager
def pausing() -> Iterator[None]:
    """Hide the open tape from what runs inside, which has its own way to save memory."""
    tape, _state.tape = current(), None
    try:
        yield
    finally:
        _state.tape = tape


@contextmanager
def repeating_convolutions() -> Iterator[None]:
    """Have the open tape record the convolutions too."""
    tape = current()
    tape.repeats_convolutions = True
    try:
        yield
    finally:
        tape.repeats_convolutions = False


def current() -> _Tape | None:
    """The tape that is open in this thread; none while compiling, where the compiler decides what is kept."""
    if torch.compiler.is_compiling():
        return None
    return getattr(_state, "tape", None)


def record(tensor: Tensor, function: Callable[..., Tensor], *inputs: Tensor, edits: int = 0) -> None:
    """Say how a tensor can be made again, if a tape is open.

    Args:
        tensor: the tensor, just made.
        function: makes a tensor with the same values, shape and strides from the inputs; must not modify them.
        inputs: what function takes.
        edits: how many in-place operations will be applied to tensor before it is what function makes.
    """
    tape = current()
    if tape is not None:
        tape.add(tensor, function, inputs, edits)


def forget_released() -> None:
    """Have the open tape keep what later modules ask for, if weights that could make it again have been freed.

    Sharded training (FSDP) frees a module's weights after its forward and gathers them again for its own backward, not
    for that of the module behind it.
    """
    tape = current()
    if tape is not None and any(not weight.untyped_storage().nbytes() for weight in tape.weights):
        tape.clear()


def is_plain(module: nn.Module) -> bool:
    """Whether calling module does what its forward does, with no hook that may return something else."""
    hooks = nn.modules.module  # PyTorch has no public way to ask
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
    )

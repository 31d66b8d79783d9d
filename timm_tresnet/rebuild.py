"""How tensors that backward needs are rebuilt there instead of kept.

Autograd keeps every tensor that a backward formula needs. In a block of TResNet most of them are cheap to compute from
a convolution's output: batch norm is an affine map once its statistics are known; the activation, the product with the
squeeze-and-excitation gate and the sum with the shortcut are pointwise. So the convolutions' outputs stay and backward
rebuilds the rest. In-Place ABN, which the paper uses (arXiv:1712.02616), keeps as many tensors, but activations, and
inverts them: weights must be positive, activations invertible, digits are lost. Here the arithmetic is the forward's.

A bottleneck, from top to bottom, with what is kept in [ ] and what is rebuilt in ( )::

    (input)                 or [input], see `timm_tresnet.stages`
       |-- conv1 --> [x1]
       |             norm, activation --> (y1)
       |             conv2 --> [x2]
       |             norm, activation --> (y2)
       |             * gate --> (p2)
       |             conv3 --> [x3]   or (x3), with the setting "expansions": conv3 runs again on p2
       |             norm
       '---------- + ReLU --> (output)

Nothing about a module is believed: what is rebuilt, and how, is read from the graph that autograd has recorded. While a
tape is open (`recording`), it follows the graph from the output of each norm and each block to what came before. A node
it knows by name says which function made its output, with which constants; a tensor which such a node has saved, and
which known functions make from kept ones, is let go, and a hook on that one saved tensor rebuilds it in backward. What
the tape keeps, and why:

=====================================================  =========================================================
convolution's output                                   kept; it costs a convolution to make again
norm's output, `_POINTWISE`, product, sum, pool        rebuilt, if what they are made from is kept or rebuilt
convolution, blur, where they are to run again         rebuilt
small ones: statistics, gates, masks                   kept
made by any other function, or edited in place since   kept, as PyTorch keeps it
needed by any other function                           kept, as PyTorch keeps it
seen by others: output of all, of hooked modules       kept, as PyTorch keeps it
made where hooks of others are (checkpoint, offload)   theirs
=====================================================  =========================================================

Where a transform of `torch.func`, forward-mode differentiation, global module hooks or the compiler are at work, no
tape opens. Values are shared among those who ask within one backward pass and dropped after the last one, at the latest when
that pass ends.

Grad checkpointing is the same with convolutions to run again (`repeating_convolutions`). Unlike
`torch.utils.checkpoint` it need not repeat what was small enough to keep: statistics, gates, random masks.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

SETTINGS = ("none", "activations", "expansions")

_state = threading.local()

_Function = Callable[..., Tensor]

# By the name of the autograd node: what it saves, and the function that made its output, with the node's constants.
# Those that work in place save their result; that of ReLU is known by its version.
_POINTWISE: dict[str, tuple[str, Callable[[Any], _Function]]] = {
    "CeluBackward0": ("self", lambda node: functools.partial(F.celu, alpha=node._saved_alpha)),
    "EluBackward0": (
        "self",
        lambda node: functools.partial(
            torch.ops.aten.elu, alpha=node._saved_alpha, scale=node._saved_scale, input_scale=node._saved_input_scale
        ),
    ),
    "GeluBackward0": ("self", lambda node: functools.partial(F.gelu, approximate=node._saved_approximate)),
    "HardsigmoidBackward0": ("self", lambda node: F.hardsigmoid),
    "HardswishBackward0": ("self", lambda node: F.hardswish),
    "HardtanhBackward0": (
        "self",
        lambda node: functools.partial(F.hardtanh, min_val=node._saved_min_val, max_val=node._saved_max_val),
    ),
    "LeakyReluBackward0": (
        "self",
        lambda node: functools.partial(F.leaky_relu, negative_slope=node._saved_negative_slope),
    ),
    "LeakyReluBackward1": (
        "result",
        lambda node: functools.partial(F.leaky_relu_, negative_slope=node._saved_negative_slope),
    ),
    "MishBackward0": ("self", lambda node: F.mish),
    "ReluBackward0": ("result", lambda node: torch.relu_),
    "SigmoidBackward0": ("result", lambda node: torch.sigmoid),
    "SiluBackward0": ("self", lambda node: F.silu),
    "TanhBackward0": ("result", lambda node: torch.tanh),
}

# Modules of these packages compute what the graph says; those of others may also edit a tensor behind its back.
_KNOWN_PACKAGES = ("torch", "timm", "timm_tresnet")


@dataclass(frozen=True)
class Again:
    """On the context of a custom function: how its output is made from its first input again.

    Args:
        function: makes the output, without side effects.
        is_convolution: whether that costs as much as a convolution.
    """

    function: Callable[[Tensor], Tensor]
    is_convolution: bool = False


class _Kept:
    """A tensor as it is, with the version it must still have when it is used."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # with its graph it could be part of a cycle through autograd, never to be freed
        self.version = tensor._version

    def use(self) -> None:
        """Nothing has to be known of who asks."""

    def take(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"A tensor of shape {tuple(self.tensor.shape)} that backward needs has been modified by an inplace "
                f"operation after it was used (version {self.tensor._version}, needed {self.version}); modify a clone "
                "of it instead"
            )
        return self.tensor


class _Rebuilt:
    """A tensor as the function and the inputs that make it.

    Args:
        function: makes the tensor from inputs; one that works in place modifies the first of them.
        inputs: what function takes.
        values: what backward passes have rebuilt, by pass; shared by a tape.
        version: that of the tensor, once it has been made; None for that of the first one packed.
        in_place: whether function works in place.
    """

    __slots__ = ("function", "inputs", "values", "version", "in_place", "uses", "stride")

    def __init__(
        self,
        function: _Function,
        inputs: tuple["_Kept | _Rebuilt", ...],
        values: dict[int, dict["_Rebuilt", list[Any]]],
        version: int | None = 0,
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

    def pack(self, tensor: Tensor) -> "_Kept | _Rebuilt":
        """What stands for a saved tensor: this, if the tensor is still what function makes."""
        if self.version is None:
            self.version = tensor._version
        if self.version != tensor._version:
            return _Kept(tensor)
        self.stride = tensor.stride()
        self.use()
        return self

    def take(self) -> Tensor:
        backward = torch._C._current_graph_task_id()
        if self.uses == 1 or backward < 0:
            return self._make()
        values = self.values.get(backward)
        if values is None:
            values = self.values[backward] = {}
            # Who never asks, since not every gradient is wanted, must not have it kept as long as the graph.
            torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self.values.pop, backward, None))
        held = values.get(self)
        if held is None:
            value = self._make()
            values[self] = [value, self.uses - 1]
            return value
        held[1] -= 1
        if not held[1]:
            del values[self]
        return held[0]

    def _make(self) -> Tensor:
        values = [source.take() for source in self.inputs]
        if self.in_place and not (type(self.inputs[0]) is _Rebuilt and self.inputs[0].uses == 1):
            values[0] = values[0].clone()  # somebody else has it
        value = self.function(*values)
        if self.stride is not None and value.stride() != self.stride:
            value = torch.empty_strided(value.shape, self.stride, dtype=value.dtype, device=value.device).copy_(value)
        return value


def _unpack(packed: _Kept | _Rebuilt) -> Tensor:
    if not torch.is_grad_enabled() and not torch._C._is_any_autocast_enabled():  # as in nearly every backward
        return packed.take()
    source = packed
    while type(source) is _Rebuilt:
        source = source.inputs[0]
    with torch.no_grad(), torch.autocast(source.tensor.device.type, enabled=False):
        return packed.take()


def _release(saved: Any, source: _Rebuilt) -> bool:
    """Have a saved tensor rebuilt instead of kept, unless nothing is saved there or hooks of others are."""
    try:
        saved.register_hooks(source.pack, _unpack)
    except RuntimeError:
        return False
    return True


def _keep(saved: Any) -> _Kept | None:
    """A saved tensor, kept for others too; None as in `_release`."""
    kept: list[_Kept] = []

    def pack(tensor: Tensor) -> _Kept:
        kept.append(_Kept(tensor))
        return kept[0]

    try:
        saved.register_hooks(pack, _unpack)
    except RuntimeError:
        return None
    return kept[0]


class _Tape:
    """How the tensors made in one forward can be had again, by the autograd node that made each."""

    def __init__(self, setting: str) -> None:
        self.setting = setting
        self.repeats_convolutions = False
        self.expansions: set[Any] = set()  # nodes
        self.weights: list[Tensor] = []  # of convolutions that will run again
        self.values: dict[int, dict[_Rebuilt, list[Any]]] = {}
        self._sources: dict[Any, _Kept | _Rebuilt | None] = {}
        # The last output. It is let go when something has been made from it: what the tape ends with stays.
        self._last: Tensor | None = None

    def begin(self, x: Tensor) -> None:
        """Say what the forward begins with."""
        if x.grad_fn is not None:
            self._sources[x.grad_fn] = _Kept(x)

    def end(self) -> None:
        """Keep what the forward ends with."""
        if self._last is not None:
            self.add_kept(self._last)

    def add_function(self, x: Tensor, y: Tensor) -> None:
        """Y is what a custom function with `Again` made of x, which it has saved first."""
        self._let_go()
        node = y.grad_fn
        source = self._find(node.next_functions[0])
        if type(source) is not _Rebuilt or not _release(node._raw_saved_tensors[0], source):
            source = _Kept(x)
        self._sources[node] = node.rebuilt = self._rebuilt(node.again.function, source, version=y._version)
        node.rebuilt.use()

    def add_output(self, y: Tensor) -> None:
        """What a block puts out, to be rebuilt."""
        self._let_go()
        self._last = y

    def add_kept(self, x: Tensor) -> None:
        """What others see or the policy keeps: it stays as PyTorch keeps it, what follows can be made from it."""
        if self._last is not x:
            self._let_go()
        self._last = None
        node = x.grad_fn
        if node is not None and node not in self._sources:
            for edge in node.next_functions:
                self._find(edge)
            self._sources[node] = _Kept(x)

    def lost_weights(self) -> bool:
        """Whether weights of convolutions that are to run again have been freed since this was asked last.

        Sharded training (FSDP) frees a module's weights after its forward and gathers them again for its own backward,
        not for that of the module behind it.
        """
        lost = any(not weight.untyped_storage().nbytes() for weight in self.weights)
        if lost:
            self.weights.clear()
        return lost

    def _let_go(self) -> None:
        y, self._last = self._last, None
        if y is not None and y.grad_fn is not None and self._find((y.grad_fn, 0)) is None:
            self._sources[y.grad_fn] = _Kept(y)

    def _rebuilt(self, function: _Function, *inputs: _Kept | _Rebuilt, **kwargs: Any) -> _Rebuilt:
        return _Rebuilt(function, inputs, self.values, **kwargs)

    def _find(self, edge: tuple[Any, int]) -> _Kept | _Rebuilt | None:
        """How the tensor at an edge of the graph can be had again, None if it cannot."""
        node, index = edge
        if node is None:
            return None
        if node in self._sources:
            return self._sources[node]
        name = node.name()
        if name in _PASSING:
            return self._find(node.next_functions[index])
        if name in _POINTWISE:
            source = self._follow_pointwise(node, *_POINTWISE[name])
        elif name in _FOLLOWED:
            source = _FOLLOWED[name](self, node)
        elif hasattr(node, "again"):
            source = self._follow_function(node)
        else:
            source = None
        self._sources[node] = source
        return source

    def _find_saved(self, node: Any, saved: Any) -> _Kept | _Rebuilt | None:
        """How the first input of a node, which the node has saved, can be had again."""
        source = self._find(node.next_functions[0])
        if source is None:
            return _keep(saved)
        if type(source) is _Rebuilt:
            _release(saved, source)
        return source

    def _follow_pointwise(self, node: Any, saves: str, describe: Callable[[Any], _Function]) -> _Rebuilt | None:
        if saves == "self":
            source = self._find_saved(node, node._raw_saved_self)
            return None if source is None else self._rebuilt(describe(node), source)
        source = self._find(node.next_functions[0])
        if source is None:
            return None
        name = node.name()
        if name == "ReluBackward0":
            made = self._rebuilt(describe(node), source, version=None, in_place=True)
        elif name == "LeakyReluBackward1":
            made = self._rebuilt(describe(node), source, version=source.version + 1, in_place=True)
        else:
            made = self._rebuilt(describe(node), source)
        return made if _release(node._raw_saved_result, made) else None

    def _follow_convolution(self, node: Any) -> _Rebuilt | None:
        if not (self.repeats_convolutions or node in self.expansions):
            source = self._find(node.next_functions[0])
            if type(source) is _Rebuilt:
                _release(node._raw_saved_input, source)
            return None
        weight = node._saved_weight
        source = self._find_saved(node, node._raw_saved_input)
        if source is None or node._saved_transposed or node._saved_bias_sym_sizes_opt != (0,):
            return None
        self.weights.append(weight)
        convolve = functools.partial(
            F.conv2d,
            stride=node._saved_stride,
            padding=node._saved_padding,
            dilation=node._saved_dilation,
            groups=node._saved_groups,
        )
        return self._rebuilt(lambda x, weight: convolve(x, weight), source, _Kept(weight))

    def _follow_function(self, node: Any) -> _Rebuilt | None:
        source = self._find(node.next_functions[0])
        if source is None or (node.again.is_convolution and not self.repeats_convolutions):
            return None
        return self._rebuilt(node.again.function, source)

    def _follow_product(self, node: Any) -> _Rebuilt | None:
        source = self._find_saved(node, node._raw_saved_self)
        other = None if source is None else _keep(node._raw_saved_other)
        return None if other is None else self._rebuilt(torch.mul, source, other)

    def _follow_sum(self, node: Any) -> _Rebuilt | None:
        first, second = (self._find(edge) for edge in node.next_functions)
        if first is None or second is None or node._saved_alpha != 1:
            return None
        return self._rebuilt(torch.add, first, second)

    def _follow_average_pool(self, node: Any) -> _Rebuilt | None:
        source = self._find_saved(node, node._raw_saved_self)
        if source is None:
            return None
        pool = functools.partial(
            F.avg_pool2d,
            kernel_size=node._saved_kernel_size,
            stride=node._saved_stride,
            padding=node._saved_padding,
            ceil_mode=node._saved_ceil_mode,
            count_include_pad=node._saved_count_include_pad,
            divisor_override=node._saved_divisor_override,
        )
        return self._rebuilt(pool, source)

    def _follow_to_input(self, node: Any) -> None:
        """A function whose output is not rebuilt, but which has saved its input."""
        source = self._find(node.next_functions[0])
        if type(source) is _Rebuilt:
            _release(node._raw_saved_self, source)


_FOLLOWED: dict[str, Callable[[_Tape, Any], _Kept | _Rebuilt | None]] = {
    "AddBackward0": _Tape._follow_sum,
    "AvgPool2DBackward0": _Tape._follow_average_pool,
    "ConvolutionBackward0": _Tape._follow_convolution,
    "MaxPool2DWithIndicesBackward0": _Tape._follow_to_input,
    "MulBackward0": _Tape._follow_product,
    "PreluKernelBackward0": _Tape._follow_to_input,
}
_PASSING = ("RegisterPostBackwardFunctionBackward",)  # FSDP's, which hands its inputs out


@contextmanager
def recording(setting: str, x: Tensor) -> Iterator[None]:
    """Open a tape for the forward pass inside; what is open already stays as it is.

    Hooks of others around it win: `torch.utils.checkpoint` and `torch.autograd.graph.save_on_cpu` work by them.

    Args:
        setting: one of SETTINGS; with "none", nothing is recorded.
        x: what the forward pass begins with.
    """
    if setting == "none" or not torch.is_grad_enabled() or open_tape() is not None or _must_step_aside():
        yield
        return
    tape = _state.tape = _Tape(setting)
    tape.begin(x)
    try:
        yield
        tape.end()
    finally:
        _state.tape = None


def _must_step_aside() -> bool:
    hooks = nn.modules.module  # PyTorch has no public way to ask
    return (
        _others_hook()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
    )


def _others_hook() -> bool:
    # PyTorch has no public way to ask, but refuses hooks on a saved tensor if those around have been registered there.
    node = torch.ones((), device="cpu", requires_grad=True).exp().grad_fn
    return not _release(node._raw_saved_result, _Rebuilt(torch.exp, (), {}))


@contextmanager
def pausing() -> Iterator[None]:
    """Hide the open tape from what runs inside."""
    tape, _state.tape = open_tape(), None
    try:
        yield
    finally:
        _state.tape = tape


@contextmanager
def repeating_convolutions() -> Iterator[None]:
    """Have the convolutions inside run again in backward, those of the open tape."""
    tape = open_tape()
    tape.repeats_convolutions = True
    try:
        yield
    finally:
        tape.repeats_convolutions = False


def open_tape() -> _Tape | None:
    """The tape that is open in this thread; none while compiling, where the compiler decides what is kept."""
    if torch.compiler.is_compiling():
        return None
    return getattr(_state, "tape", None)


def record(x: Tensor, y: Tensor) -> None:
    """Say that a custom function which has `Again` on its context, and saves x first, made y of x, if a tape is open."""
    tape = open_tape()
    if tape is not None and y.grad_fn is not None:
        tape.add_function(x, y)


def record_expansion(y: Tensor) -> None:
    """Say that y is the output of a convolution that the setting "expansions" is about."""
    tape = open_tape()
    if tape is not None and tape.setting == "expansions" and y.grad_fn is not None:
        tape.expansions.add(y.grad_fn)


def is_foreign(module: nn.Module, deep: bool = False) -> bool:
    """Whether users may see or edit what a module computes: it is of a class, has a forward or hooks of theirs.

    Args:
        module: the module.
        deep: ask about the modules in it too.
    """
    modules = [module]
    for each in modules:  # which grows meanwhile
        fields = each.__dict__
        if "forward" in fields or type(each).__module__.partition(".")[0] not in _KNOWN_PACKAGES:
            return True
        if fields["_forward_hooks"] or fields["_forward_pre_hooks"]:
            hooks = (*fields["_forward_hooks"].values(), *fields["_forward_pre_hooks"].values())
            if not all(map(_is_of_fsdp, hooks)):
                return True
        if deep and fields["_modules"]:
            modules += [child for child in fields["_modules"].values() if child is not None]
    return False


def _is_of_fsdp(hook: Callable[..., Any]) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.")

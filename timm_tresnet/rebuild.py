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

What made a tensor is read from the graph that autograd has recorded, and only where no code of users runs. While a tape
is open (`recording`), it follows the graph from the output of each norm and each block to what came before (`Tape`).
Where a node has saved a tensor that known functions make from kept ones, a hook on this one saved tensor lets it go and
makes it in backward (`timm_tresnet.saved`), from constants and values that were taken in the forward.

=====================================================  =========================================================
what                                                   in backward
=====================================================  =========================================================
convolution's output                                   kept; it costs a convolution to make again
norm, pointwise activation, product, sum, pool         rebuilt, if what they are made from is kept or rebuilt
convolution or blur that is to run again               rebuilt
statistics, gates, random masks                        kept; they are small
made, or needed, by any other function                 kept, as PyTorch keeps it
modules of users' classes, with forwards or hooks of   theirs: kept, as PyTorch keeps it, and nothing is made
users; all in them, all that goes in and comes out     again from it, for they may edit it
the input and the output of all                        the same
saved where hooks of others are: checkpoint, offload   the same
=====================================================  =========================================================

The one thing that it cannot see is an edit of a convolution's weight through `.data` between forward and backward,
where that convolution is to run again.

Where a transform of `torch.func`, forward-mode differentiation, global module hooks, modes of users or the compiler are
at work, no tape opens. Values are shared among those who ask within one backward pass, and dropped after the last one,
at the latest when that pass ends.

Grad checkpointing is the same with convolutions to run again (`repeating_convolutions`). Unlike
`torch.utils.checkpoint` it need not repeat what was small enough to keep: statistics, gates, random masks.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from timm_tresnet.saved import Kept, Rebuilt, Values, keep, release

SETTINGS = ("none", "activations", "expansions")

# By the name of the autograd node: what it saves, the function that made its output, and the function's constants,
# which the node has. The last letter 1 says that the function works in place.
_POINTWISE: dict[str, tuple[str, Callable[..., Tensor], tuple[str, ...]]] = {
    "CeluBackward0": ("self", F.celu, ("alpha",)),
    "EluBackward0": ("self", torch.ops.aten.elu, ("alpha", "scale", "input_scale")),
    "GeluBackward0": ("self", F.gelu, ("approximate",)),
    "HardsigmoidBackward0": ("self", F.hardsigmoid, ()),
    "HardswishBackward0": ("self", F.hardswish, ()),
    "HardtanhBackward0": ("self", F.hardtanh, ("min_val", "max_val")),
    "LeakyReluBackward0": ("self", F.leaky_relu, ("negative_slope",)),
    "LeakyReluBackward1": ("result", F.leaky_relu_, ("negative_slope",)),
    "MishBackward0": ("self", F.mish, ()),
    "ReluBackward0": ("result", torch.relu_, ()),  # whether it worked in place, the version of its output says
    "SigmoidBackward0": ("result", torch.sigmoid, ()),
    "SiluBackward0": ("self", F.silu, ()),
    "TanhBackward0": ("result", torch.tanh, ()),
}
_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_PASSING = ("RegisterPostBackwardFunctionBackward",)  # FSDP's, which hands its inputs out

# Classes of these modules do what the graph says; those of users may also edit a tensor behind its back.
_KNOWN_MODULES = (
    *(f"torch.nn.modules.{name}" for name in ("activation", "batchnorm", "container", "conv", "linear", "pooling")),
    *(f"timm.layers.{name}" for name in ("activations", "drop", "norm", "norm_act", "split_batchnorm")),
)
_OURS = "timm_tresnet."
_FSDP = ("torch.distributed.fsdp.", "torch.distributed._composable.fsdp.")

# Of a tensor that is dear to make, or not known how, and that nobody but our layers has: who needs it has saved it.
_DEAR = object()
_Source = Kept | Rebuilt | object | None  # None: others see the tensor

_state = threading.local()


@dataclass(frozen=True)
class Again:
    """On the context of a custom function: how its output is made from its first input.

    Args:
        function: makes the output, without side effects.
        is_convolution: whether that costs as much as a convolution.
        saves_output: whether it has saved its output, behind its input.
    """

    function: Callable[[Tensor], Tensor]
    is_convolution: bool = False
    saves_output: bool = False


class Tape:
    """How the tensors made in one forward can be had again, by the autograd node that made each.

    While it is open, only code of this package, of timm's norms and of PyTorch's layers runs: what it takes up is as
    it was made.

    Args:
        setting: one of SETTINGS, not "none".
    """

    def __init__(self, setting: str) -> None:
        self.repeats_convolutions = False
        self._setting = setting
        self._expansions: set[Any] = set()  # nodes
        self._weights: list[Tensor] = []  # of convolutions that are to run again
        self._values = Values()
        self._sources: dict[Any, _Source] = {}
        # The last output. It is let go when something has been made from it: what others see stays.
        self._last: Tensor | None = None

    def add_function(self, x: Tensor, y: Tensor) -> None:
        """Take up y, which a custom function with `Again` made of x, a convolution's output."""
        self._let_go()
        node = y.grad_fn
        source = self._find(node.next_functions[0])
        if source is _DEAR:
            source = Kept(x)
        elif type(source) is Rebuilt:
            release(node._raw_saved_tensors[0], source)
        self._sources[node] = self._make(node.again.function, source, version=y._version)
        if node.again.saves_output:
            self._last = y

    def add_expansion(self, y: Tensor) -> None:
        """Take up the output of a convolution that the setting "expansions" is about."""
        if self._setting == "expansions":
            self._expansions.add(y.grad_fn)

    def add_output(self, y: Tensor) -> None:
        """Take up the output of a block, to be rebuilt."""
        self._let_go()
        self._follow_block(y)
        self._last = y

    def add_kept(self, y: Tensor) -> None:
        """Take up the output of a block, to stay as PyTorch keeps it and to make others from."""
        self._let_go()
        self._follow_block(y)
        self._sources[y.grad_fn] = Kept(y)

    def keep_last(self) -> None:
        """Keep the last output, which can be made again no more, but others from it."""
        if self._last is not None:
            self._sources[self._last.grad_fn] = Kept(self._last)
            self._last = None

    def show(self, y: Tensor) -> None:
        """Say that others see a tensor: it stays, and nothing is made from it, for they may edit it."""
        if y.grad_fn is not None:
            self._sources[y.grad_fn] = None
        if y is self._last:
            self._last = None

    def lost_weights(self) -> bool:
        """Whether weights of convolutions that are to run again have been freed since this was asked last.

        Sharded training (FSDP) frees a module's weights after its forward and gathers them again for its own backward,
        not for that of the module behind it.
        """
        lost = any(not weight.untyped_storage().nbytes() for weight in self._weights)
        if lost:
            self._weights.clear()
        return lost

    def _let_go(self) -> None:
        """Let the last output go, where its own node has saved it."""
        y, self._last = self._last, None
        source = None if y is None else self._sources.get(y.grad_fn)
        if type(source) is not Rebuilt:
            return
        node = y.grad_fn
        if y._version == source.version:
            release(node._raw_saved_tensors[1] if hasattr(node, "again") else node._raw_saved_result, source)
        else:  # then PyTorch has something to say about it
            self._sources[node] = None

    def _follow_block(self, y: Tensor) -> None:
        """Find how the output of a block, ReLU(sum), can be made; its node keeps it yet."""
        node = y.grad_fn
        source = self._find(node.next_functions[0]) if node.name() == "ReluBackward0" else None
        if type(source) is Rebuilt:
            self._sources[node] = self._make(torch.relu_, source, version=y._version, in_place=True)
        else:
            self._sources[node] = Kept(y)

    def _make(self, function: Callable[..., Tensor], *inputs: _Source, **kwargs: Any) -> Rebuilt | None:
        if not all(isinstance(each, Kept | Rebuilt) for each in inputs):
            return None
        return Rebuilt(function, inputs, self._values, **kwargs)

    def _find(self, edge: tuple[Any, int]) -> _Source:
        """How the tensor at an edge of the graph can be had again."""
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
        else:
            source = self._follow_function(node) if isinstance(getattr(node, "again", None), Again) else None
        self._sources[node] = source = _DEAR if source is None else source
        return source

    def _find_saved(self, node: Any, saved: Any) -> _Source:
        """How the first input of a node, which the node has saved, can be had again."""
        source = self._find(node.next_functions[0])
        if source is _DEAR:
            return keep(saved)
        if type(source) is Rebuilt:
            release(saved, source)
        return source

    def _follow_pointwise(
        self, node: Any, saves: str, function: Callable[..., Tensor], constants: tuple[str, ...]
    ) -> Rebuilt | None:
        function = partial(function, **_read(node, constants))
        if saves == "self":
            return self._make(function, self._find_saved(node, node._raw_saved_self))
        source = self._find(node.next_functions[0])
        if not isinstance(source, Rebuilt):
            return None
        in_place = node.name() in ("LeakyReluBackward1", "ReluBackward0")
        made = self._make(function, source, version=node._saved_result._version, in_place=in_place)
        release(node._raw_saved_result, made)
        return made

    def _follow_convolution(self, node: Any) -> _Source:
        source = self._find_saved(node, node._raw_saved_input)
        repeats = self.repeats_convolutions or node in self._expansions
        plain = not node._saved_transposed and node._saved_bias_sym_sizes_opt == (0,)
        if not (repeats and plain and isinstance(source, Kept | Rebuilt)):
            return _DEAR
        weight = node._saved_weight
        self._weights.append(weight)
        convolve = partial(F.conv2d, **_read(node, ("stride", "padding", "dilation", "groups")))
        return self._make(convolve, source, Kept(weight))

    def _follow_function(self, node: Any) -> _Source:
        source = self._find(node.next_functions[0])
        if node.again.is_convolution and not self.repeats_convolutions:
            return _DEAR
        return self._make(node.again.function, source)

    def _follow_product(self, node: Any) -> Rebuilt | None:
        # Nothing is saved of the first factor if the other one has no gradient.
        return self._make(torch.mul, self._find_saved(node, node._raw_saved_self), keep(node._raw_saved_other))

    def _follow_sum(self, node: Any) -> Rebuilt | None:
        return (
            self._make(torch.add, *(self._find(edge) for edge in node.next_functions))
            if node._saved_alpha == 1
            else None
        )

    def _follow_average_pool(self, node: Any) -> Rebuilt | None:
        return self._make(partial(F.avg_pool2d, **_read(node, _POOL)), self._find_saved(node, node._raw_saved_self))

    def _follow_to_input(self, node: Any) -> None:
        """A function whose output is not rebuilt, but which has saved its input."""
        self._find_saved(node, node._raw_saved_self)


def _read(node: Any, constants: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(node, f"_saved_{name}") for name in constants}


_FOLLOWED: dict[str, Callable[[Tape, Any], _Source | None]] = {
    "AddBackward0": Tape._follow_sum,
    "AvgPool2DBackward0": Tape._follow_average_pool,
    "ConvolutionBackward0": Tape._follow_convolution,
    "MaxPool2DWithIndicesBackward0": Tape._follow_to_input,
    "MulBackward0": Tape._follow_product,
    "PreluKernelBackward0": Tape._follow_to_input,
}


@contextmanager
def recording(setting: str, x: Tensor | None = None) -> Iterator[None]:
    """Open a tape for the forward pass inside; what is open already stays as it is.

    Hooks of others around it win: `torch.utils.checkpoint` and `torch.autograd.graph.save_on_cpu` work by them.

    Args:
        setting: one of SETTINGS; with "none", nothing is recorded.
        x: what the forward pass begins with; what came before is left alone.
    """
    if setting == "none" or not torch.is_grad_enabled() or open_tape() is not None or _must_step_aside():
        yield
        return
    tape = _state.tape = Tape(setting)
    if x is not None:
        tape.show(x)
    try:
        yield
    finally:
        _state.tape = None


def _must_step_aside() -> bool:
    # PyTorch has no public way to ask for hooks of others, but refuses ours on what has been saved under them.
    node = torch.ones((), device="cpu", requires_grad=True).exp().grad_fn
    return is_transforming() or forward_ad._current_level >= 0 or keep(node._raw_saved_result) is None


def is_transforming() -> bool:
    """Whether a transform of `torch.func` or a mode is at work, or hooks of users run in every module."""
    hooks, modes = nn.modules.module, torch.overrides._get_current_function_mode_stack()
    return (
        bool(torch.utils._python_dispatch._get_current_dispatch_mode_stack())
        or any(type(mode) is not DeviceContext for mode in modes)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
        or bool(hooks._global_backward_hooks or hooks._global_backward_pre_hooks)
    )


@contextmanager
def pausing() -> Iterator[None]:
    """Hide the open tape from what runs inside."""
    tape, _state.tape = open_tape(), None
    try:
        yield
    finally:
        _state.tape = tape


@contextmanager
def repeating_convolutions(enabled: bool = True) -> Iterator[None]:
    """Have the convolutions inside run again in backward, those of the open tape."""
    tape = open_tape()
    tape.repeats_convolutions = enabled
    try:
        yield
    finally:
        tape.repeats_convolutions = False


def open_tape() -> Tape | None:
    """The tape that is open in this thread; none while compiling, where the compiler decides what is kept."""
    if torch.compiler.is_compiling():
        return None
    return getattr(_state, "tape", None)


def record_function(x: Tensor, y: Tensor) -> None:
    """Say that a custom function with `Again` made y of x, if a tape is open."""
    tape = open_tape()
    if tape is not None and y.grad_fn is not None:
        tape.add_function(x, y)


def record_expansion(y: Tensor) -> None:
    """Say that y is the output of a convolution that the setting "expansions" is about, if a tape is open."""
    tape = open_tape()
    if tape is not None and y.grad_fn is not None:
        tape.add_expansion(y)


def is_foreign(module: nn.Module, deep: bool = True) -> bool:
    """Whether code of users runs in a module: it is of their class, has a forward or hooks of theirs.

    Args:
        module: the module.
        deep: ask about the modules in it too.
    """
    modules = [module]
    for each in modules:  # which grows meanwhile
        fields = each.__dict__
        if "forward" in fields or "_conv_forward" in fields or not _is_known(type(each).__module__):
            return True
        if fields["_backward_hooks"] or fields["_backward_pre_hooks"]:
            return True
        if fields["_forward_hooks"] or fields["_forward_pre_hooks"]:
            hooks = (*fields["_forward_hooks"].values(), *fields["_forward_pre_hooks"].values())
            if not all((getattr(hook, "__module__", None) or "").startswith(_FSDP) for hook in hooks):
                return True
        if deep and fields["_modules"]:
            modules += [child for child in fields["_modules"].values() if child is not None]
    return False


@functools.cache
def _is_known(name: str) -> bool:
    return name in _KNOWN_MODULES or name.startswith((_OURS, *_FSDP))

"""How tensors that backward needs are rebuilt there instead of kept.

Autograd keeps every tensor that a backward formula needs. In a block of TResNet most of them are cheap to compute from
a convolution's output: batch norm is an affine map once its statistics are known; the activation, the product with the
squeeze-and-excitation gate and the sum with the shortcut are pointwise. So the convolutions' outputs stay and backward
rebuilds the rest. In-Place ABN, which the paper uses (arXiv:1712.02616), keeps as many tensors, but activations, and
inverts them: weights must be positive, activations invertible, digits are lost. Here the arithmetic is the forward's.

A bottleneck, from top to bottom, with what is kept in [ ] and what is rebuilt in ( )::

    (input)                 or [input], see `timm_tresnet.recompute.stages`
       |-- conv1 --> [x1]
       |             norm, activation --> (y1)
       |             conv2 --> [x2]
       |             norm, activation --> (y2)
       |             * gate --> (p2)
       |             conv3 --> [x3]   or (x3), with the setting "expansions": conv3 runs again on p2
       |             norm
       '---------- + ReLU --> (output)

What made a tensor is read from the graph that autograd has recorded, and only where no code of users runs. While a tape
is open (`tape`), it follows the graph from the output of each norm and each block to what came before.
Where a node has saved a tensor that known functions make from kept ones, a hook on this one saved tensor lets it go and
makes it in backward (`saved`), from constants and values that were taken in the forward.

=====================================================  =========================================================
what                                                   in backward
=====================================================  =========================================================
convolution's output                                   kept; it costs a convolution to make again
norm, pointwise activation, product, sum, pool         rebuilt, if what they are made from is kept or rebuilt
convolution or blur that is to run again               rebuilt
input of a blur, and that padded                       neither; backward asks for their shape alone
statistics, gates, random masks                        kept; they are small
made, or needed, by any other function                 kept, as PyTorch keeps it
modules of users' classes, with forwards or hooks of   theirs: kept, as PyTorch keeps it, and nothing is made
users; all in them, all that goes in and comes out     again from it, for they may edit it
the input and the output of all; tensors of users'      the same
classes; norms with eps or a layout out of the usual
saved where hooks of others are: checkpoint, offload   the same
=====================================================  =========================================================

Reading the graph takes as long as launching the work of small tensors. A block in which nothing is unusual, and of
which all is known beforehand, runs without: `plain_blocks` puts the same hooks in the same places.

The one thing that it cannot see is an edit of a convolution's weight through `.data` between forward and backward,
where that convolution is to run again. Any other edit of it, such as an optimizer's step, makes backward raise an error
then, also where gradients of later layers alone are asked for, which plain PyTorch still computes.

Where a transform of `torch.func`, forward-mode differentiation, global module hooks, modes of users, patched functions
or classes of PyTorch, or the compiler are at work, no tape opens; if code of users opens such a thing on the way and
leaves it open, the tape closes. Values are shared among those who ask within one backward pass, and dropped after the
last one, at the latest when that pass ends.

Grad checkpointing is the same with convolutions to run again (`repeating_convolutions`). Unlike
`torch.utils.checkpoint` it need not repeat what was small enough to keep: statistics, gates, random masks.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from timm_tresnet.recompute.saved import keep
from timm_tresnet.recompute.tape import Tape

SETTINGS = ("none", "activations", "expansions")

# Classes of these modules do what the graph says; those of users may also edit a tensor behind its back.
_KNOWN_MODULES = (
    *(f"torch.nn.modules.{name}" for name in ("activation", "batchnorm", "container", "conv", "linear", "pooling")),
    *(f"timm.layers.{name}" for name in ("activations", "drop", "norm", "norm_act", "split_batchnorm")),
)
_OURS = "timm_tresnet."
_FSDP = ("torch.distributed.fsdp.", "torch.distributed._composable.fsdp.")

_find_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # PyTorch 2.5 has it not

_state = threading.local()


@contextmanager
def recording(setting: str, x: Tensor | None = None) -> Iterator[None]:
    """Open a tape for the forward pass inside; what is open already stays as it is.

    Hooks of others around it win: `torch.utils.checkpoint` and `torch.autograd.graph.save_on_cpu` work by them.

    Args:
        setting: one of SETTINGS; with "none", nothing is recorded.
        x: what the forward pass begins with; what came before is left alone.
    """
    if setting == "none" or not torch.is_grad_enabled() or open_tape() is not None or must_step_aside():
        yield
        return
    tape = _state.tape = Tape(setting)
    if x is not None:
        tape.show(x)
    try:
        yield
    finally:
        _state.tape = None


def must_step_aside() -> bool:
    """Whether something of others is at work that no tape goes with."""
    return is_transforming() or not torch._C._autograd._saved_tensors_hooks_is_enabled() or _has_hooks_of_others()


def _has_hooks_of_others() -> bool:
    """Whether others have hooks on all that is saved."""
    if _find_top_hooks is not None:
        return _find_top_hooks(True) is not None
    # PyTorch refuses ours on what has been saved under theirs.
    node = torch.ones((), device="cpu", requires_grad=True).exp().grad_fn
    return keep(node._raw_saved_result) is None


def is_transforming() -> bool:
    """Whether a transform of `torch.func`, forward mode or a mode is at work, or hooks of users run in every module."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or (torch._C._len_torch_function_stack() > 0 and _has_modes_of_others())
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or has_global_hooks()
    )


def _has_modes_of_others() -> bool:
    return any(type(mode) is not DeviceContext for mode in torch.overrides._get_current_function_mode_stack())


def has_global_hooks() -> bool:
    """Whether hooks of users run in every module."""
    hooks = nn.modules.module
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


def is_plain(x: object) -> bool:
    """Whether something is a tensor of PyTorch's own classes; what those of users do is not known."""
    return type(x) in (Tensor, nn.Parameter)


@contextmanager
def pausing() -> Iterator[None]:
    """Hide the open tape from what runs inside."""
    tape, _state.tape = open_tape(), None
    try:
        yield
    finally:
        _state.tape = tape


def close_tape() -> None:
    """Record nothing of what is left of the forward pass."""
    _state.tape = None


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
    is_known = _look_up if torch.compiler.is_compiling() else _is_known
    modules = [module]
    for each in modules:  # which grows meanwhile
        fields = each.__dict__
        if "forward" in fields or "_conv_forward" in fields or not is_known(type(each).__module__):
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


def _look_up(name: str) -> bool:
    return name in _KNOWN_MODULES or name.startswith((_OURS, *_FSDP))


_is_known = functools.cache(_look_up)  # which the compiler cannot look into

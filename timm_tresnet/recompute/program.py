"""Read a module into a program of operations, or say why not.

Layers that are not PyTorch's describe themselves: their files register a reader for exactly their class (`reads`).
A program is read again in each forward, right before it runs, so edits of the modules between forwards need no care.
"""

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_tresnet.recompute.eligibility import (
    find_user_code,
    is_sharded,
    is_untouched,
    is_user_defined,
    original_class,
    stand_for,
)
from timm_tresnet.recompute.operations import Call, Convolution, DropPath, Gate, Map, Sharded
from timm_tresnet.recompute.policy import CONVOLUTION
from timm_tresnet.recompute.run import Operation, Program

_Reader = Callable[..., list[Operation]]
_readers: dict[type, _Reader] = {}  # by class, of layers
_block_readers: dict[type, Callable[[Any], Program]] = {}
_get_convolution = operator.itemgetter("_parameters", "stride", "padding", "dilation", "groups", "padding_mode")

# Activations that are pointwise and draw nothing: their function and the names of its constants.
_ACTIVATIONS: dict[type, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    nn.CELU: (F.celu, ("alpha",)),
    nn.ELU: (F.elu, ("alpha",)),
    nn.GELU: (F.gelu, ("approximate",)),
    nn.Hardsigmoid: (F.hardsigmoid, ()),
    nn.Hardswish: (F.hardswish, ()),
    nn.Hardtanh: (F.hardtanh, ("min_val", "max_val")),
    nn.LeakyReLU: (F.leaky_relu, ("negative_slope",)),
    nn.Mish: (F.mish, ()),
    nn.ReLU: (torch.relu, ()),
    nn.ReLU6: (F.relu6, ()),
    nn.SELU: (F.selu, ()),
    nn.Sigmoid: (torch.sigmoid, ()),
    nn.SiLU: (F.silu, ()),
    nn.Tanh: (torch.tanh, ()),
    timm.layers.activations.GELU: (F.gelu, ()),
    timm.layers.activations.GELUTanh: (functools.partial(F.gelu, approximate="tanh"), ()),
    timm.layers.activations.Sigmoid: (torch.sigmoid, ()),
    timm.layers.activations.Tanh: (torch.tanh, ()),
}


class Unreadable(Exception):
    """Why a module runs as plain PyTorch; the message."""


def reads(kind: type, table: dict[type, Any] = _readers) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that reads modules of exactly this class, unless the class or its forward is patched."""

    def register(reader: Callable[..., Any]) -> Callable[..., Any]:
        if stand_for(kind):
            table[kind] = reader
        return reader

    return register


reads_block = functools.partial(reads, table=_block_readers)


def read_program(module: nn.Module) -> Program:
    """Read a block, a unit or a pool.

    Raises:
        Unreadable: if it is another module, or user-defined.
    """
    kind = original_class(module)
    reader = _block_readers.get(kind)
    if reader is not None:
        if not is_untouched(module) and (reason := find_user_code(module)) is not None:
            raise Unreadable(reason)
        program = reader(module)
        _link(program.shortcut or [])
    elif kind in _readers and kind is not nn.Sequential and (operations := read(module)):
        program = Program(operations)
        if hasattr(program.operations[-1], "shown"):  # what comes next is not known yet
            program.operations[-1].shown = True
    else:
        raise Unreadable(find_user_code(module) or f"{kind.__name__} has no program")
    _link(program.operations)
    return program


def read(module: nn.Module | None, *arguments: Any) -> list[Operation]:
    """Read a module into operations; arguments are those of its reader.

    Raises:
        Unreadable: if it is user-defined, or missing.
    """
    if module is None:
        raise Unreadable("a module is missing")
    reader = _readers.get(type(module))
    if reader is not None and is_untouched(module):
        return reader(module, *arguments)
    if is_sharded(module) and (reader := _readers.get(original_class(module))) is not None:
        return [Sharded(module, functools.partial(reader, module, *arguments))]
    return [call(module)]


def call(module: nn.Module, **arguments: bool) -> Call:
    """Read a module that has no recipe; arguments are those of `Call`.

    Raises:
        Unreadable: if it is user-defined.
    """
    for each in module.modules():
        if (reason := find_user_code(each)) is not None:
            raise Unreadable(reason)
    return Call(module, **arguments)


def are_constants(values: Iterable[Any]) -> bool:
    """Whether values cannot be edited until backward."""
    return all(type(value) in (bool, int, float, str) for value in values)


def is_absent(module: nn.Module, name: str) -> bool:
    """Whether a part that may be None is None, not deleted, and no function either."""
    return getattr(module, name, module) is None


def read_activation(act: nn.Module | None) -> list[Operation]:
    """Read the activation behind a norm.

    Raises:
        Unreadable: if it is user-defined.
    """
    if act is None:
        raise Unreadable("the norm's activation is no module")
    kind = type(act)
    if kind is nn.Identity and is_untouched(act):
        return []
    if kind not in _ACTIVATIONS or not is_untouched(act):
        return [call(act, is_repeatable=True)]
    function, names = _ACTIVATIONS[kind]
    constants = {name: getattr(act, name) for name in names}
    if not are_constants(constants.values()):
        return [call(act, is_repeatable=True)]
    return [Map(act, act, functools.partial(function, **constants) if constants else function)]


def read_convolution(conv: nn.Module | None, kind: str = CONVOLUTION) -> Operation:
    """Read the convolution of a unit; one that is user-defined is called."""
    if conv is None:
        raise Unreadable("a module is missing")
    if type(conv) is _CONV2D and is_untouched(conv):
        parameters, stride, padding, dilation, groups, padding_mode = _get_convolution(conv.__dict__)
        weight, bias = parameters.get("weight"), parameters.get("bias")
        tuples = type(stride) is type(padding) is type(dilation) is tuple  # a list may be edited until backward
        if type(weight) not in _TENSORS or not (bias is None or type(bias) in _TENSORS):
            return Call(conv, is_user_defined=True)
        if tuples and type(groups) is int and padding_mode == "zeros":
            return Convolution(conv, weight, bias, (stride, padding, dilation, groups), kind)
    elif is_sharded(conv) and original_class(conv) is _CONV2D:
        return Call(conv)
    return Call(conv, is_user_defined=is_user_defined(conv))


def _link(operations: list[Operation]) -> None:
    """Tell operations what they need to know of their neighbours."""
    for operation, following in zip(operations, operations[1:], strict=False):
        if following.is_user_defined and hasattr(operation, "shown"):
            operation.shown = True
        if type(operation) is Call and not operation.is_user_defined and type(following) is Gate:
            following.stores_input = True


_TENSORS = (Tensor, nn.Parameter)
_CONV2D = nn.Conv2d if stand_for(nn.Conv2d) else None


@reads(nn.Identity)
def _read_identity(module: nn.Module) -> list[Operation]:
    return []


@reads(nn.Sequential)
def _read_sequential(module: nn.Sequential) -> list[Operation]:
    return [operation for child in module for operation in read(child)]


@reads(nn.MaxPool2d)
def _read_max_pool(module: nn.MaxPool2d) -> list[Operation]:
    return [call(module)]


@reads(timm.layers.DropPath)
def _read_drop_path(module: timm.layers.DropPath) -> list[Operation]:
    return [DropPath(module)] if module.training and module.drop_prob != 0 else []


for _name in ("__call__", "_call_impl", "__getattr__"):
    stand_for(nn.Module, _name)
stand_for(nn.Conv2d, "_conv_forward")
for _kind in (nn.LeakyReLU, nn.ReLU, nn.Sigmoid):
    stand_for(_kind)

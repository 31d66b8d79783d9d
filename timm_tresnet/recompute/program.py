"""Read a module into a program of operations, or say why not.

The file of each layer registers a reader for exactly its class; `models/layers/readers.py` has those of PyTorch's and
timm's layers. Every forward reads the program anew, so it notices all edits of modules.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from timm_tresnet.recompute.eligibility import find_user_code, is_sharded, is_untouched, original_class, stand_for
from timm_tresnet.recompute.run import Call, Operation, Program
from timm_tresnet.recompute.sharded import Sharded

_Reader = Callable[..., list[Operation]]
_readers: dict[type, _Reader] = {}  # by class, of layers
_block_readers: dict[type, Callable[[Any], Program]] = {}


class Unreadable(Exception):
    """A module runs as plain PyTorch; the message says why."""


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
    if kind in _block_readers:
        if not is_untouched(module) and (reason := find_user_code(module)) is not None:
            raise Unreadable(reason)
        return _block_readers[kind](module)
    if kind in _readers and kind is not nn.Sequential and (operations := read(module)):
        return Program(operations)
    raise Unreadable(find_user_code(module) or f"{kind.__name__} has no program")


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
    """Read a module without a reader; arguments are those of `Call`.

    Raises:
        Unreadable: if it is user-defined.
    """
    for each in module.modules():
        if (reason := find_user_code(each)) is not None:
            raise Unreadable(reason)
    return Call(module, **arguments)

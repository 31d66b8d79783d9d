"""A stranger's file: read without running anything in it."""

import argparse
import pickle
import re
import struct
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from timm_tresnet.utils.archives import PICKLE, SAFETENSORS, ZIP, check_claims
from timm_tresnet.utils.errors import summarise
from timm_tresnet.utils.images import printable
from timm_tresnet.utils.terminal import escape
from timm_tresnet.weights.checkpoint import FoundNetwork

_NAMES_SHOWN, _CHARACTERS_SHOWN = 20, 200
_MOST_STAND_INS = 200  # files of other training code ask for some ten classes
# Numbers of 8 and 4 bits mean nothing without the scales that come with them.
_WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COUNTERS = (*_WEIGHTS, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
# What torch.load raises for a damaged file depends on where the damage is.
_UNREADABLE = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Read a file of `torch.save` or safetensors without running anything in it.

    Training code stores more than weights: numpy's numbers, settings and logs of its own classes. Empty stand-ins take
    the place of these; no module is imported, no function called.

    Args:
        path: the file.

    Returns:
        What the file holds; tensors are on the CPU.

    Raises:
        OSError: if there is no such file, or it may not be read.
        ValueError: if it is neither, is damaged, holds no dict, claims more than it holds, or asks for functions of the
            operating system.
    """
    return open_checkpoint(path)[0]


def open_checkpoint(path: Path) -> tuple[Mapping[str, Any], list[str]]:
    """As `read_checkpoint`; also returns the names of the classes and functions for which there are stand-ins."""
    try:
        found = check_claims(path)
    except ValueError as error:
        raise ValueError(f"cannot read {printable(path)}: {error}") from error
    stand_ins: list[str] = []
    if found in (ZIP, PICKLE):
        checkpoint, stand_ins = _load_pickle(path)
    elif found == SAFETENSORS:
        try:
            checkpoint = load_file(path)
        except (SafetensorError, KeyError, OverflowError, RuntimeError, ValueError) as error:
            raise ValueError(f"cannot read {printable(path)}: damaged safetensors file: {summarise(error)}") from error
    else:
        raise ValueError(
            f"cannot read {printable(path)}: it begins neither like a file of torch.save nor like safetensors"
        )
    if isinstance(checkpoint, _StandIn):
        raise refuse(path, stand_ins)
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"cannot read {printable(path)}: needs a dict of tensors, got {type(checkpoint).__name__}")
    return checkpoint, stand_ins


def refuse(path: Path, names: Iterable[str]) -> ValueError:
    """The error about a file whose weights are inside objects of classes that would have to be run."""
    return ValueError(
        f"refused to read {printable(path)}: it needs {name_some(names)} to be run, and a file of weights needs no "
        "code. If you trust it, save its state_dict alone, with the code that wrote it"
    )


class _StandIn(list):  # torch appends to no other class
    """Takes the place of a class or function that a file asks for, and does nothing."""

    def __new__(cls, *arguments: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__  # type: ignore[assignment]  # lists have none


class _DictStandIn(_StandIn):
    """The same for a subclass of dict, since torch fills none but plain ones."""

    def __new__(cls, *arguments: Any) -> Any:
        return {}


def _load_pickle(path: Path) -> tuple[Any, list[str]]:
    stand_ins: dict[str, type] = {}
    while True:
        try:
            # timm's train.py stores its arguments. Torch warns of formats that are refused or taken below in any case.
            with (
                torch.serialization.safe_globals([argparse.Namespace, *stand_ins.values()]),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True), list(stand_ins)
        except _UNREADABLE as error:
            text = str(error)
            unknown = re.search(r"GLOBAL ([\w.]+)(?P<blocked> whose module)?", text)
            filled = re.search(r"Can only SETITEMS? for .*<class '([\w.]+)'>", text, re.DOTALL)
            if unknown and (unknown["blocked"] or len(stand_ins) >= _MOST_STAND_INS):
                raise refuse(path, [unknown[1]]) from error
            name = unknown[1] if unknown else filled[1] if filled else ""
            kind = _DictStandIn if filled else _StandIn
            if not name or (name in stand_ins and issubclass(stand_ins[name], kind)):
                reason = escape(text.strip().partition("\n")[0]) or type(error).__name__
                raise ValueError(
                    f"cannot read {printable(path)}: damaged or foreign file of torch.save: {reason}"
                ) from error
            module, _, own = name.rpartition(".")
            stand_ins[name] = type(own, (kind,), {"__module__": module or "builtins", "__qualname__": own})


def take_tensors(network: FoundNetwork) -> dict[str, Tensor]:
    """The weights of a network in a checkpoint, each plain numbers that the file holds."""
    tensors = {name: tensor.detach() for name, tensor in network.tensors.items()}
    for name, tensor in tensors.items():
        counter = name.endswith("num_batches_tracked")
        dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
        number = tensor.dtype in (_COUNTERS if counter else _WEIGHTS)
        if not dense or not number or tensor.device.type != "cpu":
            raise ValueError(
                f"{escape(name)} needs to hold plain floating-point numbers of 16 to 64 bits, got {tensor.dtype}, "
                f"{tensor.layout}"
            )
        if tensor.ndim == 0 and not counter:
            raise ValueError(f"{escape(name)} needs at least one dimension, got a single number")
        # A few bytes can claim to be a huge tensor that repeats them.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            shape = tuple(tensor.shape)
            raise ValueError(f"{escape(name)} of shape {shape} is larger than what the file holds of it")
    return tensors


def name_some(names: Iterable[str]) -> str:
    """Names for an error message, escaped and shortened, the first of them if there are many."""
    names = list(names)
    shown = ", ".join(map(_shorten, names[:_NAMES_SHOWN])) or "nothing"
    return f"{shown} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown


def _shorten(name: str) -> str:
    name = escape(name)
    return name if len(name) <= _CHARACTERS_SHOWN else f"{name[:_CHARACTERS_SHOWN]}..."

"""Read untrusted checkpoint files without running any code in them."""

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
_MOST_STAND_INS = 200  # files of other training code need about ten classes
# Numbers of 8 and 4 bits are useless without their scales.
_WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COUNTERS = (*_WEIGHTS, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
# torch.load raises any of these for a damaged file, depending on where the damage is.
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
    """Read a file of `torch.save` or safetensors without running any code in it.

    Training code stores more than weights: numpy numbers, and settings and logs of its own classes. Empty stand-ins
    replace such objects; no module is imported and no function called.

    Args:
        path: the file.

    Returns:
        Content of the file; tensors are on the CPU.

    Raises:
        OSError: if the file does not exist or may not be read.
        ValueError: if the file has neither format, is damaged, is not a dict, declares more data than it has, or needs
            functions of the operating system.
    """
    return open_checkpoint(path)[0]


def open_checkpoint(path: Path) -> tuple[Mapping[str, Any], list[str]]:
    """Read a file as `read_checkpoint` does; also return the names of the classes and functions with stand-ins."""
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
        raise ValueError(f"cannot read {printable(path)}: needs a file of torch.save or safetensors, got neither")
    if isinstance(checkpoint, _StandIn):
        raise refuse(path, stand_ins)
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"cannot read {printable(path)}: needs a dict of tensors, got {type(checkpoint).__name__}")
    return checkpoint, stand_ins


def refuse(path: Path, names: Iterable[str]) -> ValueError:
    """Return the error for a file whose weights are inside objects of unknown classes."""
    return ValueError(
        f"refused to read {printable(path)}: it needs code to be run, {shorten_names(names)}, and weights need none. "
        "If you trust the file, load it with the code that wrote it and save only its state_dict"
    )


class _StandIn(list):  # a list, since torch appends to no other class
    """Replaces a class or function that a file needs, and does nothing."""

    def __new__(cls, *arguments: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:  # PyTorch 2.5 calls it; later releases refuse in these words
        raise TypeError(f"Can only SETITEM for dict, got {type(self)}")

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__  # type: ignore[assignment]  # lists have none


class _DictStandIn(_StandIn):
    """Replaces a subclass of dict by a plain dict; torch fills no other dicts."""

    def __new__(cls, *arguments: Any) -> Any:
        return {}


class _ListStandIn(_StandIn):
    """Replaces a subclass of list by a plain list; PyTorch 2.5 appends to no other."""

    def __new__(cls, *arguments: Any) -> Any:
        return []


def _load_pickle(path: Path) -> tuple[Any, list[str]]:
    stand_ins: dict[str, type] = {}
    while True:
        try:
            # timm's train.py stores its arguments as a Namespace. torch's warnings are about formats handled below.
            with (
                torch.serialization.safe_globals([argparse.Namespace, *stand_ins.values()]),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True), list(stand_ins)
        except _UNREADABLE as error:
            text = str(error)
            unknown = re.search(r"GLOBAL ([\w.]+)(?P<blocked> whose module)?", text)
            filled = re.search(r"Can only (SETITEMS? for|append to) .*<class '([\w.]+)'>", text, re.DOTALL)
            if unknown and (unknown["blocked"] or len(stand_ins) >= _MOST_STAND_INS):
                raise refuse(path, [unknown[1]]) from error
            name = unknown[1] if unknown else filled[2] if filled else ""
            kind = _StandIn if not filled else _ListStandIn if filled[1] == "append to" else _DictStandIn
            if not name or (name in stand_ins and issubclass(stand_ins[name], kind)):
                reason = escape(text.strip().partition("\n")[0]) or type(error).__name__
                raise ValueError(
                    f"cannot read {printable(path)}: damaged file, or not written by torch.save: {reason}"
                ) from error
            module, _, own = name.rpartition(".")
            stand_ins[name] = type(own, (kind,), {"__module__": module or "builtins", "__qualname__": own})


def extract_tensors(network: FoundNetwork) -> dict[str, Tensor]:
    """Return a network's weights, after checking that each is a plain tensor whose data is in the file."""
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
        # With strides of 0, a few bytes can pose as a huge tensor.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            shape = tuple(tensor.shape)
            raise ValueError(f"{escape(name)} of shape {shape} is larger than its data in the file")
    return tensors


def shorten_names(names: Iterable[str]) -> str:
    """Return names for a message: escaped, shortened, and only the first ones of many."""
    names = list(names)
    shown = ", ".join(map(_shorten, names[:_NAMES_SHOWN])) or "nothing"
    return f"{shown} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown


def _shorten(name: str) -> str:
    name = escape(name)
    return name if len(name) <= _CHARACTERS_SHOWN else f"{name[:_CHARACTERS_SHOWN]}..."

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

from timm_tresnet.weights.checkpoint import unwrap

_NAMES_SHOWN = 20
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

    Args:
        path: the file.

    Returns:
        What the file holds; tensors are on the CPU.

    Raises:
        OSError: if there is no such file, or it may not be read.
        ValueError: if it is neither, is damaged, holds no dict, or needs code to be run.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        checkpoint = _load_pickle(path)
    elif start[8:] == b"{":
        try:
            checkpoint = load_file(path)
        except (SafetensorError, KeyError, OverflowError, RuntimeError, ValueError) as error:
            raise ValueError(f"cannot read {path}: damaged safetensors file: {error}") from error
    else:
        raise ValueError(f"cannot read {path}: it begins neither like a file of torch.save nor like safetensors")
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"cannot read {path}: needs a dict of tensors, got {type(checkpoint).__name__}")
    return checkpoint


def _load_pickle(path: Path) -> Any:
    try:
        # timm's train.py stores its arguments. Torch warns of formats that are refused or taken below in any case.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        if forbidden:
            raise ValueError(
                f"refused to read {path}: it needs {forbidden[1]} to be run, and a file of weights needs no code. If "
                "you trust it, save its state_dict alone, with the code that wrote it"
            ) from error
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"cannot read {path}: damaged or foreign file of torch.save: {reason}") from error


def take_tensors(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint, by name without wrapper and prefix, each plain numbers that the file holds."""
    weights = unwrap(checkpoint)
    foreign = [name for name, value in weights.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if foreign:
        raise ValueError(f"unexpected, no tensors: {name_some(map(str, foreign))}")
    tensors: dict[str, Tensor] = {name: value.detach() for name, value in weights.items()}
    for name, tensor in tensors.items():
        counter = name.endswith("num_batches_tracked")
        dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
        number = tensor.dtype in (_COUNTERS if counter else _WEIGHTS)
        if not dense or not number or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} needs to hold plain floating-point numbers of 16 to 64 bits, got {tensor.dtype}, "
                f"{tensor.layout}"
            )
        if tensor.ndim == 0 and not counter:
            raise ValueError(f"{name} needs at least one dimension, got a single number")
        # A few bytes can claim to be a huge tensor that repeats them.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} is larger than what the file holds of it")
    return tensors


def name_some(names: Iterable[str]) -> str:
    """Names for an error message, the first of them if there are many."""
    names = list(names)
    shown = ", ".join(names[:_NAMES_SHOWN]) or "nothing"
    return f"{shown} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown

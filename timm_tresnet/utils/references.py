"""Whether user code has kept a tensor."""

import sys

import torch
from torch import Tensor


def is_held(x: Tensor) -> bool:
    """Whether anything but one variable of the caller refers to a tensor or its memory, and may edit it later."""
    return _count_references(x) > _REFERENCES_OF_ONE_VARIABLE


def _count_references(x: Tensor) -> int:
    return sys.getrefcount(x) + torch._C._storage_Use_Count(x.untyped_storage()._cdata)


def _count_in_call(x: Tensor) -> int:
    return _count_references(x)


def _count_of_one_variable() -> int:
    x = torch.empty(1, device="cpu")
    return _count_in_call(x)


_REFERENCES_OF_ONE_VARIABLE = _count_of_one_variable()

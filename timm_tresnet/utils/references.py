"""Whether user code has kept a tensor."""

import sys

import torch
from torch import Tensor


def is_held(x: Tensor) -> bool:
    """Whether anything but one variable of the caller refers to a tensor or its memory, and may edit it later."""
    before = _count_of_one_variable()  # twice, since another thread may compile meanwhile
    count = _count_references(x)
    return count > min(before, _count_of_one_variable())


def _count_references(x: Tensor) -> int:
    return sys.getrefcount(x) + torch._C._storage_Use_Count(x.untyped_storage()._cdata)


def _count_in_call(x: Tensor) -> int:
    return _count_references(x)


def _count_of_one_variable() -> int:
    """Count the references of a tensor in one variable.

    It is counted anew each time: an error of the compiler (`set_stance("fail_on_recompile")`) can leave its evaluation
    of frames in place of CPython's, and then every call of a Python function holds its arguments once more.
    """
    x = torch.empty(0, device="cpu")
    return _count_in_call(x)

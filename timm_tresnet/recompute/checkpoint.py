"""torch.utils.checkpoint for blocks without a program; running statistics count each batch once."""

import threading
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from timm_tresnet.recompute.eligibility import find_transform, is_user_defined
from timm_tresnet.recompute.saved import watch


def run_checkpointed(block: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run a block, through call, that backward runs again; as plain PyTorch where checkpoints do not work."""
    hooks_work = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]  # PyTorch's stubs lack it
    if not hooks_work or find_transform() is not None or not can_run_again(block):
        return call(x)
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):  # it could skip drawing a random mask
        return torch.utils.checkpoint.checkpoint(
            call, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _KeepRunningStatistics(block))
        )


def can_run_again(block: nn.Module) -> bool:
    """Whether a second run gives the same result; user code may not, and spectral norm takes another step."""
    if is_user_defined(block):
        return False
    parts = (each for part in block.modules() for each in (part, *part._forward_pre_hooks.values()))
    return not any("SpectralNorm" in type(each).__name__ for each in parts)


class _KeepRunningStatistics:
    """While a block runs again, let it update copies of its running statistics."""

    _lock = threading.RLock()  # backward passes of several threads take turns

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._versions = [(parameter, parameter._version) for parameter in block.parameters()]
        watch(parameter for parameter, _ in self._versions)

    def __enter__(self) -> None:
        for parameter, version in self._versions:
            if parameter._version != version:
                what = f"A weight of shape {tuple(parameter.shape)}, of a block that backward runs again"
                raise RuntimeError(f"{what}, has been modified by an inplace operation")
        self._originals: list[tuple[nn.Module, str, Tensor]] = []
        self._lock.acquire()
        try:
            for module in self._block.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase) and module.training:
                    for name, buffer in list(module.named_buffers(recurse=False)):
                        self._originals.append((module, name, buffer))
                        setattr(module, name, buffer.clone())
        except BaseException:  # such as too little memory
            self.__exit__()
            raise

    def __exit__(self, *exception: object) -> None:
        for module, name, buffer in self._originals:
            setattr(module, name, buffer)
        self._lock.release()

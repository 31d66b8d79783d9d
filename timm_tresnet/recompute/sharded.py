"""Modules whose weights FSDP2 gathers, by hooks, before forward and backward, and frees afterwards."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from timm_tresnet.recompute.run import Operation, Result, Run, run_operations
from timm_tresnet.recompute.saved import Recomputed, Source, Stored


@dataclass(slots=True, eq=False)
class Sharded(Operation):
    """A module whose operations run between its hooks; read returns them once the weights are gathered."""

    read: Callable[[], list[Operation]]

    def run(self, x: Tensor, source: Source, run: Run) -> Result:
        def forward(inner: Tensor) -> Tensor:
            nonlocal source
            y, source = run_operations(self.read(), inner, source if inner.dtype == x.dtype else None, run)
            return y

        y = call_with_hooks(self.module, forward, x)
        return y, store_if_freed(y, source, run)


def call_with_hooks(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call a module, so that its hooks run, with another forward."""

    def once(x: Tensor) -> Tensor:
        del module.__dict__["forward"]
        return forward(x)

    module.__dict__["forward"] = once
    try:
        return module(x)
    finally:
        module.__dict__.pop("forward", None)


def store_if_freed(y: Tensor, source: Source, run: Run) -> Source:
    """Source of a sharded module's output y: y itself if weights that recompute it are freed now."""
    lost, run.uses_weights = run.uses_weights, False
    return Stored(y) if lost and type(source) is Recomputed else source

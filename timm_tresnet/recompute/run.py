"""Run a program as a straight line of PyTorch calls, and discard the saved tensors that backward can recompute.

Each operation takes a tensor and its source (`timm_tresnet.recompute.saved`), calls what its module would call, and
returns the output and its source. Autograd records the graph as always. Where a node has saved a tensor whose source is
`Recomputed`, hooks on this one saved tensor discard it in forward and recompute it in backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from timm_tresnet.recompute.eligibility import find_obstacle, is_plain
from timm_tresnet.recompute.saved import Recomputed, Source, Stored, discard_result, unpack
from timm_tresnet.utils.references import is_held

Result = tuple[Tensor, Source]
_add, _relu_ = torch.add, torch.relu_


class Run:
    """State of one forward; repeats are the kinds of operations that backward recomputes (`policy.py`)."""

    def __init__(self, repeats: frozenset[str]) -> None:
        self.repeats = repeats
        self.closed = False  # whether user code has opened a mode, or has returned no plain tensor
        self.uses_weights = False  # whether backward recomputes a convolution
        self.source: Source = None  # of the feature map between two programs
        self._output: Tensor | None = None  # the feature map

    def enter(self, x: Tensor, exposed: bool) -> Source:
        """Source of the feature map x; None if user code sees it (exposed) and autograd keeps what it has saved."""
        y, source = self._output, self.source
        self._output = self.source = None
        if exposed or y is None or y.dtype != x.dtype:  # cast by FSDP2
            return None
        discard_result(y, source)
        return source

    def leave(self, y: Tensor, source: Source) -> None:
        """Set the feature map and its source."""
        self._output, self.source = y, source

    def recheck(self, y: object) -> None:
        """Close the run if nothing may be recomputed after user code, which has returned y."""
        if not is_plain(y) or find_obstacle() is not None:
            self.closed = True


@dataclass(slots=True, eq=False)
class Operation:
    """One step of a program. Its module computes the same, for where nothing may be recomputed."""

    is_repeatable: ClassVar[bool] = True  # whether its output can be recomputed from its input
    is_user_defined: ClassVar[bool] = False  # whether user code sees its input and output
    module: nn.Module

    def run(self, x: Tensor, source: Source, run: Run) -> Result:
        """Return the output and its source."""
        raise NotImplementedError


class Call(Operation):
    """A module without a reader, called as it is. All that it saves is stored, except its input.

    Args:
        is_user_defined: whether user code sees its input and output; then the input is stored too.
        is_saved: whether autograd saves its output anyway, so that storing it costs no memory.
        is_repeatable: whether storing its output suffices under grad checkpointing too, as for an activation.
    """

    def __init__(
        self, module: nn.Module, is_user_defined: bool = False, is_saved: bool = True, is_repeatable: bool = False
    ) -> None:
        super().__init__(module)
        self.is_user_defined, self.is_saved, self.is_repeatable = is_user_defined, is_saved, is_repeatable  # type: ignore[misc]

    def run(self, x: Tensor, source: Source, run: Run) -> Result:
        if self.is_user_defined or type(source) is not Recomputed:
            y = self.module(x)
        else:
            own = [x]  # PyTorch keeps the hooks, which must not keep x
            with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: source.pack(tensor) if own and tensor is own[0] else Stored(tensor), unpack
            ):
                y = self.module(x)
            own.clear()
        if self.is_user_defined:
            run.recheck(y)
        elif not is_plain(y):
            run.closed = True
        stays = run.closed or not self.is_saved or y.grad_fn is None or (self.is_user_defined and is_held(y))
        return y, None if stays else Stored(y)


class Program(NamedTuple):
    """The operations of a block.

    Args:
        operations: those from the input to the output, or to the sum.
        shortcut: those of the sum's other term; None if there is no sum.
        act: the activation of the sum.
        behind: the activation's operations; None for a ReLU.
    """

    operations: Sequence[Operation]
    shortcut: Sequence[Operation] | None = None
    act: nn.Module | None = None
    behind: Sequence[Operation] | None = None

    def is_repeatable(self) -> bool:
        parts = (*self.operations, *(self.shortcut or ()), *(self.behind or ()))
        return all(part.is_repeatable for part in parts)

    def exposes_input(self) -> bool:
        """Whether user code sees the input."""
        return self.operations[0].is_user_defined or bool(self.shortcut and self.shortcut[0].is_user_defined)


def run_program(program: Program, x: Tensor, run: Run, stored: bool = False) -> Tensor:
    """Run the program of a block on its input; stored says whether the output is stored for backward."""
    operations, shortcut, act, behind = program
    source = run.enter(x, program.exposes_input())
    if shortcut is None or act is None:  # no sum
        y, source = run_operations(operations, x, source, run)
    else:
        term, source_of_term = run_operations(shortcut, x, source, run)
        y, source = run_operations(operations, x, source, run)
        if run.closed:
            y, source = act(y + term), None
        else:
            discard_result(term, source_of_term)
            discard_result(y, source)
            add = _add_and_rectify if behind is None else _add
            y = add(y, term)
            if y.grad_fn is None:
                source = None
            elif source is None or source_of_term is None:
                source = Stored(y)  # as the activation does anyway
            else:
                source = Recomputed(add, (source, source_of_term), y._version, is_result=behind is None)
            if behind is not None:
                y, source = run_operations(behind, y, source, run)
    run.leave(y, Stored(y) if stored and type(source) is Recomputed else source)
    return y


def run_operations(operations: Sequence[Operation], x: Tensor, source: Source, run: Run) -> Result:
    """Run operations one after the other."""
    for operation in operations:
        if run.closed:
            x, source = operation.module(x), None
        else:
            if not operation.is_user_defined:
                discard_result(x, source)
            x, source = operation.run(x, source, run)
    return x, source


def _add_and_rectify(x: Tensor, y: Tensor) -> Tensor:
    return _relu_(_add(x, y))

"""Run a program as a straight line of PyTorch calls, and discard the saved tensors that backward can recompute.

Each operation takes a tensor and its source (`timm_tresnet.recompute.saved`), calls the functions that its module
would call, and returns the output and its source. Autograd records the graph as always. Where a node has saved a
tensor whose source is `Recomputed`, pack and unpack hooks on this one saved tensor discard it in forward and recompute
it in backward.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from timm_tresnet.recompute.eligibility import find_obstacle, is_plain
from timm_tresnet.recompute.saved import Recomputed, Source, Stored, Values, discard

Result = tuple[Tensor, Source]
_add, _relu_ = torch.add, torch.relu_


class Run:
    """State of one forward.

    Args:
        repeats: kinds of operations that run again in backward (`timm_tresnet.recompute.policy`).
    """

    def __init__(self, repeats: frozenset[str]) -> None:
        self.repeats = repeats
        self.closed = False  # by user code that has opened a mode, or returned no plain tensor
        self.values = Values()
        self._weights: list[torch.UntypedStorage] = []  # of convolutions that run again
        self._source: Source = None  # of the current feature map
        self._last: Tensor | None = None  # the current feature map, where its own node may discard it

    def enter(self, shown: bool) -> Source:
        """Source of the current feature map, now that what comes next is known.

        Args:
            shown: whether user code sees the feature map, which then stays where autograd has saved it.
        """
        source, last = self._source, self._last
        self._source = self._last = None
        if shown:
            return None
        if last is not None and type(source) is Recomputed:
            saved = getattr(last.grad_fn, "_raw_saved_result", None)
            if saved is not None:
                discard(saved, source)
        return source

    def leave(self, y: Tensor, source: Source, stored: bool) -> None:
        """Make y, with its source, the current feature map, which may be one that is stored."""
        if type(source) is Recomputed and stored:
            source = Stored(y)
        self._source = source
        self._last = y

    def store_if_lost(self) -> None:
        """Store the current feature map if weights that recompute it have been freed."""
        last = self._last
        if last is not None and type(self._source) is Recomputed and self.has_lost_weights():
            self._source = Stored(last)

    def recheck(self, y: object) -> None:
        """Close the run if user code, which has returned y, makes the rest ineligible."""
        if not is_plain(y) or find_obstacle() is not None:
            self.closed = True

    def add_weight(self, weight: Tensor) -> None:
        """Note the weight of a convolution that runs again."""
        self._weights.append(weight.untyped_storage())

    def has_lost_weights(self) -> bool:
        """Whether weights of convolutions that run again have been freed since this was asked last.

        Sharded training (FSDP) frees a module's weights after its forward and gathers them again for its own backward,
        not for that of the module behind it.
        """
        lost = not all(map(torch.UntypedStorage.nbytes, self._weights))
        if lost:
            self._weights.clear()
        return lost


class Operation(Protocol):
    """One step of a program (`timm_tresnet.recompute.operations`).

    Attributes:
        module: called in its place once the run is closed.
        is_repeatable: whether its output can be recomputed from its input.
        is_user_defined: whether user code sees its input and output.
        covers: number of operations behind it that its module does too, such as a norm's activation.
    """

    module: nn.Module
    covers: int
    is_repeatable: bool
    is_user_defined: bool

    def run(self, x: Tensor, source: Source, run: Run) -> Result:
        """Return the output and its source."""


class Program(NamedTuple):
    """What a block does.

    Args:
        operations: from its input to its output, or to the sum.
        shortcut: those of the other term of the sum, whose ReLU ends the block; None if there is no sum.
        act: the ReLU.
    """

    operations: list[Operation]
    shortcut: list[Operation] | None = None
    act: nn.Module | None = None

    def is_repeatable(self) -> bool:
        return all(operation.is_repeatable for operation in (*self.operations, *(self.shortcut or ())))

    def shows_input(self) -> bool:
        """Whether user code sees the input."""
        return self.operations[0].is_user_defined or bool(self.shortcut and self.shortcut[0].is_user_defined)


def run_program(program: Program, x: Tensor, run: Run, stored: bool = False) -> Tensor:
    """Run a program; stored says whether its output stays for backward."""
    operations, shortcut, act = program
    source = run.enter(program.shows_input())
    if shortcut is None or act is None:  # no sum
        y, source = run_operations(operations, x, source, run)
    else:
        term, source_of_term = run_operations(shortcut, x, source, run)
        y, source = run_operations(operations, x, source, run)
        if run.closed:
            y, source = act(y + term), None
        else:
            y = torch.relu_(y + term)
            if y.grad_fn is None:
                source = None
            elif source is None or source_of_term is None:
                source = Stored(y)  # as ReLU does anyway
            else:
                source = Recomputed(_add_and_rectify, (source, source_of_term), run.values, y._version)
    run.leave(y, source, stored)
    return y


def run_operations(operations: Sequence[Operation], x: Tensor, source: Source, run: Run) -> Result:
    """Run operations one after the other."""
    covered = 0
    for operation in operations:
        if covered:
            covered -= 1
        elif run.closed:
            x, source = operation.module(x), None
            covered = operation.covers
        else:
            x, source = operation.run(x, source, run)
    return x, source


def _add_and_rectify(x: Tensor, y: Tensor) -> Tensor:
    return _relu_(_add(x, y))

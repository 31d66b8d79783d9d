"""What a block is made of: operations that know their source, and discard what backward can recompute."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_tresnet.recompute.eligibility import is_held, is_plain
from timm_tresnet.recompute.norms import run_norm
from timm_tresnet.recompute.policy import BLUR
from timm_tresnet.recompute.run import Result, Run, run_operations
from timm_tresnet.recompute.saved import Recomputed, Source, Stored, discard, discard_values, unpack, watch

_conv2d, _mul = F.conv2d, torch.mul


@dataclass(slots=True, eq=False)
class Convolution:
    """A convolution, whose output is stored unless its kind runs again.

    Args:
        module: the layer.
        weight: its weight.
        bias: its bias, or None.
        settings: its arguments but for input, weight and bias.
        kind: its row of the table in `timm_tresnet.recompute.policy`.
    """

    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    settings: tuple[Any, ...]
    kind: str
    is_repeatable = True
    covers = 0
    is_user_defined = False

    def run(self, x: Tensor, source: Source, run: Run) -> Result:
        y = F.conv2d(x, self.weight, self.bias, *self.settings)
        node: Any = y.grad_fn
        if node is None:
            return y, None
        if type(source) is Recomputed and self.weight.requires_grad and x.dtype == y.dtype:  # else cast by autocast
            discard(node._raw_saved_input, source)
        if source is None or self.kind not in run.repeats or self.bias is not None:
            return y, Stored(y)
        watch((self.weight,))
        weight = node._saved_weight  # cast, under autocast
        run.add_weight(weight)
        return y, Recomputed(functools.partial(_convolve, self.settings), (source, Stored(weight)), run.values)


@dataclass(slots=True, eq=False)
class Norm:
    """Batch norm, and the leaky ReLU behind it.

    Args:
        module: the layer.
        arguments: of `run_norm`, but for the input.
        count: num_batches_tracked if it is to be raised, or None.
        shown: whether user code may see the output.
        covers: number of operations behind it that the layer does too.
    """

    module: nn.Module
    arguments: tuple[Any, ...]
    count: Tensor | None
    shown: bool = False
    covers: int = 0
    is_repeatable = True
    is_user_defined = False

    def run(self, x: Tensor, source: Source, run: Run) -> Result:
        if self.count is not None:
            self.count.add_(1)
        y, node, function = run_norm(x, *self.arguments)
        if source is None or function is None:
            return y, None
        if type(source) is Recomputed:
            discard(node._raw_saved_input, source)
        made = Recomputed(function, (source,), run.values, y._version)
        if self.arguments[-1] is not None and not self.shown:
            last: Any = y.grad_fn
            discard(last._raw_saved_result, made)
        return y, made


@dataclass(slots=True, eq=False)
class CustomNorm:
    """A norm that is a custom autograd function, which has saved its input first.

    Args:
        module: the layer.
        function: returns the output and what computes it from the input again, None without a node.
        covers: number of operations behind it that the layer does too.
    """

    module: nn.Module
    function: Callable[[Tensor], tuple[Tensor, Callable[[Tensor], Tensor] | None]]
    covers: int = 0
    is_repeatable = True
    is_user_defined = False

    def run(self, x: Tensor, source: Source, run: Run) -> Result:
        y, again = self.function(x)
        node: Any = y.grad_fn
        if source is None or again is None:
            return y, None
        if type(source) is Recomputed:
            discard(node._raw_saved_tensors[0], source)
        return y, Recomputed(again, (source,), run.values, y._version)


@dataclass(slots=True, eq=False)
class Map:
    """An activation or a pool, whose node has saved its input, its output, or neither.

    Args:
        module: the layer.
        function: computes the output.
        again: computes it again, with the constants of the forward.
        shown: whether user code may see the output.
    """

    module: nn.Module
    function: Callable[[Tensor], Tensor]
    again: Callable[[Tensor], Tensor]
    shown: bool = False
    is_repeatable = True
    covers = 0
    is_user_defined = False

    def run(self, x: Tensor, source: Source, run: Run) -> Result:
        y = self.function(x)
        node: Any = y.grad_fn
        if node is None or source is None:
            return y, None
        if y.dtype != x.dtype:  # autocast has cast it
            return y, Stored(y)
        saved = getattr(node, "_raw_saved_self", None)
        if saved is not None and type(source) is Recomputed:
            discard(saved, source)
        made = Recomputed(self.again, (source,), run.values, y._version)
        saved = getattr(node, "_raw_saved_result", None)
        if saved is not None and not self.shown:
            discard(saved, made)
        return y, made


@dataclass(slots=True, eq=False)
class Blur:
    """A blur: a padding and a convolution with constants, of whose inputs backward needs the shapes alone.

    Args:
        module: the layer.
        function: returns the padded input and the output.
        again: computes the output from the input again, in a dtype.
    """

    module: nn.Module
    function: Callable[[Tensor], tuple[Tensor, Tensor]]
    again: Callable[..., Tensor]
    is_repeatable = True
    covers = 0
    is_user_defined = False

    def run(self, x: Tensor, source: Source, run: Run) -> Result:
        padded, y = self.function(x)
        node: Any = y.grad_fn
        if node is None:
            return y, None
        discard_values(node._raw_saved_input)
        saved = getattr(padded.grad_fn, "_raw_saved_self", None)
        if saved is not None:
            discard_values(saved)
        if source is None or BLUR not in run.repeats:
            return y, Stored(y)
        return y, Recomputed(functools.partial(self.again, dtype=y.dtype), (source,), run.values)


@dataclass(slots=True, eq=False)
class Gate:
    """The product with a gate, which is computed from the channel means and stored.

    Args:
        module: the layer.
        function: computes the gate from the input.
        calls_user_code: whether user code runs in it, which sees the means.
        stores_input: whether an input without a source, which autograd saves here alone, is taken as stored.
    """

    module: nn.Module
    function: Callable[[Tensor], Tensor]
    calls_user_code: bool
    stores_input: bool = False
    is_repeatable = True
    covers = 0
    is_user_defined = False

    def run(self, x: Tensor, source: Source, run: Run) -> Result:
        gate = self.function(x)
        if self.calls_user_code:
            run.recheck(gate)
        y = x * gate
        if self.stores_input and source is None and gate.requires_grad and x.grad_fn is not None:
            source = Stored(x)
        node: Any = y.grad_fn
        if source is None or run.closed or node is None:
            return y, None
        if type(source) is Recomputed and gate.requires_grad:
            discard(node._raw_saved_self, source)
        return y, Recomputed(_mul, (source, Stored(gate)), run.values)


@dataclass(slots=True, eq=False)
class DropPath:
    """Stochastic depth in training: the product with a random mask, which is stored."""

    module: nn.Module
    is_repeatable = True
    covers = 0
    is_user_defined = False

    def run(self, x: Tensor, source: Source, run: Run) -> Result:
        mask = self.module(x.new_ones(x.shape[0], *[1] * (x.dim() - 1)))  # drawn as for x
        y = x * mask
        if source is None or y.grad_fn is None:
            return y, None
        return y, Recomputed(_mul, (source, Stored(mask)), run.values)


@dataclass(slots=True, eq=False)
class Call:
    """A module without a recipe, called as it is. What it has saved is stored, but for its input.

    Args:
        module: the module.
        is_user_defined: whether user code sees its input and output; then the input is stored too, and nothing is
            recomputed from an output that user code still holds.
        is_saved: whether autograd saves its output anyway, so that storing it costs nothing.
        is_repeatable: whether storing it does under grad checkpointing too, as for an activation.
    """

    module: nn.Module
    is_user_defined: bool = False
    is_saved: bool = True
    is_repeatable: bool = False
    covers = 0

    def run(self, x: Tensor, source: Source, run: Run) -> Result:
        if self.is_user_defined or type(source) is not Recomputed:
            y = self.module(x)
        else:
            with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: source.pack(tensor) if tensor is x else Stored(tensor), unpack
            ):
                y = self.module(x)
        if self.is_user_defined:
            run.recheck(y)
        elif not is_plain(y):
            run.closed = True
        if run.closed or not self.is_saved or y.grad_fn is None or (self.is_user_defined and is_held(y)):
            return y, None
        return y, Stored(y)


@dataclass(slots=True, eq=False)
class Sharded:
    """A module between whose hooks FSDP2 has gathered its weights.

    Args:
        module: the module.
        read: returns the operations in it, once the weights are there.
    """

    module: nn.Module
    read: Callable[[], list[Any]]
    is_repeatable = True
    covers = 0
    is_user_defined = False

    def run(self, x: Tensor, source: Source, run: Run) -> Result:
        def forward(inner: Tensor) -> Tensor:
            nonlocal source
            y, source = run_operations(self.read(), inner, source if inner.dtype == x.dtype else None, run)
            return y

        y = call_sharded(self.module, forward, x)
        if type(source) is Recomputed and run.has_lost_weights():
            source = Stored(y)
        return y, source


def call_sharded(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call a module, so that its hooks run, with another forward."""

    def once(x: Tensor) -> Tensor:
        del module.__dict__["forward"]
        return forward(x)

    module.__dict__["forward"] = once
    try:
        return module(x)
    finally:
        module.__dict__.pop("forward", None)


def _convolve(settings: tuple[Any, ...], x: Tensor, weight: Tensor) -> Tensor:
    return _conv2d(x, weight, None, *settings)

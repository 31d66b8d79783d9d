"""What is known of the tensors made in one forward: how each can be had again, read from autograd's graph."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_tresnet.recompute.saved import Kept, Rebuilt, Values, release, release_values

# By the name of the autograd node: what it saves, the function that made its output, and the function's constants,
# which the node has. The last letter 1 says that the function works in place.
_POINTWISE: dict[str, tuple[str, Callable[..., Tensor], tuple[str, ...]]] = {
    "CeluBackward0": ("self", F.celu, ("alpha",)),
    "EluBackward0": ("self", torch.ops.aten.elu, ("alpha", "scale", "input_scale")),
    "GeluBackward0": ("self", F.gelu, ("approximate",)),
    "HardsigmoidBackward0": ("self", F.hardsigmoid, ()),
    "HardswishBackward0": ("self", F.hardswish, ()),
    "HardtanhBackward0": ("self", F.hardtanh, ("min_val", "max_val")),
    "LeakyReluBackward0": ("self", F.leaky_relu, ("negative_slope",)),
    "LeakyReluBackward1": ("result", F.leaky_relu_, ("negative_slope",)),
    "MishBackward0": ("self", F.mish, ()),
    "ReluBackward0": ("result", torch.relu_, ()),  # whether it worked in place, the version of its output says
    "SigmoidBackward0": ("result", torch.sigmoid, ()),
    "SiluBackward0": ("self", F.silu, ()),
    "TanhBackward0": ("result", torch.tanh, ()),
}
_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_PASSING = ("RegisterPostBackwardFunctionBackward",)  # FSDP's, which hands its inputs out

# Of a tensor that is dear to make, or not known how, and that nobody but our layers has: who needs it has saved it.
_DEAR = object()
Source = Kept | Rebuilt | object | None  # None: others see the tensor


@dataclass(frozen=True)
class Again:
    """On the context of a custom function: how its output is made from its first input.

    Args:
        function: makes the output, without side effects.
    """

    function: Callable[[Tensor], Tensor]


class Tape:
    """How the tensors made in one forward can be had again, by the autograd node that made each.

    While it is open, only code of this package, of timm's norms and of PyTorch's layers runs: what it takes up is as
    it was made.

    Args:
        setting: one of SETTINGS, not "none".
    """

    def __init__(self, setting: str) -> None:
        self.repeats_convolutions = False
        self.repeats_expansions = setting == "expansions"
        self._expansions: set[Any] = set()  # nodes
        self._weights: list[torch.UntypedStorage] = []  # of convolutions that are to run again
        self._values = Values()
        self._sources: dict[Any, Source] = {}
        # The last output. It is let go when something has been made from it: what others see stays.
        self._last: Tensor | None = None

    def add_function(self, x: Tensor, y: Tensor) -> None:
        """Take up y, which a custom function with `Again` made of x, a convolution's output."""
        self._let_go()
        node = y.grad_fn
        source = self._find(node.next_functions[0])
        if source is _DEAR:
            source = Kept(x)
        elif type(source) is Rebuilt:
            release(node._raw_saved_tensors[0], source)
        self._sources[node] = self._make(node.again.function, source, version=y._version)

    def find(self, x: Tensor) -> Source:
        """How a tensor can be had again."""
        source = self._find((x.grad_fn, x.output_nr))
        return Kept(x) if source is _DEAR else source

    def add_convolution(self, y: Tensor, source: Source, settings: tuple[Any, ...], expands: bool) -> Source:
        """Take up y, the output of a convolution whose input can be had again in a known way.

        Args:
            y: the output.
            source: of the input.
            settings: the convolution's arguments but for input and weight.
            expands: whether the setting "expansions" is about it.
        """
        node = y.grad_fn
        if type(source) is Rebuilt:
            release(node._raw_saved_input, source)
        if source is None or not (self.repeats_convolutions or (expands and self.repeats_expansions)):
            return Kept(y)
        return self._repeat_convolution(node, source, partial(_convolve, settings))

    def add_norm(self, source: Source, norm: Any, y: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        """Take up y, which a function makes: what a norm, whose node is given, does, and maybe an activation in place.

        Args:
            source: of the norm's input.
            norm: node of the norm.
            y: output of all.
            function: does it again.
        """
        self._let_go()
        node = y.grad_fn
        self._sources[node] = self._follow_norm(source, norm, y, function)
        if node is not norm:
            self._last = y

    def add_inner_norm(self, source: Source, norm: Any, y: Tensor, function: Callable[[Tensor], Tensor]) -> Source:
        """Take up y, as `add_norm` does, where it is sure that nobody else will see it."""
        made = self._follow_norm(source, norm, y, function)
        node = y.grad_fn
        if made is not None and node is not norm:
            release(node._raw_saved_result, made)
        return made

    def add_blur(self, x: Tensor, padded: Tensor, y: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        """Take up y, a convolution of padded x with constants, which a function makes of x again.

        Backward reads neither. As the output of any convolution, y is made again only where these run again.
        """
        self._let_go()
        node, padding = y.grad_fn, padded.grad_fn
        release_values(node._raw_saved_input)
        if padding.name() == "ReflectionPad2DBackward0":
            release_values(padding._raw_saved_self)
        source = self._find((x.grad_fn, x.output_nr))
        made = self._make(function, source) if self.repeats_convolutions else None
        self._sources[node] = _DEAR if made is None else made

    def add_product(self, y: Tensor, source: Source, gate: Tensor) -> Source:
        """Take up the product of a tensor that can be had again in a known way, and a gate, which stays."""
        if type(source) is Rebuilt:
            release(y.grad_fn._raw_saved_self, source)
        return self._make(torch.mul, source, Kept(gate))

    def add_sum(self, y: Tensor, *terms: Source, keeps: bool) -> None:
        """Take up the output of a block, ReLU of a sum whose terms can be had again in a known way, to be kept or not.

        Args:
            y: the output.
            terms: of the sum.
            keeps: whether it stays, for others to be made from it.
        """
        self._let_go()
        made = None if keeps else self._make(_add_and_rectify, *terms, version=y._version)
        self._sources[y.grad_fn] = Kept(y) if made is None else made
        self._last = y

    def add_expansion(self, y: Tensor) -> None:
        """Take up the output of a convolution that the setting "expansions" is about."""
        if self.repeats_expansions:
            self._expansions.add(y.grad_fn)

    def add_output(self, y: Tensor) -> None:
        """Take up the output of a block, to be rebuilt."""
        self._let_go()
        self._follow_block(y)
        self._last = y

    def add_kept(self, y: Tensor) -> None:
        """Take up the output of a block, to stay as PyTorch keeps it and to make others from."""
        self._let_go()
        self._follow_block(y)
        self._sources[y.grad_fn] = Kept(y)

    def keep_last(self) -> None:
        """Keep the last output, which can be made again no more, but others from it."""
        if self._last is not None:
            self._sources[self._last.grad_fn] = Kept(self._last)
            self._last = None

    def show(self, y: Tensor) -> None:
        """Say that others see a tensor: it stays, and nothing is made from it, for they may edit it."""
        if y.grad_fn is not None:
            self._sources[y.grad_fn] = None
        if y is self._last:
            self._last = None

    def lost_weights(self) -> bool:
        """Whether weights of convolutions that are to run again have been freed since this was asked last.

        Sharded training (FSDP) frees a module's weights after its forward and gathers them again for its own backward,
        not for that of the module behind it.
        """
        lost = not all(map(torch.UntypedStorage.nbytes, self._weights))
        if lost:
            self._weights.clear()
        return lost

    def _let_go(self) -> None:
        """Let the last output go, where its own node has saved it."""
        y, self._last = self._last, None
        source = None if y is None else self._sources.get(y.grad_fn)
        if type(source) is not Rebuilt:
            return
        node = y.grad_fn
        if y._version == source.version:
            release(node._raw_saved_result, source)
        else:  # then PyTorch has something to say about it
            self._sources[node] = None

    def _follow_block(self, y: Tensor) -> None:
        """Find how the output of a block, ReLU(sum), can be made; its node keeps it yet."""
        node = y.grad_fn
        source = self._find(node.next_functions[0]) if node.name() == "ReluBackward0" else None
        if type(source) is Rebuilt:
            self._sources[node] = self._make(torch.relu_, source, version=y._version, in_place=True)
        else:
            self._sources[node] = Kept(y)

    def _make(self, function: Callable[..., Tensor], *inputs: Source, **kwargs: Any) -> Rebuilt | None:
        if not all(isinstance(each, Kept | Rebuilt) for each in inputs):
            return None
        return Rebuilt(function, inputs, self._values, **kwargs)

    def _find(self, edge: tuple[Any, int]) -> Source:
        """How the tensor at an edge of the graph can be had again."""
        node, index = edge
        if node is None:
            return None
        if node in self._sources:
            return self._sources[node]
        name = node.name()
        if name in _PASSING:
            return self._find(node.next_functions[index])
        if name in _POINTWISE:
            source = self._follow_pointwise(node, *_POINTWISE[name])
        elif name in _FOLLOWED:
            source = _FOLLOWED[name](self, node)
        else:
            source = self._follow_function(node) if isinstance(getattr(node, "again", None), Again) else None
        self._sources[node] = source = _DEAR if source is None else source
        return source

    def _find_saved(self, node: Any, name: str) -> Source:
        """How the first input of a node, which the node has saved under a name, can be had again."""
        source = self._find(node.next_functions[0])
        if source is _DEAR:
            return _keep(node, name)
        if type(source) is Rebuilt:
            release(getattr(node, f"_raw_saved_{name}"), source)
        return source

    def _follow_pointwise(
        self, node: Any, saves: str, function: Callable[..., Tensor], constants: tuple[str, ...]
    ) -> Rebuilt | None:
        function = partial(function, **_read(node, constants))
        if saves == "self":
            return self._make(function, self._find_saved(node, "self"))
        source = self._find(node.next_functions[0])
        if not isinstance(source, Rebuilt):
            return None
        in_place = node.name() in ("LeakyReluBackward1", "ReluBackward0")
        made = self._make(function, source, version=node._saved_result._version, in_place=in_place)
        release(node._raw_saved_result, made)
        return made

    def _follow_convolution(self, node: Any) -> Source:
        source = self._find_saved(node, "input")
        if not (self.repeats_convolutions or node in self._expansions):
            return _DEAR
        plain = not node._saved_transposed and node._saved_bias_sym_sizes_opt == (0,)
        if not plain or not isinstance(source, Kept | Rebuilt):
            return _DEAR
        convolve = partial(F.conv2d, **_read(node, ("stride", "padding", "dilation", "groups")))
        return self._repeat_convolution(node, source, convolve)

    def _repeat_convolution(self, node: Any, source: Kept | Rebuilt, function: Callable[..., Tensor]) -> Rebuilt:
        weight = node._saved_weight
        self._weights.append(weight.untyped_storage())
        return Rebuilt(function, (source, Kept(weight)), self._values)

    def _follow_function(self, node: Any) -> Source:
        return self._make(node.again.function, self._find(node.next_functions[0]))

    def _follow_norm(
        self, source: Source, norm: Any, y: Tensor, function: Callable[[Tensor], Tensor]
    ) -> Rebuilt | None:
        if source is None:
            return None
        if type(source) is Rebuilt:
            release(norm._raw_saved_input, source)
        return Rebuilt(function, (source,), self._values, y._version)

    def _follow_product(self, node: Any) -> Rebuilt | None:
        # Nothing is saved of the first factor if the other one has no gradient.
        return self._make(torch.mul, self._find_saved(node, "self"), _keep(node, "other"))

    def _follow_sum(self, node: Any) -> Rebuilt | None:
        terms = [self._find(edge) for edge in node.next_functions]
        return self._make(torch.add, *terms) if node._saved_alpha == 1 else None

    def _follow_average_pool(self, node: Any) -> Rebuilt | None:
        return self._make(partial(F.avg_pool2d, **_read(node, _POOL)), self._find_saved(node, "self"))

    def _follow_to_input(self, node: Any) -> None:
        """A function whose output is not rebuilt, but which has saved its input."""
        self._find_saved(node, "self")


_conv2d, _add, _relu_ = F.conv2d, torch.add, torch.relu_  # whatever is in their place when backward comes


def _convolve(settings: tuple[Any, ...], x: Tensor, weight: Tensor) -> Tensor:
    return _conv2d(x, weight, *settings)


def _add_and_rectify(x: Tensor, y: Tensor) -> Tensor:
    return _relu_(_add(x, y))


def _keep(node: Any, name: str) -> Kept | None:
    """What a node has saved under a name, for others to be made from it too; None if it has not, or not any more."""
    try:
        tensor = getattr(node, f"_saved_{name}")
    except RuntimeError:  # it has been edited, about which PyTorch has something to say in backward
        return None
    return None if tensor is None else Kept(tensor)


def _read(node: Any, constants: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(node, f"_saved_{name}") for name in constants}


_FOLLOWED: dict[str, Callable[[Tape, Any], Source]] = {
    "AddBackward0": Tape._follow_sum,
    "AvgPool2DBackward0": Tape._follow_average_pool,
    "ConvolutionBackward0": Tape._follow_convolution,
    "MaxPool2DWithIndicesBackward0": Tape._follow_to_input,
    "MulBackward0": Tape._follow_product,
    "PreluKernelBackward0": Tape._follow_to_input,
}

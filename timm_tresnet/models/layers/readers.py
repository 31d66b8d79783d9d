"""Operations and readers for convolutions, activations and other layers of PyTorch and timm."""

import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_tresnet.recompute.eligibility import is_sharded, is_untouched, is_user_defined, original_class, stand_for
from timm_tresnet.recompute.policy import CONVOLUTION
from timm_tresnet.recompute.program import Unreadable, call, read, reads
from timm_tresnet.recompute.run import Call, Operation, Result, Run
from timm_tresnet.recompute.saved import Recomputed, Source, Stored, discard, watch
from timm_tresnet.recompute.stage import Stage

_conv2d, _mul = F.conv2d, torch.mul
_get_convolution = operator.itemgetter("_parameters", "stride", "padding", "dilation", "groups", "padding_mode")
_TENSORS = (Tensor, nn.Parameter)
_CONV2D = nn.Conv2d if stand_for(nn.Conv2d) else None

# Pointwise activations without randomness: function, and names of its constants.
_ACTIVATIONS: dict[type, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    nn.CELU: (F.celu, ("alpha",)),
    nn.ELU: (F.elu, ("alpha",)),
    nn.GELU: (F.gelu, ("approximate",)),
    nn.Hardsigmoid: (F.hardsigmoid, ()),
    nn.Hardswish: (F.hardswish, ()),
    nn.Hardtanh: (F.hardtanh, ("min_val", "max_val")),
    nn.LeakyReLU: (F.leaky_relu, ("negative_slope",)),
    nn.Mish: (F.mish, ()),
    nn.ReLU: (torch.relu, ()),
    nn.ReLU6: (F.relu6, ()),
    nn.SELU: (F.selu, ()),
    nn.Sigmoid: (torch.sigmoid, ()),
    nn.SiLU: (F.silu, ()),
    nn.Tanh: (torch.tanh, ()),
    timm.layers.activations.GELU: (F.gelu, ()),
    timm.layers.activations.GELUTanh: (functools.partial(F.gelu, approximate="tanh"), ()),
    timm.layers.activations.Sigmoid: (torch.sigmoid, ()),
    timm.layers.activations.Tanh: (torch.tanh, ()),
}


def are_constants(values: Iterable[Any]) -> bool:
    """Return whether values are immutable, so that they cannot change before backward."""
    return all(type(value) in (bool, int, float, str) for value in values)


def is_absent(module: nn.Module, name: str) -> bool:
    """Return whether an optional part is None, as opposed to deleted or replaced by a function."""
    return getattr(module, name, module) is None


@dataclass(slots=True, eq=False)
class Convolution(Operation):
    """A convolution; its output is stored unless the policy recomputes its kind.

    Args:
        module: the layer.
        weight: its weight.
        bias: its bias, or None.
        settings: its other arguments: stride, padding, dilation and groups.
        kind: its kind in `timm_tresnet.recompute.policy`.
    """

    weight: Tensor
    bias: Tensor | None
    settings: tuple[Any, ...]
    kind: str

    def run(self, x: Tensor, source: Source, run: Run) -> Result:
        y = F.conv2d(x, self.weight, self.bias, *self.settings)
        node: Any = y.grad_fn
        if node is None:
            return y, None
        if type(source) is Recomputed and self.weight.requires_grad and x.dtype == y.dtype:  # else cast by autocast
            discard(node._raw_saved_input, source.pack)
        if source is None or self.kind not in run.repeats or self.bias is not None:
            return y, Stored(y)
        run.uses_weights = True
        watch((self.weight,))
        weight = Stored(node._saved_weight)  # cast, under autocast
        return y, Recomputed(functools.partial(_convolve, self.settings), (source, weight))


def _convolve(settings: tuple[Any, ...], x: Tensor, weight: Tensor) -> Tensor:
    return _conv2d(x, weight, None, *settings)


def read_convolution(conv: nn.Module | None, kind: str = CONVOLUTION) -> Operation:
    """Read the convolution of a unit; a user-defined one is called as a whole."""
    if conv is None:
        raise Unreadable("a module is missing")
    if type(conv) is _CONV2D and is_untouched(conv):
        parameters, stride, padding, dilation, groups, padding_mode = _get_convolution(conv.__dict__)
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if type(weight) not in _TENSORS or not (bias is None or type(bias) in _TENSORS):
            return Call(conv, is_user_defined=True)
        tuples = type(stride) is type(padding) is type(dilation) is tuple  # a list could change before backward
        if tuples and type(groups) is int and padding_mode == "zeros":
            return Convolution(conv, weight, bias, (stride, padding, dilation, groups), kind)
    elif is_sharded(conv) and original_class(conv) is _CONV2D:
        return Call(conv)
    return Call(conv, is_user_defined=is_user_defined(conv))


@dataclass(slots=True, eq=False)
class Map(Operation):
    """An activation or a pool; its node saves its input, its output, or neither.

    Args:
        module: the layer.
        function: computes the output.
        recompute: recomputes the output with the constants of the forward.
    """

    function: Callable[[Tensor], Tensor]
    recompute: Callable[[Tensor], Tensor]

    def run(self, x: Tensor, source: Source, run: Run) -> Result:
        y = self.function(x)
        node: Any = y.grad_fn
        if node is None or source is None:
            return y, None
        if y.dtype != x.dtype:  # autocast has cast it
            return y, Stored(y)
        saved = getattr(node, "_raw_saved_self", None)
        if saved is not None and type(source) is Recomputed:
            discard(saved, source.pack)
        return y, Recomputed(self.recompute, (source,), y._version, is_result=hasattr(node, "_raw_saved_result"))


def read_activation(act: nn.Module | None) -> Operation | None:
    """Read the activation after a norm; None for an identity.

    Raises:
        Unreadable: if it is user-defined.
    """
    if act is None:
        raise Unreadable("the norm's activation is not a module")
    kind = type(act)
    if kind is nn.Identity and is_untouched(act):
        return None
    if kind not in _ACTIVATIONS or not is_untouched(act):
        return call(act, is_repeatable=True)
    function, names = _ACTIVATIONS[kind]
    constants = {name: getattr(act, name) for name in names}
    if not are_constants(constants.values()):
        return call(act, is_repeatable=True)
    return Map(act, act, functools.partial(function, **constants) if constants else function)


@dataclass(slots=True, eq=False)
class DropPath(Operation):
    """Stochastic depth in training: multiplication by a random mask, which is stored."""

    def run(self, x: Tensor, source: Source, run: Run) -> Result:
        mask = self.module(x.new_ones(x.shape[0], *[1] * (x.dim() - 1)))  # drawn as for x
        y = x * mask
        return y, None if source is None or y.grad_fn is None else Recomputed(_mul, (source, Stored(mask)))


@reads(timm.layers.DropPath)
def _read_drop_path(module: timm.layers.DropPath) -> list[Operation]:
    return [DropPath(module)] if module.training and module.drop_prob != 0 else []


@reads(nn.Identity)
def _read_identity(module: nn.Identity) -> list[Operation]:
    return []


@reads(nn.Sequential)
def _read_sequential(module: nn.Sequential) -> list[Operation]:
    return [operation for child in module for operation in read(child)]


@reads(nn.MaxPool2d)
def _read_max_pool(module: nn.MaxPool2d) -> list[Operation]:
    return [call(module)]


for _name in ("__call__", "_call_impl", "__getattr__"):
    stand_for(nn.Module, _name)
stand_for(nn.Conv2d, "_conv_forward")
for _kind in (*_ACTIVATIONS, Stage):
    stand_for(_kind)

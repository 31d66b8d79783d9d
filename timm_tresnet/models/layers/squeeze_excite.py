"""TResNet's squeeze-and-excitation."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_tresnet.models.layers.readers import Convolution, read_convolution
from timm_tresnet.recompute.compiled import is_in_region
from timm_tresnet.recompute.eligibility import find_user_code, is_untouched, stand_for
from timm_tresnet.recompute.program import Unreadable, reads
from timm_tresnet.recompute.run import Operation, Result, Run
from timm_tresnet.recompute.saved import Recomputed, Source, Stored, discard


class SqueezeExcite(timm.layers.SEModule):
    """timm's squeeze-and-excitation: scale every channel by a gate computed from the channel means (arXiv:1709.01507).

    TResNet places it where it is cheapest and leaves it out of the last stage ("Optimized SE Layers",
    arXiv:2003.13630).

    Args:
        channels: number of input and output channels, C.
        reduced_channels: number of channels between the two 1x1 convolutions.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - input: (N, C, H, W)
        - output: (N, C, H, W)
    """

    def __init__(
        self,
        channels: int,
        reduced_channels: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, rd_channels=reduced_channels, device=device, dtype=dtype)
        self.act = nn.ReLU(inplace=True)
        self.gate = nn.Sigmoid()  # PyTorch's own class, which tools recognise

    def forward(self, x: Tensor) -> Tensor:
        return x * self._make_gate(x)

    def _make_gate(self, x: Tensor) -> Tensor:
        gate = self.bn(self.fc1(x.mean((2, 3), keepdim=True)))
        if torch.jit.is_scripting():
            gate = self.act(gate)
        else:
            gate = self._activate(gate)
        return self.gate(self.fc2(gate))

    @torch.jit.unused
    def _activate(self, x: Tensor) -> Tensor:
        return F.relu(x) if is_in_region() and type(self.act) is nn.ReLU else self.act(x)


_mul = torch.mul


@dataclass(slots=True, eq=False)
class Gate(Operation):
    """Multiplication by a gate, which is computed from the channel means and stored.

    Args:
        module: the layer.
        function: computes the gate (N, C, 1, 1) from the input (N, C, H, W).
        calls_user_code: whether function runs user code, which can observe the channel means.
    """

    function: Callable[[Tensor], Tensor]
    calls_user_code: bool = False

    def run(self, x: Tensor, source: Source, run: Run) -> Result:
        gate = self.function(x)
        if self.calls_user_code:
            run.recheck(gate)
        y = x * gate
        node: Any = y.grad_fn
        if source is None and gate.requires_grad and x.grad_fn is not None:
            source = Stored(x)  # as autograd does anyway
        if source is None or run.closed or node is None:
            return y, None
        if type(source) is Recomputed and gate.requires_grad:
            discard(node._raw_saved_self, source.pack)
        return y, Recomputed(_mul, (source, Stored(gate)))


@reads(SqueezeExcite)
def _read(se: SqueezeExcite) -> list[Operation]:
    if "_make_gate" in se.__dict__:
        raise Unreadable("a replaced _make_gate")
    get = se.__dict__["_modules"].get
    norm, act, gate = get("bn"), get("act"), get("gate")
    first, second = read_convolution(get("fc1")), read_convolution(get("fc2"))
    usual = type(act) is nn.ReLU and type(gate) is nn.Sigmoid and type(norm) is nn.Identity
    usual = usual and is_untouched(act) and is_untouched(gate) and is_untouched(norm)
    if usual and isinstance(first, Convolution) and isinstance(second, Convolution):
        of_first, of_second = ((each.weight, each.bias, *each.settings) for each in (first, second))
        return [Gate(se, functools.partial(_make_gate, of_first, of_second))]
    for each in (norm, act, gate):  # user code would see the gate
        if each is None or (reason := find_user_code(each)) is not None:
            raise Unreadable("a module is missing" if each is None else reason)
    return [Gate(se, se._make_gate, first.is_user_defined or second.is_user_defined)]


def _make_gate(first: tuple[Any, ...], second: tuple[Any, ...], x: Tensor) -> Tensor:
    squeezed = torch.relu_(F.conv2d(x.mean((2, 3), keepdim=True), *first))
    return torch.sigmoid(F.conv2d(squeezed, *second))


stand_for(SqueezeExcite, "_make_gate")

"""Residual blocks with nothing unusual in them, run as a straight line of functions while a tape is open.

Where launches set the pace, calling modules, and reading from the graph afterwards what each has saved, costs as much
as the work. Of a block as its constructor made it all that is known beforehand: `run_block` calls the functions that
its modules would call, in their order, and puts the hooks where they belong. Autograd makes the graph as always, so
nothing is computed otherwise. Any other block runs as modules, and `timm_tresnet.tape` reads the graph.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_tresnet.blocks import BasicBlock, Bottleneck
from timm_tresnet.layers import ActivatedBatchNorm2d, BlurPool2d, ConvNormAct, ReLU, ShortcutPool2d, SqueezeExcite
from timm_tresnet.layers.activated_batch_norm import run_norm
from timm_tresnet.rebuild import repeating_convolutions
from timm_tresnet.tape import Source, Tape

# All that there is in such a block, of exactly these types: what FSDP or a parametrization changes is of another one.
_FORWARDS = {
    kind: kind.forward
    for kind in (
        *(BasicBlock, Bottleneck, ConvNormAct, ActivatedBatchNorm2d, BlurPool2d, ReLU, ShortcutPool2d, SqueezeExcite),
        *(nn.Conv2d, nn.Identity, nn.LeakyReLU, nn.Sequential, nn.Sigmoid),
    )
}
_CALLS = nn.Module.__call__, nn.Conv2d._conv_forward

_Unit = tuple[Tensor, tuple[Any, ...], tuple[Any, ...], Tensor, nn.Module | None, bool]


class PlainBlock(NamedTuple):
    """What `run_block` runs.

    Args:
        units: of each unit the weight and the settings of the convolution, arguments of `run_norm`,
            num_batches_tracked, the blur or None, and whether it is an expansion.
        gate: arguments of the two convolutions that make the gate of the squeeze-and-excitation, if there is one.
        downsample: of the shortcut.
    """

    units: list[_Unit]
    gate: tuple[tuple[Any, ...], tuple[Any, ...]] | None
    downsample: nn.Module


def can_take(x: Tensor) -> bool:
    """Whether nothing is unusual in what a block takes and where it runs.

    Under autocast, a convolution saves its input only if that has autocast's dtype already, else a copy.
    """
    if type(x) is not Tensor or not x.numel() or not torch.is_grad_enabled():
        return False
    if not torch._C._is_any_autocast_enabled():
        return True
    device = x.device.type
    return torch.is_autocast_enabled(device) and x.dtype == torch.get_autocast_dtype(device)


def read_block(block: nn.Module) -> PlainBlock | None:
    """What is in a block, if nothing is unusual in it; None if something is."""
    if not (type(block) is BasicBlock or type(block) is Bottleneck) or not _is_untouched(block):
        return None
    get = block.__dict__["_modules"].get
    act, se, downsample, conv3 = get("act"), get("se"), get("downsample"), get("conv3")
    if type(get("drop_path")) is not nn.Identity or type(act) is not ReLU or not act.inplace or downsample is None:
        return None
    units = [_read_unit(get("conv1")), _read_unit(get("conv2"))]
    if conv3 is not None:
        units.append(_read_unit(conv3))
    if None in units or (conv3 is None) is not (type(block) is BasicBlock):
        return None
    if type(se) is nn.Identity:
        return PlainBlock(units, None, downsample)
    gate = _read_gate(se)
    return None if gate is None else PlainBlock(units, gate, downsample)


def run_block(plain: PlainBlock, x: Tensor, tape: Tape, repeats: bool) -> tuple[Tensor, tuple[Source, Source]]:
    """Run a block; its output, a ReLU, and how the two terms of the sum before that can be had again.

    Args:
        plain: the block.
        x: what it takes.
        tape: the open one.
        repeats: whether its convolutions run again in backward.
    """
    units, gate, downsample = plain
    source = tape.find(x)
    if type(downsample) is nn.Identity:
        shortcut, source_of_shortcut = x, source
    else:
        with repeating_convolutions(repeats):
            shortcut = downsample(x)
            source_of_shortcut = tape.find(shortcut)
    y, source = _run_unit(units[0], x, source, tape, repeats)
    y, source = _run_unit(units[1], y, source, tape, repeats)
    if gate is not None:
        squeezed = torch.relu_(F.conv2d(y.mean((2, 3), keepdim=True), *gate[0]))
        y = y * torch.sigmoid(F.conv2d(squeezed, *gate[1]))
        source = tape.add_product(y, source)
    if len(units) == 3:
        y, source = _run_unit(units[2], y, source, tape, repeats)
    return torch.relu_(y + shortcut), (source, source_of_shortcut)


def _is_untouched(block: nn.Module) -> bool:
    """Whether all in a block is of a known type, without hooks and with its own forward."""
    if (nn.Module.__call__, nn.Conv2d._conv_forward) != _CALLS:
        return False
    modules = [block]
    for each in modules:  # which grows meanwhile
        kind = type(each)
        if kind not in _FORWARDS or kind.forward is not _FORWARDS[kind]:
            return False
        fields = each.__dict__
        if (
            fields["_forward_hooks"]
            or fields["_forward_pre_hooks"]
            or fields["_backward_hooks"]
            or fields["_backward_pre_hooks"]
            or "forward" in fields
            or "_conv_forward" in fields
            or "_compiled_call_impl" in fields
        ):
            return False
        modules += fields["_modules"].values()
    return True


def _read_unit(unit: nn.Module | None) -> _Unit | None:
    if type(unit) is not ConvNormAct:
        return None
    get = unit.__dict__["_modules"].get
    convolution, norm, blur = _read_convolution(get("conv")), get("bn"), get("aa")
    if convolution is None or type(norm) is not ActivatedBatchNorm2d:
        return None
    fields = norm.__dict__
    parts, parameters, buffers = fields["_modules"], fields["_parameters"], fields["_buffers"]
    gamma, beta, act = parameters.get("weight"), parameters.get("bias"), parts.get("act")
    mean, var, count = buffers.get("running_mean"), buffers.get("running_var"), buffers.get("num_batches_tracked")
    weight, bias, *settings = convolution
    usual = (
        type(gamma) is type(beta) is nn.Parameter
        and type(mean) is type(var) is type(count) is Tensor
        and weight.requires_grad
        and gamma.requires_grad
        and beta.requires_grad
        and bias is None
        and fields["training"]
        and fields["track_running_stats"]
        and fields["momentum"] is not None
        and not fields["synchronized"]
        and type(parts.get("drop")) is nn.Identity
    )
    if not usual:
        return None
    slope = None
    if type(act) is nn.LeakyReLU and act.inplace:
        slope = act.negative_slope
    elif type(act) is not nn.Identity:
        return None
    if type(blur) is nn.Identity:
        blur = None
    elif type(blur) is not BlurPool2d or "kernel" not in blur._buffers or blur.kernel.requires_grad:
        return None
    arguments = (gamma, beta, mean, var, True, fields["momentum"], fields["eps"], slope)
    return weight, (bias, *settings), arguments, count, blur, unit.__dict__["expands"]


def _read_gate(se: nn.Module | None) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
    if type(se) is not SqueezeExcite:
        return None
    get = se.__dict__["_modules"].get
    first, second, act = _read_convolution(get("fc1")), _read_convolution(get("fc2")), get("act")
    usual = type(act) is ReLU and act.inplace and type(get("gate")) is nn.Sigmoid
    return (first, second) if usual and first is not None and second is not None else None


def _read_convolution(conv: nn.Module | None) -> tuple[Any, ...] | None:
    """Arguments of a convolution, without what it takes."""
    if type(conv) is not nn.Conv2d:
        return None
    fields = conv.__dict__
    weight, bias = fields["_parameters"].get("weight"), fields["_parameters"].get("bias")
    if type(weight) is not nn.Parameter or fields["padding_mode"] != "zeros":
        return None
    return weight, bias, fields["stride"], fields["padding"], fields["dilation"], fields["groups"]


def _run_unit(unit: _Unit, x: Tensor, source: Source, tape: Tape, repeats: bool) -> tuple[Tensor, Source]:
    weight, settings, norm, num_batches_tracked, blur, expands = unit
    z = F.conv2d(x, weight, *settings)
    source = tape.add_convolution(z, source, repeats or (expands and tape.repeats_expansions))
    num_batches_tracked.add_(1)
    y, source = run_norm(tape, z, source, *norm)
    if blur is not None:
        y = blur(y)
        source = tape.add_blur(y, source, repeats)
    return y, source

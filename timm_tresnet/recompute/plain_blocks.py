"""Residual blocks with nothing unusual in them, run as a straight line of functions while a tape is open.

Where launches set the pace, calling modules, and reading from the graph afterwards what each has saved, costs as much
as the work. Of a block as its constructor made it all that is known beforehand: `run_block` calls the functions that
its modules would call, in their order, and puts the hooks where they belong. Autograd makes the graph as always, so
nothing is computed otherwise. Any other block runs as modules, and `timm_tresnet.recompute.tape` reads the graph.
"""

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_tresnet.models.blocks import BasicBlock, Bottleneck
from timm_tresnet.models.layers import (
    ActivatedBatchNorm2d,
    BlurPool2d,
    ConvNormAct,
    ReLU,
    ShortcutPool2d,
    SqueezeExcite,
)
from timm_tresnet.models.layers.activated_batch_norm import run_norm
from timm_tresnet.models.layers.anti_alias import blur_pool, pool_recorded
from timm_tresnet.recompute.tape import Source, Tape

# All that there is in such a block, of exactly these types: what FSDP or a parametrization changes is of another one.
_KINDS = (
    *(BasicBlock, Bottleneck, ConvNormAct, ActivatedBatchNorm2d, BlurPool2d, ReLU, ShortcutPool2d, SqueezeExcite),
    *(nn.Conv2d, nn.Identity, nn.LeakyReLU, nn.Sequential, nn.Sigmoid),
)
_get_called = operator.attrgetter("__call__", "__getattr__", "_call_impl", "forward")
_get_functions = operator.attrgetter("avg_pool2d", "batch_norm", "conv2d", "leaky_relu", "pad", "relu")
_get_operations = operator.attrgetter(
    *("batch_norm", "relu_", "sigmoid", "Tensor.__add__", "Tensor.__mul__", "Tensor.mean")
)
_get_convolution = operator.itemgetter("_parameters", "stride", "padding", "dilation", "groups", "padding_mode")
_get_norm = operator.itemgetter(
    *("_modules", "_parameters", "_buffers", "training", "track_running_stats", "momentum", "eps", "synchronized")
)


def _get_code() -> list[Any]:
    """What runs when such a module is called."""
    return [*map(_get_called, _KINDS), nn.Conv2d._conv_forward, _get_functions(F), _get_operations(torch)]


def _is_known(code: Any) -> bool:
    """Whether code is not of others who came before us."""
    if isinstance(code, tuple):
        return all(map(_is_known, code))
    module = getattr(code, "__module__", None)  # that built in has none
    return module is None or module.split(".")[0] in ("torch", "timm_tresnet")


_CODE = _get_code()  # which nobody has replaced yet, or somebody has, to whom we leave the field
_was_patched = not all(map(_is_known, _CODE))


def is_patched() -> bool:
    """Whether somebody has replaced what runs when the modules of a block are called."""
    return _was_patched or _get_code() != _CODE


_Unit = tuple[Tensor, tuple[Any, ...], tuple[Any, ...], Tensor, tuple[Any, ...] | None, bool]


class PlainBlock(NamedTuple):
    """What `run_block` runs.

    Args:
        units: of each unit the weight and the settings of the convolution, arguments of `run_norm`,
            num_batches_tracked, arguments of `blur_pool` or None, and whether it is an expansion.
        gate: arguments of the two convolutions that make the gate of the squeeze-and-excitation, if there is one.
        shortcut: whether the shortcut pools, and its unit; None if it is the input itself.
    """

    units: list[_Unit]
    gate: tuple[tuple[Any, ...], tuple[Any, ...]] | None
    shortcut: tuple[bool, _Unit] | None


def can_take(x: Tensor) -> bool:
    """Whether nothing is unusual in what a block takes and where it runs.

    Under autocast, a convolution saves its input only if that has autocast's dtype already, else a copy.
    """
    if type(x) is not Tensor or x.dim() != 4 or not x.numel() or not torch.is_grad_enabled():
        return False
    if not torch._C._is_any_autocast_enabled():
        return True
    device = x.device.type
    return torch.is_autocast_enabled(device) and x.dtype == torch.get_autocast_dtype(device)


def read_blocks(blocks: list[nn.Module]) -> list[PlainBlock]:
    """What is in the first of some blocks, up to one in which something is unusual.

    While they run, no code of users does, so they stay as they are read. Who opens a tape has asked for `is_patched`.
    """
    plain = []
    for block in blocks:
        read = _read_block(block)
        if read is None:
            break
        plain.append(read)
    return plain


def _read_block(block: nn.Module) -> PlainBlock | None:
    kind = type(block)
    if not (kind is BasicBlock or kind is Bottleneck):
        return None
    get = block.__dict__["_modules"].get
    act, se, downsample, drop_path = get("act"), get("se"), get("downsample"), get("drop_path")
    if type(drop_path) is not nn.Identity or type(act) is not ReLU or not act.inplace:
        return None
    parts = [block, act, drop_path]  # all modules that would run
    units, gate, shortcut = [], None, None
    for name in ("conv1", "conv2") if kind is BasicBlock else ("conv1", "conv2", "conv3"):
        unit = _read_unit(get(name), parts)
        if unit is None:
            return None
        units.append(unit)
    if type(se) is nn.Identity:
        parts.append(se)
    elif not _is_none(block, "se", se) and (gate := _read_gate(se, parts)) is None:
        return None
    if type(downsample) is nn.Identity:
        parts.append(downsample)
    elif not _is_none(block, "downsample", downsample) and (shortcut := _read_shortcut(downsample, parts)) is None:
        return None
    return PlainBlock(units, gate, shortcut) if _are_untouched(parts) else None


def run_block(plain: PlainBlock, x: Tensor, tape: Tape) -> tuple[Tensor, tuple[Source, Source]]:
    """Run a block; its output, a ReLU, and how the two terms of the sum before that can be had again.

    Args:
        plain: the block.
        x: what it takes.
        tape: the open one.
    """
    units, gate, shortcut = plain
    source = tape.find(x)
    if shortcut is None:
        y, source_of_y = x, source
    else:
        y, source_of_y = _run_shortcut(*shortcut, x, source, tape)
    z, source = _run_unit(units[0], x, source, tape)
    z, source = _run_unit(units[1], z, source, tape)
    if gate is not None:
        squeezed = torch.relu_(F.conv2d(z.mean((2, 3), keepdim=True), *gate[0]))
        excitation = torch.sigmoid(F.conv2d(squeezed, *gate[1]))
        z = z * excitation
        source = tape.add_product(z, source, excitation)
    if len(units) == 3:
        z, source = _run_unit(units[2], z, source, tape)
    return torch.relu_(z + y), (source, source_of_y)


def _are_untouched(parts: list[nn.Module]) -> bool:
    """Whether modules have neither hooks nor methods of their own, nor tensors instead of parameters."""
    for part in parts:
        fields = part.__dict__
        if (
            fields["_forward_hooks"]
            or fields["_forward_pre_hooks"]
            or fields["_backward_hooks"]
            or fields["_backward_pre_hooks"]
            or "forward" in fields
            or "_call_impl" in fields
            or "_conv_forward" in fields
            or "_compiled_call_impl" in fields
            or "weight" in fields
            or "bias" in fields
        ):
            return False
    return True


def _is_none(module: nn.Module, name: str, part: nn.Module | None) -> bool:
    """Whether a part is absent, and not deleted, which is an error when the block runs."""
    return part is None and hasattr(module, name)


def _read_unit(unit: nn.Module | None, parts: list[nn.Module]) -> _Unit | None:
    if type(unit) is not ConvNormAct:
        return None
    get = unit.__dict__["_modules"].get
    conv, norm, aa = get("conv"), get("bn"), get("aa")
    convolution = _read_convolution(conv)
    if convolution is None or type(norm) is not ActivatedBatchNorm2d:
        return None
    children, parameters, buffers, training, tracks, momentum, eps, synchronized = _get_norm(norm.__dict__)
    gamma, beta = parameters.get("weight"), parameters.get("bias")
    mean, var, count = buffers.get("running_mean"), buffers.get("running_var"), buffers.get("num_batches_tracked")
    act, drop = children.get("act"), children.get("drop")
    weight, settings = convolution
    usual = (
        type(gamma) is type(beta) is nn.Parameter
        and type(mean) is type(var) is type(count) is Tensor
        and weight.requires_grad
        and gamma.requires_grad
        and beta.requires_grad
        and settings[0] is None
        and training
        and tracks
        and momentum is not None
        and isinstance(eps, int | float)
        and eps > 0
        and not synchronized
        and type(drop) is nn.Identity
        and gamma.is_contiguous()
        and beta.is_contiguous()
        and mean.is_contiguous()
        and var.is_contiguous()
    )
    if not usual:
        return None
    slope = blur = None
    if type(act) is nn.LeakyReLU and act.inplace and type(act.negative_slope) is float:
        slope = act.negative_slope
    elif type(act) is not nn.Identity:
        return None
    if type(aa) is BlurPool2d:
        blur = aa._buffers.get("kernel"), aa.stride, aa.dilation
        if list(map(type, blur)) != [Tensor, int, int] or blur[0].requires_grad:
            return None
    elif not _is_none(unit, "aa", aa) and type(aa) is not nn.Identity:
        return None
    parts += unit, conv, norm, act, drop, *([] if aa is None else [aa])
    arguments = (gamma, beta, mean, var, True, momentum, eps, slope)
    return weight, settings, arguments, count, blur, unit.__dict__["expands"]


def _read_shortcut(downsample: nn.Module, parts: list[nn.Module]) -> tuple[bool, _Unit] | None:
    """Whether it pools, and the unit behind that."""
    layers = list(downsample.__dict__["_modules"].values()) if type(downsample) is nn.Sequential else []
    pools = len(layers) == 2 and type(layers[0]) is ShortcutPool2d
    if len(layers) != 1 + pools:
        return None
    unit = _read_unit(layers[-1], parts)
    parts += downsample, *layers[:pools]
    return None if unit is None else (pools, unit)


def _read_gate(se: nn.Module | None, parts: list[nn.Module]) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
    """Arguments of the two convolutions, without what they take."""
    if type(se) is not SqueezeExcite:
        return None
    get = se.__dict__["_modules"].get
    fc1, norm, act, fc2, gate = get("fc1"), get("bn"), get("act"), get("fc2"), get("gate")
    if type(norm) is not nn.Identity:
        return None
    first, second = _read_convolution(fc1), _read_convolution(fc2)
    if first is None or second is None or type(act) is not ReLU or not act.inplace or type(gate) is not nn.Sigmoid:
        return None
    parts += se, fc1, norm, act, fc2, gate
    return (first[0], *first[1]), (second[0], *second[1])


def _read_convolution(conv: nn.Module | None) -> tuple[Tensor, tuple[Any, ...]] | None:
    """The weight and the other arguments of a convolution, without what it takes."""
    if type(conv) is not nn.Conv2d:
        return None
    parameters, stride, padding, dilation, groups, padding_mode = _get_convolution(conv.__dict__)
    weight = parameters.get("weight")
    tuples = type(stride) is type(padding) is type(dilation) is tuple  # a list may be edited until backward
    if type(weight) is not nn.Parameter or not tuples or type(groups) is not int or padding_mode != "zeros":
        return None
    return weight, (parameters.get("bias"), stride, padding, dilation, groups)


def _run_shortcut(pools: bool, unit: _Unit, x: Tensor, source: Source, tape: Tape) -> tuple[Tensor, Source]:
    if pools:
        x = pool_recorded(x)
        source = tape.find(x)
    return _run_unit(unit, x, source, tape)


def _run_unit(unit: _Unit, x: Tensor, source: Source, tape: Tape) -> tuple[Tensor, Source]:
    weight, settings, norm, num_batches_tracked, blur, expands = unit
    y = F.conv2d(x, weight, *settings)
    source = tape.add_convolution(y, source, settings, expands)
    num_batches_tracked.add_(1)
    y, node, function = run_norm(y, *norm)
    if blur is None:
        return y, tape.add_inner_norm(source, node, y, function)
    tape.add_norm(source, node, y, function)
    y = blur_pool(y, *blur)
    return y, tape.find(y)

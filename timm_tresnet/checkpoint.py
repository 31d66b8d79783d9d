"""Weights under the official names, and stems for other numbers of channels, as a TResNet takes them."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_STEM = "body.conv1.conv.weight"

# `conv1.0.weight`: convolution, `conv1.1.weight`: In-Place ABN; with a blur behind them `conv1.0.0.weight`,
# `conv1.0.1.weight`; in a shortcut `downsample.0.0.weight` or, behind an average pool, `downsample.1.0.weight`.
_OFFICIAL_CONV = re.compile(r"(?P<layer>\bconv\d)(?:\.0)?\.(?P<part>[01])\.(?P<tensor>\w+)$")
_OFFICIAL_SHORTCUT = re.compile(r"(?P<layer>\bdownsample\.[01])\.(?P<part>[01])\.(?P<tensor>\w+)$")
_PARTS = {"0": "conv", "1": "bn"}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Make a checkpoint loadable into model: ours and timm's names as they are, the official ones translated.

    A checkpoint of the official code has its tensors under `model` or `state_dict`, maybe each behind `module.`, and
    In-Place ABN in place of batch norm, whose effective weight is |w| + 1e-5 (official code,
    `InplacABN_to_ABN`). A stem for another number of channels is adapted, see `adapt_stem`.

    Args:
        state_dict: the checkpoint.
        model: the TResNet that is to load it.

    Returns:
        Tensors under the names of model.
    """
    for wrapper in ("model", "state_dict"):
        state_dict = state_dict.get(wrapper, state_dict)
    state_dict = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    if "body.conv1.0.weight" in state_dict:
        state_dict = from_official(state_dict)
    if _STEM in state_dict:
        state_dict[_STEM] = adapt_stem(state_dict[_STEM], model.get_parameter(_STEM).shape[1])
    return state_dict


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate names and In-Place-ABN weights of the official code into those of a TResNet with batch norm.

    Args:
        state_dict: tensors under the official names, without wrapper and prefix.

    Returns:
        The same tensors under our names; batch norm weights are |w| + 1e-5, constant blur kernels are left out.
    """
    converted = {}
    for name, tensor in state_dict.items():
        if name.endswith(".op.filt"):
            continue
        match = _OFFICIAL_CONV.search(name) or _OFFICIAL_SHORTCUT.search(name)
        if match:
            part = _PARTS[match["part"]]
            name = f"{name[: match.start()]}{match['layer']}.{part}.{match['tensor']}"
            if part == "bn" and match["tensor"] == "weight":
                tensor = tensor.abs() + 1e-5
        converted[name] = tensor
    return converted


def adapt_stem(weight: Tensor, in_channels: int) -> Tensor:
    """Adapt the first convolution of a pretrained network to images with another number of channels.

    A single channel takes the sum over the old ones, which is right for grey images. More channels repeat the old ones
    in turn, scaled so that the activations keep their size. Both happen within each pixel of a space-to-depth patch.

    Args:
        weight: weight of the convolution, (out_channels, pixels * old image channels, height, width); pixels is 16 for
            the 3x3 convolution behind SpaceToDepth and 1 for the 7x7 convolution.
        in_channels: pixels * new image channels.

    Returns:
        (out_channels, in_channels, height, width), single precision or better; the same tensor if the number of
        channels is right already.
    """
    if weight.shape[1] == in_channels:
        return weight
    pixels = 16 if weight.shape[-1] == 3 else 1
    old, new = weight.shape[1] // pixels, in_channels // pixels
    dtype = torch.promote_types(weight.dtype, torch.float32)  # half-precision checkpoints are adapted in single
    by_pixel = weight.to(dtype).unflatten(1, (pixels, old))
    if new == 1:
        adapted = by_pixel.sum(2, keepdim=True)
    else:
        adapted = by_pixel[:, :, torch.arange(new) % old] * (old / new)
    return adapted.flatten(1, 2)

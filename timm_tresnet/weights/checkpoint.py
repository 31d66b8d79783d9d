"""Weights under the official names, and stems for other numbers of channels, as a TResNet takes them."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_tresnet.models.layers import MLDecoderHead

_logger = logging.getLogger(__name__)

_HEAD = "head."
QUERIES = "head.queries.vectors"
_OF_CLASSES = {"head.fc.weight", "head.fc.bias", QUERIES}
_STEM = "body.conv1.conv.weight"
OFFICIAL_STEM = "body.conv1.0.weight"

# Where training code puts weights, best first: of two, the moving average is the one that was evaluated.
_WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model")
_MAX_WRAPPERS = 4  # a pickle can hold a dict that contains itself
_PREFIX = re.compile(r"(?P<prefix>(?:.*\.)?)body\.conv1\.(?:0|conv)\.weight$")

# `conv1.0.weight`: convolution, `conv1.1.weight`: In-Place ABN; with a blur behind them `conv1.0.0.weight`,
# `conv1.0.1.weight`; in a shortcut `downsample.0.0.weight` or, behind an average pool, `downsample.1.0.weight`.
_OFFICIAL_CONV = re.compile(r"(?P<layer>\bconv\d)(?:\.0)?\.(?P<part>[01])\.(?P<tensor>\w+)$")
_OFFICIAL_SHORTCUT = re.compile(r"(?P<layer>\bdownsample\.[01])\.(?P<part>[01])\.(?P<tensor>\w+)$")
_PARTS = {"0": "conv", "1": "bn"}
_OFFICIAL_CLASSIFIER = "head.decoder.duplicate_pooling"
_OFFICIAL_HEAD = {  # bottleneck (Alibaba-MIIL/ASL); ML-Decoder (Alibaba-MIIL/ML_Decoder)
    "head.fc.embedding_generator.0.": "head.embedding.",
    "head.fc.FC.": "head.fc.",
    "head.decoder.embed_standart.": "head.embedding.",
    "head.decoder.query_embed.weight": "head.queries.vectors",
    "head.wordvec_proj.": "head.queries.embed.fc.",
    "head.decoder.layers.0.norm1.": "head.queries.norm.",
    "head.decoder.layers.0.multihead_attn.out_proj.": "head.decoder.proj.",
    "head.decoder.layers.0.norm2.": "head.decoder.norm2.",
    "head.decoder.layers.0.norm3.": "head.decoder.norm3.",
    "head.decoder.layers.0.linear1.": "head.decoder.mlp.fc1.",
    "head.decoder.layers.0.linear2.": "head.decoder.mlp.fc2.",
    "head.decoder.duplicate_pooling_bias": "head.fc.bias",
    _OFFICIAL_CLASSIFIER: "head.fc.weight",
}
_OFFICIAL_PROJECTION = "head.decoder.layers.0.multihead_attn.in_proj_"  # of queries, then of keys and values


def checkpoint_filter_fn(
    state_dict: Mapping[str, Any], model: nn.Module, other_head: bool = False
) -> dict[str, Tensor]:
    """Make a checkpoint loadable into model: ours and timm's names as they are, the official ones translated.

    A checkpoint of the official code has its tensors under `model` or `state_dict`, maybe each behind `module.`, and
    In-Place ABN in place of batch norm, whose effective weight is |w| + 1e-5 (official code,
    `InplacABN_to_ABN`). A stem for another number of channels is adapted, see `adapt_stem`.

    Args:
        state_dict: the checkpoint.
        model: the TResNet that is to load it.
        other_head: model was asked to have another head than the checkpoint's. What does not fit stays as it was drawn:
            only the classifier if the rest of the head fits, else all of it.

    Returns:
        Tensors under the names of model.
    """
    state_dict = unwrap(state_dict)
    state_dict = from_official(state_dict) if OFFICIAL_STEM in state_dict else rename_head(state_dict)
    head = getattr(model, "head", None)
    if other_head and isinstance(head, nn.Module):
        state_dict = _fit_other_head(state_dict, head)
    if QUERIES in state_dict and isinstance(head, MLDecoderHead) and head.decodes:
        _fit_queries(state_dict, head)
    if _STEM in state_dict:
        state_dict[_STEM] = adapt_stem(state_dict[_STEM], model.get_parameter(_STEM).shape[1])
    return state_dict


def _fit_other_head(state_dict: dict[str, Tensor], head: nn.Module) -> dict[str, Tensor]:
    """Put what head was drawn with in place of what does not fit it, and say so."""
    own = head.state_dict(prefix=_HEAD)
    in_file = {name: tensor for name, tensor in state_dict.items() if name.startswith(_HEAD)}
    misfits = {
        name
        for name in own.keys() | in_file.keys()
        if name not in own or name not in in_file or own[name].shape != in_file[name].shape
    }
    if misfits <= _OF_CLASSES:
        new = {name: own[name] for name in misfits & own.keys()}
        in_file = {name: tensor for name, tensor in in_file.items() if name not in misfits}
    else:
        new, in_file = own, {}
    if new:
        _logger.info("The head differs from that of the weights, so these are new: %s", ", ".join(sorted(new)))
    body = {name: tensor for name, tensor in state_dict.items() if not name.startswith(_HEAD)}
    return {**body, **in_file, **new}


def _fit_queries(state_dict: dict[str, Tensor], head: MLDecoderHead) -> None:
    """Leave out queries for other classes, as timm does with the classifier, which of labels is the same for all."""
    queries, bias = state_dict[QUERIES], state_dict.get("head.fc.bias", torch.empty(0))
    classes = queries.shape[0] if head.label_embedding else bias.numel()
    if head.num_classes and head.num_classes != classes:
        del state_dict[QUERIES]
    if head.label_embedding:  # timm takes the last layer out of the state dict if the number of classes differs
        own = head.state_dict(prefix=_HEAD)
        for name in ("head.fc.weight", "head.fc.bias"):
            if name in state_dict and state_dict[name].shape == own[name].shape:
                own[name].copy_(state_dict[name])


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Take the weights of a TResNet out of what training code wraps around them.

    Args:
        checkpoint: what the file holds: the weights themselves, or a dict that has them under `model`, `state_dict` or
            the like, a moving average before the weights it averages.

    Returns:
        The weights, without the prefix that the stem has, such as `module.`; names without that prefix stay.

    Raises:
        ValueError: if two names are the same without their prefix.
    """
    for _ in range(_MAX_WRAPPERS):
        inner = [checkpoint[name] for name in _WRAPPERS if isinstance(checkpoint.get(name), Mapping)]
        if not inner:
            break
        checkpoint = inner[0]
    stems = (_PREFIX.match(name) for name in checkpoint if isinstance(name, str))
    prefix = next((match["prefix"] for match in stems if match), "")
    weights = {
        name.removeprefix(prefix) if isinstance(name, str) else name: value for name, value in checkpoint.items()
    }
    if len(weights) < len(checkpoint):
        twice = sorted(name for name in checkpoint if f"{prefix}{name}" in checkpoint)
        raise ValueError(f"the checkpoint holds two tensors for {', '.join(twice)}: with and without {prefix!r}")
    return weights


def from_official(state_dict: Mapping[str, Tensor], inplace_abn: bool = True) -> dict[str, Tensor]:
    """Translate names and In-Place-ABN weights of the official code into those of a TResNet with batch norm.

    Args:
        state_dict: tensors under the official names, without wrapper and prefix.
        inplace_abn: norms are In-Place ABN; False if they were replaced by plain ones, which have the same names.

    Returns:
        The same tensors under our names; In-Place-ABN weights are |w| + 1e-5 in single precision or better, constant
        blur kernels are left out.

    Raises:
        ValueError: if two tensors would get the same name.
    """
    converted = {}
    for name, tensor in rename_head(state_dict).items():
        if name.endswith(".op.filt"):
            continue
        match = _OFFICIAL_CONV.search(name) or _OFFICIAL_SHORTCUT.search(name)
        if match:
            part = _PARTS[match["part"]]
            name = f"{name[: match.start()]}{match['layer']}.{part}.{match['tensor']}"
            if inplace_abn and name.endswith(".bn.weight"):
                tensor = batch_norm_weight(tensor)
        if name in converted:
            raise ValueError(f"the checkpoint holds two tensors for {name}")
        converted[name] = tensor
    return converted


def rename_head(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate the official names of the heads; every other name stays.

    The projection of ML-Decoder's attention becomes one for its queries and one for its keys and values, and its layer
    for all labels that of a `torch.nn.Linear`.

    Raises:
        ValueError: if two tensors would get the same name.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        parts = {name: tensor}
        official = next((prefix for prefix in _OFFICIAL_HEAD if name.startswith(prefix)), None)
        if official:
            parts = {_OFFICIAL_HEAD[official] + name.removeprefix(official): tensor}
            if name == _OFFICIAL_CLASSIFIER and tensor.ndim == 2:
                parts = {"head.fc.weight": tensor.T}
        elif name.startswith(_OFFICIAL_PROJECTION) and tensor.ndim and len(tensor) % 3 == 0:
            query, key_value = tensor.split([len(tensor) // 3, len(tensor) // 3 * 2])
            kind = name.removeprefix(_OFFICIAL_PROJECTION)
            parts = {f"head.queries.proj.{kind}": query, f"head.decoder.kv.{kind}": key_value}
        twice = parts.keys() & renamed.keys()
        if twice:
            raise ValueError(f"the checkpoint holds two tensors for {', '.join(twice)}")
        renamed |= parts
    return renamed


def batch_norm_weight(weight: Tensor) -> Tensor:
    """Effective weight of In-Place ABN, |w| + 1e-5, in single precision or better: half loses the 1e-5."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).abs() + 1e-5


def find_misfits(
    shapes: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]
) -> tuple[list[str], list[str], list[str]]:
    """Compare names and shapes of weights with those of a network.

    Args:
        shapes: shape of each tensor by its name.
        expected: those of the network.

    Returns:
        Names that are missing, where counters of batches may be; names that are unexpected; names with a wrong shape,
        which is named.
    """
    missing = [name for name in expected if name not in shapes and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in shapes if name not in expected]
    misshapen = [
        f"{name} {tuple(shapes[name])} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != tuple(shape)
    ]
    return missing, unexpected, misshapen


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

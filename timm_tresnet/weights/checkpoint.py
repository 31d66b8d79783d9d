"""Find the weights of a TResNet in a checkpoint, rename official tensors, and adapt stems to other channels."""

import dataclasses
import logging
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_tresnet.models.layers import MLDecoderHead, Query2LabelHead
from timm_tresnet.utils.terminal import escape

_logger = logging.getLogger(__name__)

_HEAD = "head."
QUERIES = "head.queries.vectors"
_OF_CLASSES = {"head.fc.weight", "head.fc.bias", QUERIES}
_STEM = "body.conv1.conv.weight"
OFFICIAL_STEM = "body.conv1.0.weight"

_WRAPPERS = r"(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.)"
_WRAPPER = re.compile(rf"(?:^|(?<=\.)){_WRAPPERS}")
_PREFIX = re.compile(
    rf"(?P<prefix>(?:.*\.)?)body\.{_WRAPPERS}*conv1\.{_WRAPPERS}*(?:0|conv)\.{_WRAPPERS}*weight$", re.DOTALL
)
_MOST_CONTAINERS = 100_000  # dicts and lists that are searched; an optimizer's state has thousands
# Of several networks in a file, the moving average is usually the evaluated one.
_AVERAGE = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged?)(?:[._]|$)", re.IGNORECASE)
_PLAIN = {"", "state", "dict", "model", "models", "module", "net", "network", "params", "weights", "timm", "backbone"}

# `conv1.0.weight`: convolution, `conv1.1.weight`: In-Place ABN; before a blur `conv1.0.0.weight`, `conv1.0.1.weight`;
# in a shortcut `downsample.0.0.weight` or, after an average pool, `downsample.1.0.weight`.
_OFFICIAL_CONV = re.compile(r"(?P<layer>\bconv\d)(?:\.0)?\.(?P<part>[01])\.(?P<tensor>\w+)$")
_OFFICIAL_SHORTCUT = re.compile(r"(?P<layer>\bdownsample\.[01])\.(?P<part>[01])\.(?P<tensor>\w+)$")
# FReLU of 7eu7d7/ML-Danbooru: `conv1.2.…` after the norm, `relu.…` after the sum.
_OFFICIAL_FRELU = re.compile(
    r"(?:(?P<layer>\bconv\d)(?:\.0)?\.2|\brelu)\.depthwise_conv_bn\.(?P<part>[01])\.(?P<tensor>\w+)$"
)
_FRELU = re.compile(r"\.(?:depthwise_conv_bn|act\.funnel)\.")
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
    "head.decoder.layers.0.multihead_attn.proj.": "head.decoder.proj.",  # xformers'
    "head.decoder.layers.0.norm2.": "head.decoder.norm2.",
    "head.decoder.layers.0.norm3.": "head.decoder.norm3.",
    "head.decoder.layers.0.linear1.": "head.decoder.mlp.fc1.",
    "head.decoder.layers.0.linear2.": "head.decoder.mlp.fc2.",
    "head.decoder.duplicate_pooling_bias": "head.fc.bias",
    _OFFICIAL_CLASSIFIER: "head.fc.weight",
}
_OFFICIAL_PROJECTION = "head.decoder.layers.0.multihead_attn.in_proj_"  # of queries, then of keys and values
_XFORMERS_PROJECTION = "head.decoder.layers.0.multihead_attn.in_proj_container.{}_proj.{}"


# Query2Label's layers, and the tensors outside them
_QUERY2LABEL_LAYER = re.compile(r"transformer\.(?P<coder>en|de)coder\.layers\.(?P<index>\d)\.(?P<rest>.*)", re.DOTALL)
_ATTENTION = "attn.qkv."
_QUERY2LABEL_PARTS = {
    attention: {
        f"{attention}in_proj_": _ATTENTION,
        f"{attention}out_proj.": "attn.proj.",
        "linear1.": "mlp.fc1.",
        "linear2.": "mlp.fc2.",
        f"norm{first}.": "norm1.",
        f"norm{first + 1}.": "norm2.",
    }
    for attention, first in (("self_attn.", 1), ("multihead_attn.", 2))
}
_QUERY2LABEL = {
    "transformer.decoder.norm.weight": "head.norm.weight",
    "transformer.decoder.norm.bias": "head.norm.bias",
    "input_proj.bias": "head.embedding.bias",
    "query_embed.weight": QUERIES,
    "fc.W": "head.fc.weight",
    "fc.b": "head.fc.bias",
}


def checkpoint_filter_fn(
    state_dict: Mapping[str, Any], model: nn.Module, other_head: bool = False
) -> dict[str, Tensor]:
    """Turn a checkpoint into a state dict for model; official names are translated, timm's and ours stay.

    A checkpoint of the official code has its tensors under `model` or `state_dict`, perhaps with the prefix `module.`.
    It has In-Place ABN in place of batch norm, with the effective weight |w| + 1e-5 (official code,
    `InplacABN_to_ABN`). A stem for another number of channels is adapted, see `adapt_stem`.

    Args:
        state_dict: the checkpoint.
        model: the TResNet that will load the result.
        other_head: whether the user chose another head than the checkpoint's. Then the classifier, or the whole head if
            more of it does not fit, keeps its random weights.

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
    elif QUERIES in state_dict and isinstance(head, Query2LabelHead) and len(state_dict[QUERIES]) != head.num_classes:
        del state_dict[QUERIES]
    if _STEM in state_dict:
        state_dict[_STEM] = adapt_stem(state_dict[_STEM], model.get_parameter(_STEM).shape[1])
    return state_dict


def _fit_other_head(state_dict: dict[str, Tensor], head: nn.Module) -> dict[str, Tensor]:
    """Replace tensors that do not fit the head by the head's own random ones, and log their names."""
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
        names = escape(", ".join(sorted(new)))
        _logger.info("The head differs from the checkpoint's head; these tensors keep their random values: %s", names)
    body = {name: tensor for name, tensor in state_dict.items() if not name.startswith(_HEAD)}
    return {**body, **in_file, **new}


def _fit_queries(state_dict: dict[str, Tensor], head: MLDecoderHead) -> None:
    """Drop queries for another number of classes, as timm does with a classifier.

    With label embeddings, the last layer is shared by all labels and fits any number of classes, so it is copied here.
    """
    queries, bias = state_dict[QUERIES], state_dict.get("head.fc.bias", torch.empty(0))
    classes = queries.shape[0] if head.label_embedding else bias.numel()
    if head.num_classes and head.num_classes != classes:
        del state_dict[QUERIES]
    if head.label_embedding:  # timm removes the last layer from the state dict if the number of classes differs
        own = head.state_dict(prefix=_HEAD)
        for name in ("head.fc.weight", "head.fc.bias"):
            if name in state_dict and state_dict[name].shape == own[name].shape:
                own[name].copy_(state_dict[name])


@dataclasses.dataclass(frozen=True)
class FoundNetwork:
    """The weights of a TResNet in a checkpoint.

    Args:
        key: path of the weights, joined by dots, such as "state_dict_ema"; "" if the checkpoint is the weights.
        tensors: the network's tensors by name, without prefix and wrappers.
        others: names beside them that are not part of the network.
        beside: the tensors among the others by name, without wrappers.
    """

    key: str
    tensors: dict[str, Tensor]
    others: tuple[str, ...] = ()
    beside: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def find_networks(checkpoint: Any) -> list[FoundNetwork]:
    """Find the weights of all TResNets in a checkpoint.

    A network is found by its stem's weight: in the checkpoint itself or in nested dicts and lists, with any prefix such
    as `model.` or `module.`. Name parts that `torch.compile`, DDP and FSDP insert are removed.

    Args:
        checkpoint: content of the file.

    Raises:
        ValueError: if two names are equal without their wrappers.
    """
    found: list[FoundNetwork] = []
    seen: set[int] = set()
    waiting = deque([("", checkpoint)])
    while waiting and len(seen) < _MOST_CONTAINERS:
        key, holder = waiting.popleft()
        if id(holder) in seen:  # a pickle can hold a dict that contains itself
            continue
        seen.add(id(holder))
        if isinstance(holder, Mapping):
            found += _find_in(key, holder)
        for name, value in holder.items() if isinstance(holder, Mapping) else enumerate(holder):
            if isinstance(value, Mapping | list | tuple):
                waiting.append((f"{key}.{name}" if key else str(name), value))
    return found


def _find_in(key: str, holder: Mapping[Any, Any]) -> Iterator[FoundNetwork]:
    tensors = {name: value for name, value in holder.items() if isinstance(name, str) and isinstance(value, Tensor)}
    matches = (_PREFIX.match(name) for name in tensors)
    prefixes = list(dict.fromkeys(match["prefix"] for match in matches if match))
    for prefix in prefixes:
        deeper = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
        own: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name.startswith(prefix) and not name.startswith(deeper):
                plain = _WRAPPER.sub("", name.removeprefix(prefix))
                if plain in own:
                    raise ValueError(f"the checkpoint has two tensors for {plain}, one of them as {name}")
                own[plain] = tensor
        others = [str(name) for name in holder if name not in tensors or not name.startswith(prefix)]
        twice = sorted(name for name in others if name in own)
        if twice and "" not in prefixes:
            raise ValueError(f"the checkpoint has two tensors for {', '.join(twice)}: with and without {prefix!r}")
        names = [key, _WRAPPER.sub("", prefix).rstrip(".")]
        beside = {_WRAPPER.sub("", name): tensors[name] for name in tensors if not name.startswith(prefix)}
        yield FoundNetwork(".".join(filter(None, names)), own, tuple(others), beside)


def choose_network(networks: Sequence[FoundNetwork], key: str | None = None) -> FoundNetwork:
    """Choose one of the networks in a checkpoint.

    Args:
        networks: from `find_networks`, at least one.
        key: key of the network; None for the likeliest. A moving average is likelier than the weights that it averages;
            these are likelier than networks with other names, such as a teacher.

    Raises:
        ValueError: if no network has this key, or several are equally likely; the message names them.
    """
    keys = ", ".join(repr(network.key) for network in networks)
    if key is not None:
        named = [network for network in networks if network.key == key]
        if not named:
            raise ValueError(f"needs the key of a network in the file, one of {keys}, got {key!r}")
        return named[0]
    ranks = [_rank(network.key) for network in networks]
    likely = [network for network, rank in zip(networks, ranks, strict=True) if rank == min(ranks)]
    if len(likely) > 1:
        raise ValueError(f"has {len(networks)} networks, {keys}; choose one by its key (--key in the command)")
    return likely[0]


def _rank(key: str) -> int:
    if _AVERAGE.search(key):
        return 0
    return 1 if {word for word in re.split(r"[._]", key) if not word.isdigit()} <= _PLAIN else 2


def unwrap(checkpoint: Mapping[str, Any], key: str | None = None) -> dict[str, Any]:
    """Return the weights of a TResNet from a checkpoint of training code.

    Args:
        checkpoint: content of the file.
        key: key of the network, see `choose_network`.

    Returns:
        The weights, without prefix and wrappers; the unchanged checkpoint if it contains no TResNet.

    Raises:
        ValueError: as in `find_networks` and `choose_network`.
    """
    networks = find_networks(checkpoint)
    return choose_network(networks, key).tensors if networks else dict(checkpoint)


def has_frelu(names: Iterable[str]) -> bool:
    """Return whether a network has FReLU, by the names of its tensors."""
    return any(_FRELU.search(name) for name in names)


def from_official(state_dict: Mapping[str, Tensor], inplace_abn: bool | None = None) -> dict[str, Tensor]:
    """Translate names and In-Place-ABN weights of the official code to a TResNet with batch norm.

    Args:
        state_dict: tensors under the official names, without wrapper and prefix.
        inplace_abn: whether the norms are In-Place ABN; batch norms in their place have the same names. None to decide
            by the names: networks with FReLU have batch norms (7eu7d7/ML-Danbooru,
            src_files/models/tresnet/tresnet_f.py, commit bd0e61e), others In-Place ABN.

    Returns:
        The same tensors under our names. In-Place-ABN weights become |w| + 1e-5 in single precision or better; constant
        blur kernels are left out.

    Raises:
        ValueError: if two tensors would get the same name.
    """
    converted = {}
    inplace_abn = not has_frelu(state_dict) if inplace_abn is None else inplace_abn
    for name, tensor in rename_head(state_dict).items():
        if name.endswith(".op.filt"):
            continue
        match = _OFFICIAL_CONV.search(name) or _OFFICIAL_SHORTCUT.search(name)
        if match:
            part = _PARTS[match["part"]]
            name = f"{name[: match.start()]}{match['layer']}.{part}.{match['tensor']}"
            if inplace_abn and name.endswith(".bn.weight"):
                tensor = batch_norm_weight(tensor)
        elif match := _OFFICIAL_FRELU.search(name):
            layer = f"{match['layer']}." if match["layer"] else ""
            name = f"{name[: match.start()]}{layer}act.funnel.{_PARTS[match['part']]}.{match['tensor']}"
        if name in converted:
            raise ValueError(f"the checkpoint has two tensors for {name}")
        converted[name] = tensor
    return converted


def rename_head(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate the official names of the heads; all other names stay.

    ML-Decoder's attention has one projection, or three with xformers; it becomes one for queries and one for keys and
    values. The classifier that all labels share becomes the weight of a `torch.nn.Linear`.

    Raises:
        ValueError: if two tensors would get the same name.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in _join_projections(state_dict).items():
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
            raise ValueError(f"the checkpoint has two tensors for {', '.join(twice)}")
        renamed |= parts
    return renamed


def from_query2label(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate the names of Query2Label's transformer, stored beside the network (SlongLiu/query2labels, 55eb050).

    Args:
        state_dict: tensors under the official names, without wrapper.

    Returns:
        The same tensors under our names, with the prefix "head."; empty unless the transformer has the published
        layers: one encoder layer, and two decoder layers without self-attention.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        match = _QUERY2LABEL_LAYER.fullmatch(name)
        if match:
            layer = "head.encoder." if match["coder"] == "en" else f"head.decoder.{match['index']}."
            parts = _QUERY2LABEL_PARTS["self_attn." if match["coder"] == "en" else "multihead_attn."]
            official = next((part for part in parts if match["rest"].startswith(part)), "")
            kind = match["rest"].removeprefix(official)
            if not official:
                return {}
            if parts[official] == _ATTENTION and tensor.ndim and len(tensor) % 3 == 0:
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    converted[f"{layer}attn.{letter}.{kind}"] = part
            else:
                converted[f"{layer}{parts[official]}{kind}"] = tensor
        elif name == "input_proj.weight":
            converted["head.embedding.weight"] = tensor.flatten(1)
        elif name in _QUERY2LABEL:
            converted[_QUERY2LABEL[name]] = tensor[0] if name.startswith("fc.") and tensor.ndim > 1 else tensor
    layers = {name.split(".attn.")[0] for name in converted if ".attn." in name}
    return converted if layers == {"head.encoder", "head.decoder.0", "head.decoder.1"} else {}


def _join_projections(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the three projections of xformers' attention into PyTorch's single one."""
    joined = dict(state_dict)
    for kind in ("weight", "bias"):
        names = [_XFORMERS_PROJECTION.format(each, kind) for each in "qkv"]
        parts = [joined[name] for name in names if name in joined]
        whole = _OFFICIAL_PROJECTION + kind
        if len(parts) == 3 and len({part.shape for part in parts}) == 1 and parts[0].ndim and whole not in joined:
            joined[whole] = torch.cat(parts)
            for name in names:
                del joined[name]
    return joined


def batch_norm_weight(weight: Tensor) -> Tensor:
    """Return In-Place ABN's effective weight, |w| + 1e-5, in single precision or better; half would lose the 1e-5."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).abs() + 1e-5


def find_misfits(
    shapes: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]
) -> tuple[list[str], list[str], list[str]]:
    """Compare names and shapes of weights with those of a network.

    Args:
        shapes: shape of each tensor by its name.
        expected: shape of each of the network's tensors by its name.

    Returns:
        Missing names, without `num_batches_tracked`; unexpected names; names with a wrong shape, each with its shapes.
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

    For one channel, the weights are summed over the old channels, which is exact for grey images. For more channels,
    the old ones are repeated in turn and scaled so that activations keep their size. Both are done for each pixel of a
    space-to-depth patch.

    Args:
        weight: weight of the convolution, (out_channels, pixels * old image channels, height, width); pixels is 16 for
            the 3x3 convolution after SpaceToDepth and 1 for the 7x7 convolution.
        in_channels: pixels * new image channels.

    Returns:
        (out_channels, in_channels, height, width), single precision or better; the same tensor if the number of
        channels already fits.
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

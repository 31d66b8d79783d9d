"""Recognise a checkpoint's architecture, head and classes by the names and shapes of its tensors."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timm_tresnet.conversion.reading import extract_tensors, shorten_names
from timm_tresnet.tresnet import ARCHITECTURES, TResNet
from timm_tresnet.weights.checkpoint import (
    OFFICIAL_STEM,
    QUERIES,
    batch_norm_weight,
    choose_network,
    find_misfits,
    find_networks,
    from_official,
    from_query2label,
    has_frelu,
    rename_head,
)
from timm_tresnet.weights.labels import order_names

_STEM = "body.conv1.conv.weight"
_QUERY2LABEL = re.compile(r"(module\.)?(transformer\.|input_proj\.|query_embed\.weight$|fc\.[Wb]$|backbone\.1\.pe$)")
_DEPTH_SHOWN = 3
_DIMENSIONS = {  # allowed dimensions of the tensors that show a head's arguments
    "head.fc.weight": (2, 3),
    "head.fc.bias": (1,),
    "head.embedding.weight": (2,),
    "head.queries.embed.fc.weight": (2,),
    QUERIES: (2,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recognised:
    """A checkpoint, recognised by its tensors.

    Args:
        architecture: name of the variant.
        model_args: arguments of `TResNet` that differ from the variant's.
        state_dict: the weights under this package's names, in single precision.
        head: kind of head in the file: "linear", "bottleneck", "ml_decoder", "query2label" (left out if num_classes is
            0) or "none".
        num_classes: classes of that head; 0 for none, and for an ML-Decoder head whose label embeddings are missing.
        layout: naming scheme of the file, "official" or "timm".
        inplace_abn: whether norm weights were treated as In-Place ABN's and became |w| + 1e-5.
        least_norm_weight: smallest norm weight in the file if In-Place ABN was inferred from the names; else None.
        dtypes: floating-point dtypes in the file other than single precision.
        class_names: usable class names in the file (ASL and ML-Decoder store them); empty if there are none.
        names_fault: why class names in the file are unusable or incomplete; empty if there are none, or they are
            complete.
        key: key of the network in the file, see `weights.checkpoint.choose_network`.
        other_keys: keys of the other networks in the file.
        left_out: names in the file that are not part of the network.
    """

    architecture: str
    model_args: dict[str, Any]
    state_dict: dict[str, Tensor]
    head: str
    num_classes: int
    layout: str
    inplace_abn: bool
    least_norm_weight: float | None = None
    dtypes: frozenset[torch.dtype] = frozenset()
    class_names: tuple[str, ...] = ()
    names_fault: str = ""
    key: str = ""
    other_keys: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def recognise(
    checkpoint: Mapping[str, Any],
    norm_weights: str | None = None,
    custom: bool = False,
    key: str | None = None,
    hidden_arguments: Mapping[str, Any] | None = None,
) -> Recognised:
    """Recognise the network in a checkpoint and rename its tensors to this package's names.

    Args:
        checkpoint: content of the file.
        norm_weights: kind of the norm weights, "abn" or "bn"; None to decide by the names.
        custom: also accept a network that is none of the variants.
        key: key of the network in the checkpoint; None for the likeliest one, see `choose_network`.
        hidden_arguments: arguments of the network that its tensors do not show.

    Returns:
        The weights and their description.

    Raises:
        ValueError: if there is no TResNet; the message names missing, unexpected and misshapen tensors.
    """
    networks = find_networks(checkpoint)
    if not networks:
        raise NoNetwork(
            f"needs a TResNet, with {OFFICIAL_STEM} or {_STEM}, got {shorten_names(_list_tensors(checkpoint))}"
        )
    network = choose_network(networks, key)
    query2label = from_query2label(network.beside)
    tensors = extract_tensors(dataclasses.replace(network, tensors={**network.tensors, **query2label}))
    official = OFFICIAL_STEM in tensors
    blurred = not official or _find_blurs(tensors)
    inplace_abn = official and not has_frelu(tensors) if norm_weights is None else norm_weights == "abn"
    weights = _rename(tensors, official, inplace_abn)
    head, num_classes, head_args = _detect_head(weights)
    if not query2label and any(_QUERY2LABEL.match(name) for name in (*network.others, *weights)):
        head, num_classes, head_args = "query2label", 0, {}
        weights = {name: weight for name, weight in weights.items() if not _QUERY2LABEL.match(name)}
    if "label_embedding" in head_args and QUERIES not in weights:  # the official code stores them in another file
        weights[QUERIES] = torch.empty(0, head_args["label_embedding"])
    architecture, model_args = _detect(weights, blurred, custom)
    model_args |= head_args | dict(hidden_arguments or {})
    class_names: tuple[str, ...] = ()
    names_fault = ""
    if "idx_to_class" in checkpoint:
        class_names, names_fault = order_names(checkpoint["idx_to_class"], num_classes)
    norms = [tensor for name, tensor in tensors.items() if name.endswith(".1.weight") and tensor.numel()]
    least = min((norm.min().item() for norm in norms), default=0.0) if inplace_abn and norm_weights is None else None
    return Recognised(
        architecture=architecture,
        model_args=model_args,
        state_dict=_copy(weights, _check_fit(weights, architecture, model_args, num_classes)),
        head=head,
        num_classes=num_classes,
        layout="official" if official else "timm",
        inplace_abn=inplace_abn,
        least_norm_weight=least,
        dtypes=frozenset(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()) - {torch.float32},
        class_names=class_names,
        names_fault=names_fault,
        key=network.key,
        other_keys=tuple(other.key for other in networks if other is not network),
        left_out=tuple(name for name in network.others if not _QUERY2LABEL.match(name)),
    )


class NoNetwork(ValueError):
    """A checkpoint contains no TResNet."""


def _list_tensors(checkpoint: Any, name: str = "", depth: int = 0) -> list[str]:
    """Return the names of the tensors in a checkpoint, for a message."""
    if isinstance(checkpoint, Tensor):
        return [name]
    if depth > _DEPTH_SHOWN or not isinstance(checkpoint, Mapping):
        return []
    prefix = f"{name}." if name else ""
    return [each for key, value in checkpoint.items() for each in _list_tensors(value, f"{prefix}{key}", depth + 1)]


def _rename(tensors: dict[str, Tensor], official: bool, inplace_abn: bool) -> dict[str, Tensor]:
    if official:
        return from_official(tensors, inplace_abn)
    return {
        name: batch_norm_weight(tensor) if inplace_abn and name.endswith("bn.weight") else tensor
        for name, tensor in rename_head(tensors).items()
    }


def _find_blurs(weights: Mapping[str, Tensor]) -> bool:
    """Return whether downsampling is blur-pooled; the names of its convolutions then have one more level."""
    nested = {match[1] for name in weights if (match := re.match(r"(body\..*\.conv\d)\.0\.[01]\.\w+$", name))}
    if not nested:
        return False
    expected = set()
    for block in ("body.layer2.0", "body.layer3.0", "body.layer4.0"):
        if any(name.startswith(f"{block}.") for name in weights):
            bottleneck = any(name.startswith(f"{block}.conv3.") for name in weights)
            expected.add(f"{block}.conv{2 if bottleneck else 1}")
    if nested != expected:
        raise ValueError(
            f"needs a blur after all of {shorten_names(sorted(expected))} or after none, got one after "
            f"{shorten_names(sorted(nested))}: missing "
            f"{shorten_names(f'{name}.0.0.weight' for name in sorted(expected - nested))}, unexpected "
            f"{shorten_names(f'{name}.0.0.weight' for name in sorted(nested - expected))}"
        )
    return True


def _detect_head(weights: Mapping[str, Tensor]) -> tuple[str, int, dict[str, Any]]:
    """Return the kind of head, its number of classes and its arguments, by names and shapes."""
    for name, dimensions in _DIMENSIONS.items():
        shape = tuple(weights[name].shape) if name in weights else (1,) * dimensions[0]
        may_lack_labels = name == QUERIES and "head.queries.embed.fc.weight" in weights
        if len(shape) not in dimensions or 0 in shape[may_lack_labels:]:
            raise ValueError(f"{name} needs {' or '.join(map(str, dimensions))} dimensions, got shape {shape}")
    embedding, classifier = weights.get("head.embedding.weight"), weights.get("head.fc.weight")
    if any(name.startswith("head.encoder.") for name in weights):
        return "query2label", *_detect_query2label(weights)
    if any(name.startswith(("head.queries.", "head.decoder.")) for name in weights):
        return "ml_decoder", *_detect_ml_decoder(weights)
    if classifier is None:
        return "none", 0, {}
    if embedding is None:
        return "linear", classifier.shape[0], {}
    return "bottleneck", classifier.shape[0], {"head": "bottleneck", "head_features": embedding.shape[0]}


def _detect_ml_decoder(weights: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
    needed = ("head.embedding.weight", "head.fc.bias")
    missing = [name for name in needed if name not in weights]
    if missing:
        raise ValueError(f"its ML-Decoder head is incomplete: missing {', '.join(missing)}")
    model_args = {"head": "ml_decoder", "decoder_embedding": weights["head.embedding.weight"].shape[0]}
    embed, queries = weights.get("head.queries.embed.fc.weight"), weights.get(QUERIES)
    if embed is not None:
        return 0 if queries is None else queries.shape[0], {**model_args, "label_embedding": embed.shape[1]}
    if queries is None:
        raise ValueError(f"its ML-Decoder head is incomplete: missing {QUERIES}")
    return weights["head.fc.bias"].numel(), {**model_args, "num_groups": queries.shape[0]}


def _detect_query2label(weights: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
    hidden, queries = weights.get("head.encoder.mlp.fc1.weight"), weights.get(QUERIES)
    if hidden is None or hidden.ndim != 2 or 0 in hidden.shape:
        raise ValueError("its Query2Label head is incomplete: missing head.encoder.mlp.fc1.weight of 2 dimensions")
    model_args = {"head": "query2label", "head_features": hidden.shape[0], "decoder_embedding": hidden.shape[1]}
    return 0 if queries is None else queries.shape[0], model_args


def _detect(weights: Mapping[str, Tensor], blurred: bool, custom: bool) -> tuple[str, dict[str, Any]]:
    """Return the variant's name and the arguments that differ from it, by names and shapes."""
    stem = weights[_STEM].shape
    stems: dict[tuple[int, ...], tuple[int, str]] = {(3, 3): (16, "space_to_depth"), (7, 7): (1, "conv7x7")}
    pixels, kind = stems.get(tuple(stem[2:]), (0, ""))
    if not pixels or stem[0] == 0 or stem[1] == 0 or stem[1] % pixels:
        raise ValueError(f"{_STEM} needs the shape of a TResNet stem, got {tuple(stem)}")
    layers, blocks, use_se = [], [], []
    for stage in range(1, 5):
        # Two digits: the deepest published stage has 34 blocks, and a hostile name could ask for any number.
        prefix = re.compile(rf"body\.layer{stage}\.(\d\d?)\.(.*)")
        names = [match for name in weights if (match := prefix.match(name))]
        if not names:
            raise ValueError(f"no tensors of body.layer{stage}: missing {', '.join(_missing_stages(weights))}")
        layers.append(max(int(match[1]) for match in names) + 1)
        blocks.append("bottleneck" if any(match[2].startswith("conv3.") for match in names) else "basic")
        use_se.append(any(match[2].startswith("se.") for match in names))

    act_layer = "frelu" if has_frelu(weights) else "leaky_relu"  # or another activation without tensors
    found = {"layers": tuple(layers), "planes": stem[0], "block": tuple(blocks)}
    variant = next((name for name in ARCHITECTURES if _outline(name) == found), None)
    model_args: dict[str, Any] = {}
    if variant is None:
        model_args = {"layers": layers, "width_factor": stem[0] / 64, "block": blocks}
    if use_se != [True, True, True, False]:
        model_args["use_se"] = use_se
    if not blurred:
        model_args["aa_layer"] = False
    if kind != "space_to_depth":
        model_args["stem"] = kind
    if model_args and not custom:
        variants = "; ".join(f"{name} {_outline(name)}" for name in ARCHITECTURES)
        raise ValueError(
            f"is none of the variants: {found}, use_se={use_se}, aa_layer={blurred}, stem={kind}. The variants are "
            f"{variants}; all have use_se={[True, True, True, False]}, aa_layer=True, stem=space_to_depth. Perhaps the "
            "file is incomplete; if the network is meant to differ, convert it as a custom one"
        )
    own = ARCHITECTURES[variant].get("act_layer") if variant else None
    if (act_layer == "frelu") != (own == "frelu"):
        model_args["act_layer"] = act_layer
    if stem[1] != 3 * pixels:
        model_args["in_chans"] = stem[1] // pixels
    return variant or "tresnet_m", model_args


def _missing_stages(weights: Mapping[str, Tensor]) -> list[str]:
    return [f"body.layer{i}.*" for i in range(1, 5) if not any(name.startswith(f"body.layer{i}.") for name in weights)]


def _outline(architecture: str) -> dict[str, Any]:
    arguments = ARCHITECTURES[architecture]
    v2 = arguments.get("v2", False)
    planes = int(64 * arguments.get("width_factor", 1.0))
    bottlenecks = v2 or arguments.get("block") == "bottleneck"
    block = ("bottleneck",) * 4 if bottlenecks else ("basic", "basic", "bottleneck", "bottleneck")
    return {"layers": arguments["layers"], "planes": planes // 8 * 8 if v2 else planes, "block": block}


def _check_fit(
    weights: Mapping[str, Tensor], architecture: str, model_args: dict[str, Any], num_classes: int
) -> dict[str, torch.Size]:
    """Check that weights have the network's names and shapes; return these in the network's order."""
    expected = _shapes(json.dumps({**ARCHITECTURES[architecture], **model_args, "num_classes": num_classes}))
    missing, unexpected, misshapen = find_misfits({name: weight.shape for name, weight in weights.items()}, expected)
    if missing or unexpected or misshapen:
        raise ValueError(
            f"does not fit {architecture} {model_args or ''} with {num_classes} classes: "
            f"missing {shorten_names(missing)}; unexpected {shorten_names(unexpected)}; "
            f"wrong shape {shorten_names(misshapen)}"
        )
    return expected


@functools.lru_cache(maxsize=8)  # several checkpoints of one kind are often converted together
def _shapes(arguments: str) -> dict[str, torch.Size]:
    with torch.random.fork_rng(devices=[]):  # a network on the meta device advances the random state too
        network = TResNet(**json.loads(arguments), device="meta")
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def _copy(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Copy the weights in single precision; counters, which In-Place ABN lacks, become zero."""
    state_dict = {}
    for name, shape in shapes.items():
        dtype = torch.int64 if name.endswith("num_batches_tracked") else torch.float32
        state_dict[name] = torch.zeros(shape, dtype=dtype)
        if name in weights:
            state_dict[name].copy_(weights[name])
    return state_dict

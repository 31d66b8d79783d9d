"""The classifier heads by name, and the network's arguments that each head uses."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from timm_tresnet.models.arguments import choose
from timm_tresnet.models.layers import BottleneckHead, LinearHead, MLDecoderHead, Query2LabelHead

_HIDDEN_FEATURES = 512  # as in the official bottleneck heads (Alibaba-MIIL/ASL, `TResNet`)

# Name -> class, and the class's names of the network's arguments
HEADS: dict[str, tuple[Callable[..., nn.Module], dict[str, str]]] = {
    "linear": (LinearHead, {}),
    "bottleneck": (
        functools.partial(BottleneckHead, hidden_features=_HIDDEN_FEATURES),
        {"head_features": "hidden_features"},
    ),
    "ml_decoder": (
        MLDecoderHead,
        {name: name for name in ("num_groups", "decoder_embedding", "label_embedding", "learn_queries")},
    ),
    "query2label": (
        Query2LabelHead,
        {"decoder_embedding": "decoder_embedding", "head_features": "hidden_features"},
    ),
}
_FLAGS = {"learn_queries"}
_OF_GROUPS = {"num_groups", "learn_queries"}  # only without label embeddings
HEAD_ARGUMENTS = {"head", *(name for _, names in HEADS.values() for name in names)}


def choose_head(head: str, **options: int | None) -> Callable[..., nn.Module]:
    """Return a function that makes a head.

    Args:
        head: a name in `HEADS`. For compatibility, "linear" with head_features means "bottleneck".
        **options: the network's arguments for its heads; None, or False for a flag, for the head's default.

    Returns:
        Function of in_features, num_classes, pool_type, drop_rate, device and dtype that returns the head.

    Raises:
        ValueError: if the head is unknown, an option is not positive or belongs to another head, or groups or learnt
            queries are combined with word embeddings of labels, which replace them.
    """
    if not isinstance(head, str):
        raise ValueError(f"TResNet needs head to be one of {', '.join(map(repr, HEADS))}, got {head!r}")
    flags = [name for name in options if name in _FLAGS]
    for name in flags:
        if not isinstance(options[name], bool | None):
            raise ValueError(f"TResNet needs {name} to be True or False, got {options[name]!r}")
    given = {name: value for name, value in options.items() if value is not None and (value or name not in flags)}
    if head == "linear" and "head_features" in given:
        head = "bottleneck"
    kind, names = choose("head", head, HEADS)
    for name, value in given.items():
        if name not in names:
            owners = " or ".join(repr(owner) for owner, (_, owned) in HEADS.items() if name in owned)
            raise ValueError(f"TResNet needs head={owners} for {name}={value}, got head={head!r}")
        if name not in flags and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"TResNet needs {name} to be at least 1 or None, got {value}")
    for name in _OF_GROUPS & given.keys():
        if "label_embedding" in given:
            raise ValueError(
                f"TResNet needs {name} or label_embedding, not both, got {given[name]} and "
                f"{given['label_embedding']}: word embeddings of labels replace groups"
            )
    return functools.partial(kind, **{names[name]: value for name, value in given.items()})


def drop_inherited(arguments: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Drop inherited options that the chosen head does not have, so that a user can choose any head.

    Args:
        arguments: arguments of the weights' network, updated with the user's.
        source: arguments of the weights' network.

    Returns:
        Arguments without the options from `source` that their head does not have. With word embeddings of labels,
        options of groups are dropped too.
    """
    inherited = {name for name in arguments if name in source and arguments[name] == source[name]}
    head = arguments.get("head")  # only if it is named: a default was not chosen
    _, taken = HEADS[head] if isinstance(head, str) and head in HEADS else (None, HEAD_ARGUMENTS)
    unneeded = (inherited & HEAD_ARGUMENTS) - {"head", *taken}
    if arguments.get("label_embedding"):
        unneeded |= inherited & _OF_GROUPS
    return {name: value for name, value in arguments.items() if name not in unneeded}


def same_head(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Return whether two networks' arguments give the same head with the same options."""
    return _options(first) == _options(second)


def _options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: arguments[name] for name in HEAD_ARGUMENTS if arguments.get(name) not in (None, False)}
    return {**options, "head": _name_head(arguments)}


def _name_head(arguments: Mapping[str, Any]) -> Any:
    return arguments.get("head") or ("bottleneck" if arguments.get("head_features") else "linear")

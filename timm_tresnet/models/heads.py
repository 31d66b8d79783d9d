"""The classifier heads of the network by name, and which of its arguments are about which."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from timm_tresnet.models.arguments import choose
from timm_tresnet.models.layers import BottleneckHead, LinearHead, MLDecoderHead, Query2LabelHead

_HIDDEN_FEATURES = 512  # of the official bottleneck heads (Alibaba-MIIL/ASL, `TResNet`)

HEADS: dict[str, tuple[Callable[..., nn.Module], dict[str, str]]] = {  # and its names of the network's arguments
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
_OF_GROUPS = {"num_groups", "learn_queries"}  # not of labels
HEAD_ARGUMENTS = {"head", *(name for _, names in HEADS.values() for name in names)}


def choose_head(head: str, **options: int | None) -> Callable[..., nn.Module]:
    """What makes a head.

    Args:
        head: a name in `HEADS`. Before there were names, head_features alone asked for "bottleneck", and still does.
        **options: the network's arguments for its heads; None, or False for a flag, for the head's own default.

    Returns:
        Takes in_features, num_classes, pool_type, drop_rate, device and dtype.

    Raises:
        ValueError: if there is no such head, or an option is not positive or is another head's, or groups or learnt
            queries are asked for together with word embeddings of labels, which take their place.
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
                f"{given['label_embedding']}: word embeddings of labels take the place of groups"
            )
    return functools.partial(kind, **{names[name]: value for name, value in given.items()})


def drop_inherited(arguments: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Drop options of the weights' head that another one does not take, so that they stop nobody from choosing it.

    Args:
        arguments: those of the weights' network, replaced by what is asked for.
        source: those of the weights' network.

    Returns:
        Arguments, without options of `source` that the head in them does not take. Word embeddings of labels take the
        place of groups.
    """
    inherited = {name for name in arguments if name in source and arguments[name] == source[name]}
    head = arguments.get("head")  # by its name alone: nobody chose the default
    _, taken = HEADS[head] if isinstance(head, str) and head in HEADS else (None, HEAD_ARGUMENTS)
    unneeded = (inherited & HEAD_ARGUMENTS) - {"head", *taken}
    if arguments.get("label_embedding"):
        unneeded |= inherited & _OF_GROUPS
    return {name: value for name, value in arguments.items() if name not in unneeded}


def same_head(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether a network's arguments ask for the same head as another's, with the same options."""
    return _options(first) == _options(second)


def _options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: arguments[name] for name in HEAD_ARGUMENTS if arguments.get(name) not in (None, False)}
    return {**options, "head": _name_head(arguments)}


def _name_head(arguments: Mapping[str, Any]) -> Any:
    return arguments.get("head") or ("bottleneck" if arguments.get("head_features") else "linear")

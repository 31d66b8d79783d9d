"""The classifier heads of the network by name, and which of its arguments are about which."""

import functools
from collections.abc import Callable

from torch import nn

from timm_tresnet.arguments import choose
from timm_tresnet.layers import BottleneckHead, LinearHead, MLDecoderHead

_HIDDEN_FEATURES = 512  # of the official bottleneck heads (Alibaba-MIIL/ASL, `TResNet`)

HEADS: dict[str, tuple[Callable[..., nn.Module], dict[str, str]]] = {  # and its names of the network's arguments
    "linear": (LinearHead, {}),
    "bottleneck": (
        functools.partial(BottleneckHead, hidden_features=_HIDDEN_FEATURES),
        {"head_features": "hidden_features"},
    ),
    "ml_decoder": (
        MLDecoderHead,
        {name: name for name in ("num_groups", "decoder_embedding", "label_embedding")},
    ),
}
HEAD_ARGUMENTS = {"head", *(name for _, names in HEADS.values() for name in names)}


def choose_head(head: str, **options: int | None) -> Callable[..., nn.Module]:
    """What makes a head.

    Args:
        head: a name in `HEADS`. Before there were names, head_features alone asked for "bottleneck", and still does.
        **options: the network's arguments for its heads; None for the head's own default.

    Returns:
        Takes in_features, num_classes, pool_type, drop_rate, device and dtype.

    Raises:
        ValueError: if there is no such head, or an option is not positive or is another head's.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if head == "linear" and "head_features" in given:
        head = "bottleneck"
    kind, names = choose("head", head, HEADS)
    for name, value in given.items():
        if name not in names:
            owners = " or ".join(repr(owner) for owner, (_, owned) in HEADS.items() if name in owned)
            raise ValueError(f"TResNet needs head={owners} for {name}={value}, got head={head!r}")
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"TResNet needs {name} to be at least 1 or None, got {value}")
    return functools.partial(kind, **{names[name]: value for name, value in given.items()})

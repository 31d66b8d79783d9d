"""Check and resolve the arguments of the network."""

import functools
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from timm.layers import LayerType, SelectAdaptivePool2d, get_act_layer
from torch import nn

from timm_tresnet.models.layers import FReLU

STRIDES_AND_DILATIONS = {  # by output stride: strides of the stages, dilations before and after their downsampling
    32: ((1, 2, 2, 2), ((1, 1), (1, 1), (1, 1), (1, 1))),
    16: ((1, 2, 2, 1), ((1, 1), (1, 1), (1, 1), (1, 2))),
    8: ((1, 2, 1, 1), ((1, 1), (1, 1), (1, 2), (2, 4))),
}


def choose(argument: str, value: Any, choices: dict[Any, Any]) -> Any:
    """Return the entry of a table for an argument's value; an unknown value is a ValueError."""
    if value not in choices:
        names = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"TResNet needs {argument} to be one of {names}, got {value!r}")
    return choices[value]


def check_classes(num_classes: Any) -> None:
    """Refuse a num_classes that is not an integer of at least 0."""
    if not isinstance(num_classes, Integral) or isinstance(num_classes, bool) or num_classes < 0:
        raise ValueError(f"TResNet needs num_classes to be an integer of at least 0, got {num_classes!r}")


def check_pooling(global_pool: Any) -> None:
    """Refuse a pooling that timm does not know; "" is no pooling."""
    try:
        SelectAdaptivePool2d(pool_type=global_pool)
    except (AssertionError, AttributeError, TypeError):
        raise ValueError(
            f"TResNet needs global_pool to be a pooling of timm, such as 'avg', or '' for none, got {global_pool!r}"
        ) from None


def per_stage(argument: str, value: Any) -> list[Any]:
    """Return a value for each of the four stages."""
    if isinstance(value, str | bool):
        return [value] * 4
    if not isinstance(value, Sequence) or len(value) != 4:
        raise ValueError(f"TResNet needs {argument} to have one entry for each of its 4 stages, got {value!r}")
    if argument == "layers" and any(not isinstance(count, int) or count < 1 for count in value):
        raise ValueError(f"TResNet needs at least one block a stage, got layers={value!r}")
    return list(value)


def resolve_activation(act_layer: LayerType, negative_slope: float) -> LayerType:
    """Return an activation by its name, including "frelu", or class; negative_slope is for "leaky_relu"."""
    if act_layer == "frelu":
        return FReLU
    if act_layer == "leaky_relu":
        return functools.partial(nn.LeakyReLU, negative_slope=negative_slope)
    try:
        resolved = get_act_layer(act_layer)
    except KeyError:
        resolved = None
    if resolved is None:
        raise ValueError(f"TResNet needs act_layer to be an activation of timm, or 'frelu', got {act_layer!r}")
    return resolved


def resolve_indices(indices: int | list[int] | None, num_features: int) -> list[int]:
    """Return indices of features, counted from the front: all for None, the last n for a number n."""
    if indices is None:
        return list(range(num_features))
    taken: list[int] = []
    if isinstance(indices, int):
        if indices < 1 or indices > num_features:
            raise ValueError(f"TResNet has {num_features} features, cannot return the last {indices}")
        for index in range(num_features - indices, num_features):
            taken.append(index)
    else:
        for index in indices:
            if index < -num_features or index >= num_features:
                raise ValueError(f"TResNet has {num_features} features, got index {index}")
            taken.append(index + num_features if index < 0 else index)
    return taken

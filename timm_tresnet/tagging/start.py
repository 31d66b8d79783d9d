"""Make the network that a training starts from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from torch import nn

from timm_tresnet.models.heads import drop_inherited
from timm_tresnet.utils.errors import summarise
from timm_tresnet.variants import explain_unknown
from timm_tresnet.weights import config
from timm_tresnet.weights.catalogue import load_catalogue
from timm_tresnet.weights.labels import is_multi_label, label_lookup
from timm_tresnet.weights.loading import load_network


def make_network(
    name: str, model_args: Mapping[str, Any], labels: Sequence[str], pretrained: bool = True, multi_label: bool = True
) -> tuple[nn.Module, dict[str, Any]]:
    """Make a network for given labels from weights that may have other classes or another head.

    The body's weights are always copied. The head's are copied up to its last layer if the head is of the same class.
    The last layer is copied too if the weights have the same labels and are equally single-label or multi-label.

    Args:
        name: name of the weights, see `timm_tresnet.weights.loading.load_network`.
        model_args: arguments of the network that differ from those of the weights.
        labels: names of the outputs.
        pretrained: False for random weights.
        multi_label: whether an image can have any number of labels.

    Returns:
        The network, and the arguments that differ from its variant's: model_args and the arguments of the weights.

    Raises:
        ValueError: if the network does not exist or cannot be loaded or built, or its body differs from the weights'.
    """
    source = load_network(name) if pretrained else None
    try:
        network: Any = timm.create_model(name, pretrained=False, num_classes=len(labels), **model_args)
    # timm and the network raise these for wrong names and arguments.
    except (AssertionError, FileNotFoundError, KeyError, RuntimeError, TypeError, ValueError) as error:
        unknown = None if ":" in name else explain_unknown(name)
        reason = unknown or summarise(error)
        raise ValueError(f"cannot make the network {name} with {dict(model_args)}: {reason}") from error
    if network.in_chans != 3:
        raise ValueError(f"{name} needs images with {network.in_chans} channels; training reads images with 3")
    if source is not None:
        _copy_weights(network, source, labels, multi_label)
    of_weights = _arguments_of_weights(name)
    return network, drop_inherited({**of_weights, **model_args}, of_weights)


def _copy_weights(network: nn.Module, source: Any, labels: Sequence[str], multi_label: bool) -> None:
    same = is_multi_label(source.pretrained_cfg) == multi_label and source.num_classes == len(labels)
    if not (same and list(map(label_lookup(source), range(len(labels)))) == list(labels)):
        source.reset_classifier(len(labels))
    weights, wanted = source.state_dict(), network.state_dict()
    of_head = {key for key in wanted if key.startswith("head.")}
    fits = {key for key in wanted if key in weights and weights[key].shape == wanted[key].shape}
    missing = sorted(wanted.keys() - fits - of_head)
    if missing:
        raise ValueError(
            f"the weights need a network with the same body, got one in which {missing[0]} and perhaps more differ"
        )
    if type(source.head) is not type(network.head) or not of_head <= fits:
        fits -= of_head
    network.load_state_dict({key: weights[key] if key in fits else wanted[key] for key in wanted})


def _arguments_of_weights(name: str) -> dict[str, Any]:
    source, _, rest = name.partition(":")
    if not rest:
        public = load_catalogue().get(name)
        return dict(public.network_arguments) if public else {}
    if source.lower().replace("_", "-") == "local-dir":
        return dict(config.read_config(Path(rest) / config.NAME).get("model_args", {}))
    return dict(timm.models.load_model_config_from_hf(rest)[2] or {})


def make_pretrained_cfg(network: Any, image_size: int | None, squash: bool = True) -> dict[str, Any]:
    """Make timm's pretrained config, with the preprocessing, for a network that this package trains.

    Args:
        network: from `make_network`.
        image_size: side of the images, in pixels; None for the size of the weights.
        squash: resize images to a square without keeping their shape, as in official training of taggers; False for
            the preprocessing of the weights.
    """
    start = network.pretrained_cfg
    size = image_size or start["input_size"][-1]
    resizing = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}
    if not squash:
        usual = {"interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "center"}  # of timm's TResNet
        resizing = {name: start.get(name) or value for name, value in usual.items()}
    return {
        "input_size": [3, size, size],
        **resizing,
        "mean": list(start["mean"]),
        "std": list(start["std"]),
        "first_conv": start["first_conv"],
        "classifier": start["classifier"],
    }

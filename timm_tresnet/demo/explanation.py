"""Explain a network's prediction for a photograph: labels and a Grad-CAM heat map. Needs the extra `demo`."""

import dataclasses
import math
import time
from typing import Any

import matplotlib
import torch
from captum.attr import LayerGradCam
from PIL import Image
from torch import Tensor, nn

from timm_tresnet.deployment.running import find_size_multiple
from timm_tresnet.models.network import TResNet
from timm_tresnet.weights.aspect_ratio import make_transform
from timm_tresnet.weights.labels import is_multi_label, label_lookup, read_thresholds
from timm_tresnet.weights.preprocessing import resolve_preprocessing

_LEAST_CELLS = 4  # least side of the heat map, in cells; for small images, the last stage's map is smaller
_SHOWN_PIXELS = 320  # least side of the picture, in pixels
_LONGEST_RATIO = 8  # of sides that is kept: visitors choose how much a network computes
_THRESHOLD = 0.5  # for taggers without thresholds of their own
_MOST_TAGS = 200  # tags to show; taggers can have thousands
_OPACITY = 0.6  # of the colours at the map's maximum


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A network's prediction for a photograph, with a heat map.

    Args:
        probabilities: probabilities of the most probable classes by name, most probable first; for a tagger, of the
            tags that reach their thresholds, then of the most probable other tags.
        heat_map: the network's crop of the photograph, coloured where the first label was found.
        cells: rows and columns of the heat map.
        classify_ms: time of the network, in milliseconds.
        explain_ms: time of Grad-CAM, in milliseconds.
        thresholds: for a tagger, the threshold of each shown label by name; None for other networks.
    """

    @property
    def tags(self) -> dict[str, float]:
        """Probability of each tag that reaches its threshold, most probable first."""
        thresholds = self.thresholds or {}
        return {name: value for name, value in self.probabilities.items() if value >= thresholds.get(name, math.inf)}

    probabilities: dict[str, float]
    heat_map: Image.Image
    cells: tuple[int, int]
    classify_ms: float
    explain_ms: float
    thresholds: dict[str, float] | None = None


def explain_image(model: TResNet, image: Image.Image, count: int = 5, keep_ratio: bool = False) -> Explanation:
    """Classify a photograph and make a heat map of its most probable class.

    The heat map is Grad-CAM (arXiv:1610.02391) of the last stage whose feature map is at least 4x4.

    Args:
        model: a TResNet with classes, in eval mode.
        image: the photograph, in mode RGB.
        count: largest number of classes; for a tagger, of tags below their thresholds.
        keep_ratio: show the network the whole photograph in its aspect ratio.

    Returns:
        Labels, heat map and times.

    Raises:
        ValueError: if the network has no classes or not 3 channels, or its logits are not finite; or if the photograph
            is too long to keep its ratio.
    """
    if model.num_classes == 0 or model.in_chans != 3:
        raise ValueError(
            f"explain_image needs a network with classes for RGB images, got {model.num_classes} classes and "
            f"{model.in_chans} channels; choose another network"
        )
    if keep_ratio and max(image.size) > _LONGEST_RATIO * min(image.size):
        raise ValueError(f"one side is over {_LONGEST_RATIO} times the other, too much for a network to see as it is")
    config = resolve_preprocessing(model)
    multiple = find_size_multiple(model) if keep_ratio else None
    x = make_transform(config, multiple)(image)[None]
    start = time.perf_counter()
    with torch.inference_mode():
        logits = model(x)[0]
    classified = time.perf_counter()
    if not logits.isfinite().all():
        raise ValueError("the network's logits for this photograph are not finite; choose other weights")
    own = None
    if is_multi_label(model.pretrained_cfg):
        own = read_thresholds(model.pretrained_cfg, model.num_classes) or [_THRESHOLD] * model.num_classes
    probabilities = logits.softmax(-1) if own is None else logits.sigmoid()
    ranked = probabilities.argsort(descending=True, stable=True).tolist()
    if own is None:
        indices = ranked[:count]
    else:
        has = [probability >= threshold for probability, threshold in zip(probabilities.tolist(), own, strict=True)]
        indices = [index for index in ranked if has[index]][:_MOST_TAGS]
        indices += [index for index in ranked if not has[index]][:count]
    explaining = time.perf_counter()
    heat = LayerGradCam(model, _choose_layer(model, x)).attribute(x, indices[0], relu_attributions=True)
    explained = time.perf_counter()
    names = list(map(label_lookup(model), indices))
    thresholds = None if own is None else {name: own[index] for name, index in zip(names, indices, strict=True)}
    return Explanation(
        probabilities=dict(zip(names, probabilities[indices].tolist(), strict=True)),
        heat_map=_colour(_crop(image, config, multiple), heat.detach()),
        cells=tuple(heat.shape[-2:]),
        classify_ms=1000 * (classified - start),
        explain_ms=1000 * (explained - explaining),
        thresholds=thresholds,
    )


def _choose_layer(model: TResNet, x: Tensor) -> nn.Module:
    stages = [(info["module"], info["reduction"]) for info in model.feature_info]
    large = [name for name, reduction in stages if min(x.shape[-2:]) >= _LEAST_CELLS * reduction]
    return model.get_submodule((large or [stages[0][0]])[-1])


def _crop(image: Image.Image, config: dict[str, Any], multiple: int | None) -> Tensor:
    """Return the network's crop of a photograph, (3, H, W) in [0, 1], enlarged if it is small."""
    channels, height, width = config["input_size"]
    times = math.ceil(_SHOWN_PIXELS / min(height, width))
    plain = {"input_size": (channels, times * height, times * width), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    return make_transform({**config, **plain}, multiple and times * multiple)(image)


def _colour(shown: Tensor, heat: Tensor) -> Image.Image:
    heat = nn.functional.interpolate(heat, shown.shape[-2:], mode="bicubic").clamp(min=0)[0, 0]
    heat = heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny)
    colours = torch.from_numpy(matplotlib.colormaps["turbo"](heat.numpy())[..., :3]).to(shown.dtype).permute(2, 0, 1)
    opacity = _OPACITY * heat
    mixed = (1 - opacity) * shown + opacity * colours
    return Image.fromarray((mixed.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())

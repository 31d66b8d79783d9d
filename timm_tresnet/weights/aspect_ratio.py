"""Preprocessing that keeps the aspect ratio of images."""

from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image
from torch import Tensor


class KeepRatio:
    """Resize an image so that its short side has a given length, and crop both sides to a multiple.

    The crop removes pixels at the right and at the bottom. `demo.py` of 7eu7d7/ML-Danbooru (commit bd0e61e) does the
    same with `--keep_ratio`.

    Args:
        side: length of the short side, in pixels.
        multiple: both sides of the result are multiples of this.
        interpolation: name of Pillow's interpolation, in lower case.
    """

    def __init__(self, side: int, multiple: int, interpolation: str) -> None:
        self._side, self._multiple = side, multiple
        self._resampling = Image.Resampling[interpolation.upper()]

    def __call__(self, image: Image.Image) -> Image.Image:
        short = min(image.size)
        width, height = (self._side if length == short else int(self._side * length / short) for length in image.size)
        if image.size != (width, height):
            image = image.resize((width, height), self._resampling)
        return image.crop((0, 0, width - width % self._multiple, height - height % self._multiple))


def choose_side(config: Mapping[str, Any]) -> int:
    """Return the length of the short side, from a network's preprocessing."""
    return min(config["input_size"][1:])


def make_transform(
    config: dict[str, Any], multiple: int | None = None, normalize: bool = True
) -> Callable[[Image.Image], Tensor]:
    """Make the transform of images for a network.

    Args:
        config: data config from `timm_tresnet.weights.preprocessing.resolve_preprocessing`.
        multiple: keep the aspect ratio, with sides that are multiples of this; None to resize and crop by config.
        normalize: whether the transform returns float32, normalised by mean and std; else uint8.

    Returns:
        A function from an image to a tensor (C, H, W).
    """
    import timm.data
    from torchvision import transforms

    if multiple is None:
        return timm.data.create_transform(**config, normalize=normalize)
    keep = KeepRatio(choose_side(config), multiple, config["interpolation"])
    if not normalize:
        return transforms.Compose([keep, transforms.PILToTensor()])
    return transforms.Compose([keep, transforms.ToTensor(), transforms.Normalize(config["mean"], config["std"])])

"""Images that keep their aspect ratio on the way to a network."""

from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image
from torch import Tensor


class KeepRatio:
    """Resize an image until its short side has a given length, and cut both sides to a multiple.

    `demo.py` of 7eu7d7/ML-Danbooru (commit bd0e61e) does so with `--keep_ratio`: what is beyond the multiple is cut off
    at the right and at the bottom.

    Args:
        side: length of the short side, in pixels.
        multiple: of which both sides are.
        interpolation: one of Pillow's, by its name in small letters.
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
    """Length that a network's preprocessing gives to the short side of images whose aspect ratio is kept."""
    return min(config["input_size"][1:])


def make_transform(
    config: dict[str, Any], multiple: int | None = None, normalize: bool = True
) -> Callable[[Image.Image], Tensor]:
    """The transform of image files for a network.

    Args:
        config: of `timm_tresnet.weights.preprocessing.resolve_preprocessing`.
        multiple: keep the aspect ratio, with sides that are multiples of this; None to resize and crop as config says.
        normalize: give float32, less the mean and divided by the standard deviation; else pixels of 8 bits.
    """
    import timm.data
    from torchvision import transforms

    if multiple is None:
        return timm.data.create_transform(**config, normalize=normalize)
    keep = KeepRatio(choose_side(config), multiple, config["interpolation"])
    if not normalize:
        return transforms.Compose([keep, transforms.PILToTensor()])
    return transforms.Compose([keep, transforms.ToTensor(), transforms.Normalize(config["mean"], config["std"])])

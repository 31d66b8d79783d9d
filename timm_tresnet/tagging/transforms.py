"""Transforms of training images: official training's with torchvision, and timm's own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm.data
import torch
from torchvision.transforms import v2

from timm_tresnet.tagging.settings import ClassSettings
from timm_tresnet.utils.errors import summarise


class Cutout(v2.Transform):
    """Fill a random square with a random colour; part of the square may lie outside the image (arXiv:1708.04552).

    Every image gets a square with its centre anywhere, as in official training of multi-label networks (`CutoutPIL` in
    helper_functions.py of ASL and ML_Decoder). torchvision's RandomErasing keeps the whole square inside.

    Args:
        share: side of the square, as a share of the image's side, for each of height and width.

    Shape:
        - input: image tensors, (..., C, H, W), uint8
        - output: (..., C, H, W), uint8
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])
        rows, columns = _draw_range(height, self.share), _draw_range(width, self.share)
        colour = torch.randint(256, (v2.functional.get_num_channels(flat_inputs[0]), 1, 1), dtype=torch.uint8)
        return {"rows": rows, "columns": columns, "colour": colour}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        (top, bottom), (left, right) = params["rows"], params["columns"]
        return v2.functional.erase(inpt, top, left, bottom - top, right - left, params["colour"])


def _draw_range(side: int, share: float) -> tuple[int, int]:
    centre, length = int(torch.randint(side, ())), int(share * side + 0.5)
    start = centre - length // 2
    return max(start, 0), min(start + length, side)


def make_transform(
    image_size: int, mean: Sequence[float], std: Sequence[float], cutout: float, randaugment: int
) -> v2.Compose:
    """Make a tagger's training transform: squash, Cutout, RandAugment.

    Official training (train.py of ASL and ML_Decoder) has these three in this order, without crops or flips. Its
    RandAugment is the package `randaugment`, which draws two of 15 operations, each with a magnitude from 1 to 9. This
    one is torchvision's, two of 14 operations with a fixed magnitude.

    Args:
        image_size: side of the output, in pixels.
        mean: mean of each channel, for values from 0 to 1.
        std: standard deviation of each channel, for values from 0 to 1.
        cutout: side of the `Cutout` square, as a share of the image's side; 0 for none.
        randaugment: magnitude of RandAugment, from 1 to 30; 0 for none.

    Returns:
        A transform from `PIL.Image.Image` to (3, image_size, image_size), float32.
    """
    steps: list[Any] = [v2.Resize((image_size, image_size)), v2.PILToTensor()]
    if cutout:
        steps.append(Cutout(cutout))
    if randaugment:
        steps.append(v2.RandAugment(magnitude=randaugment))
    return v2.Compose(
        [*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std), inplace=True)]
    )


def make_class_transform(pretrained_cfg: Mapping[str, Any], settings: ClassSettings) -> Callable[[Any], torch.Tensor]:
    """Make timm's training transform, the one that `train.py` makes from `recipes/transfer.yaml`.

    Raises:
        ValueError: if timm does not know the augmentation policy.
    """
    try:
        return timm.data.create_transform(
            tuple(pretrained_cfg["input_size"]),
            is_training=True,
            hflip=settings.hflip,
            color_jitter=None,  # type: ignore[arg-type]  # timm takes None, as its train.py does
            auto_augment=settings.aa or None,
            interpolation=pretrained_cfg["interpolation"],
            mean=tuple(pretrained_cfg["mean"]),
            std=tuple(pretrained_cfg["std"]),
            re_prob=settings.reprob,
            re_mode="pixel",
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"timm cannot make the augmentation --aa {settings.aa}: {summarise(error)}") from error

"""What becomes of an image before the network sees it in training, with torchvision's transforms."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm.data
import torch
from torchvision.transforms import v2

from timm_tresnet.tagging.settings import ClassSettings
from timm_tresnet.utils.errors import summarise


class Cutout(v2.Transform):
    """Paint over a square of a random colour, of which a part may lie outside ("Cutout", arXiv:1708.04552).

    As official training of multi-label networks does it (`CutoutPIL` in ASL and ML_Decoder, helper_functions.py): on
    every image, with its centre anywhere. torchvision's RandomErasing keeps the whole square inside.

    Args:
        share: side of the square, as a share of the image's.

    Shape:
        - input: image tensors, (..., C, H, W), uint8
        - output: the same
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
    """The transform of training: squash, Cutout, RandAugment.

    Official training (train.py of ASL and ML_Decoder) has these three in this order, and neither crops nor flips. Its
    RandAugment is the package `randaugment`, which draws two of 15 operations with a magnitude from 1 to 9 each; here
    it is torchvision's, two of 14 with one magnitude.

    Args:
        image_size: side of the images that the network gets, in pixels.
        mean: of the channels, subtracted from values from 0 to 1.
        std: of the channels.
        cutout: share of `Cutout`; 0 for none.
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
    """Make timm's own transform of training, as its `train.py` makes it of `recipes/transfer.yaml`.

    Raises:
        ValueError: if timm knows no such augmentation.
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
        raise ValueError(f"timm makes no augmentation of --aa {settings.aa}: {summarise(error)}") from error

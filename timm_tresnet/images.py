"""Image files, and what the classes on them are called."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SAMPLES = Path(__file__).parent / "samples"


def find_images(paths: Sequence[Path]) -> Iterator[Path]:
    """Image files among paths, and in those of them that are folders, sorted."""
    from timm.data import is_img_extension

    for path in paths:
        if path.is_dir():
            yield from sorted(
                file for file in path.rglob("*") if file.is_file() and is_img_extension(file.suffix.lower())
            )
        else:
            yield path


def read_image(path: Path) -> Any:
    """Read an image file, turned as its camera was held.

    Args:
        path: the file.

    Returns:
        A `PIL.Image.Image` in mode RGB.

    Raises:
        ValueError: if the file cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's decoders
        raise ValueError(str(error) or type(error).__name__) from error


def label_lookup(model: Any) -> Callable[[int], str]:
    """Names of the classes: from the weights' config, else from timm's lists for ImageNet, else numbers."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    config = model.pretrained_cfg
    names = config.get("label_names")
    if names and len(names) == model.num_classes:  # else the classifier has been replaced
        descriptions = config.get("label_descriptions") or {}
        return lambda index: descriptions.get(names[index], names[index])
    subset = infer_imagenet_subset(model)
    if subset:
        return ImageNetInfo(subset).index_to_description
    return lambda index: f"class {index}"


def is_multi_label(pretrained_cfg: Mapping[str, Any]) -> bool:
    """Whether an image can have any number of the classes, each with a sigmoid, as the weights' config says."""
    from timm_tresnet.tresnet import MULTI_LABEL

    return MULTI_LABEL in (pretrained_cfg.get("notes") or ())

"""Image files."""

from collections.abc import Iterator, Sequence
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

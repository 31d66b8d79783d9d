"""Make the package's sample mosaic from the sample photographs of test_tresnet.r64_cifar10, whose licences are named.

    cd timm_tresnet/weights/samples/test_tresnet.mosaic_cifar10
    python ../../../../hub/mosaic_cifar10/sample.py cat_horse_airplane_deer.jpg

The squares were chosen among 900 random ones: the network predicts their tags with the widest margin.
"""

import argparse
from pathlib import Path

from PIL import Image

from timm_tresnet.utils.files import atomic_write
from timm_tresnet.utils.images import SAMPLES, read_image

_TILE = 128  # pixels
_SQUARES = {  # left, upper, right, lower, in the order of the mosaic's rows
    "cat": (57, 18, 206, 167),
    "horse": (14, 23, 184, 193),
    "airplane": (59, 7, 275, 223),
    "deer": (90, 49, 239, 198),
}


def make_mosaic() -> Image.Image:
    """Make a mosaic of four squares, two by two."""
    mosaic = Image.new("RGB", (2 * _TILE, 2 * _TILE))
    for number, (name, square) in enumerate(_SQUARES.items()):
        tile = read_image(SAMPLES / f"{name}.jpg").crop(square).resize((_TILE, _TILE), Image.Resampling.BICUBIC)
        mosaic.paste(tile, (number % 2 * _TILE, number // 2 * _TILE))
    return mosaic


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the sample mosaic of the package.")
    parser.add_argument("file", type=Path, help="image to write")
    arguments = parser.parse_args()
    with atomic_write(arguments.file) as unfinished:
        make_mosaic().save(unfinished, "JPEG", quality=90)

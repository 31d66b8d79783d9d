"""Image files of anybody: which are opened, and what becomes of their pixels."""

import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from timm_tresnet.utils.errors import summarise
from timm_tresnet.utils.terminal import escape

_SAMPLES = Path(__file__).parents[1] / "weights" / "samples"  # a folder for each weights name
SAMPLES = _SAMPLES / "test_tresnet.r64_cifar10"

# Of Pillow's decoders those that many files pass through every day.
FORMATS = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
}
CHANNELS = {1: "L", 3: "RGB"}  # of networks that take image files: Pillow's mode, as timm's scripts have it
_SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
_LARGEST_RATIO = 100  # of the sides; a narrow image is huge once its short side has the size that a network wants
_MOST_BYTES = 2**29  # of an image's pixels, 8 bytes each of those that are copied on the way to 8 bits and no alpha
_ROWS = 64  # that are brought to 8 bits at once
_GROUND = (255, 255, 255)  # behind what is transparent: such images are mostly drawn for white pages
_16_BITS = ("I;16", "I;16L", "I;16B", "I;16N")  # modes of Pillow; of a PNG, older releases say "I"
_MAY_TURN = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # what Pillow finds an orientation in
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF's tags; 0 for the second: 0 is white


def find_samples(pretrained_cfg: Mapping[str, Any]) -> Path:
    """Folder of the photographs in the package that a model knows: its own if it is in the package, else `SAMPLES`."""
    name = f"{pretrained_cfg.get('architecture')}.{pretrained_cfg.get('tag')}"
    return {folder.name: folder for folder in _SAMPLES.iterdir()}.get(name, SAMPLES)


def find_images(paths: Iterable[Path]) -> Iterator[Path]:
    """Image files among paths, and in those of them that are folders, sorted.

    In folders, names that end like those of `FORMATS` count; links to folders are not followed. A folder that cannot be
    listed is among the results, so that reading it says so. Of each level, the names in one folder are held.
    """
    for path in paths:
        if os.path.isdir(path):  # unlike Path.is_dir, False for what may not be looked at
            yield from _walk(path)
        else:
            yield path


def _walk(folder: Path) -> Iterator[Path]:
    levels = [iter([(folder, True)])]
    while levels:
        for path, is_folder in levels[-1]:
            if not is_folder:
                yield path
                continue
            try:
                levels.append(_list_folder(path))
            except OSError:
                yield path
            else:
                break
        else:
            levels.pop()


def _list_folder(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Images and folders in a folder, sorted, and which of them are folders."""
    with os.scandir(folder) as entries:
        found = [
            (entry.name, is_folder)
            for entry in entries
            if ((is_folder := _is_folder(entry)) and not entry.is_symlink())
            or (not is_folder and os.path.splitext(entry.name)[1].lower() in _SUFFIXES)
        ]
    return ((folder / name, is_folder) for name, is_folder in sorted(found))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # of a link to itself
        return False


def printable(path: Path) -> str:
    """Name of a file for a message or a result: bytes that are no UTF-8, and what a terminal obeys, are escaped."""
    return escape(os.fsencode(path).decode("utf-8", "backslashreplace"))


def read_image(
    path: Path,
    as_stored: bool = False,
    most_bytes: int = _MOST_BYTES,
    in_chans: int = 3,
    least_side: int | None = None,
) -> Any:
    """Read an image file, turned as its camera was held: the first frame, in 8 bits, on white where it is transparent.

    Args:
        path: the file, in one of `FORMATS`.
        as_stored: read it as timm's scripts do: not turned, what is transparent in the colour that it has, and deep
            pixels as Pillow brings them to 8 bits.
        most_bytes: of the pixels that it declares, as they are in memory; asked before any is decoded.
        in_chans: one of `CHANNELS`.
        least_side: decode a JPEG file at a half, a quarter or an eighth of its size, where no side gets shorter than
            this many pixels; None for the whole.

    Returns:
        A `PIL.Image.Image` in mode RGB, or L with one channel.

    Raises:
        ValueError: if the file cannot be read, is in none of the formats, or its image is huge, very narrow, or has
            pixels of which nobody says what is black and what is white.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            os.listdir(path)  # says what keeps it from being listed
        if not stat.S_ISREG(mode):  # a pipe would keep us waiting
            raise ValueError("not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Pillow puts right
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=list(FORMATS)) as image:
                _check_size(image, most_bytes)
                if least_side:
                    image.draft(None, (least_side, least_side))  # which other formats ignore
                image = image if as_stored else _to_rgb(image)
                image.load()
                return image if image.mode == CHANNELS[in_chans] else image.convert(CHANNELS[in_chans])
    except UnidentifiedImageError as error:
        raise ValueError(f"not an image in {', '.join(FORMATS)}") from error
    except Image.DecompressionBombWarning as error:
        raise ValueError(
            f"more than the {(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} megapixels that are opened"
        ) from error
    except Exception as error:  # a decoder can raise anything for a damaged file
        raise ValueError(summarise(error)) from error


def _check_size(image: Any, most_bytes: int) -> None:
    short, long = sorted(image.size)
    if long > _LARGEST_RATIO * short:
        raise ValueError(f"{image.width}x{image.height} pixels, one side is over {_LARGEST_RATIO} times the other")
    pixel = 8 if image.mode.endswith("A") or image.mode in ("I", "F", *_16_BITS) else 4  # copies of which are made
    if pixel * image.width * image.height > most_bytes:
        raise ValueError(
            f"{image.width}x{image.height} pixels of {image.mode} take {pixel * image.width * image.height / 1e6:.0f} "
            f"MB, more than {most_bytes / 1e6:.0f}"
        )


def _to_rgb(image: Any) -> Any:
    from PIL import Image, ImageOps

    tags = getattr(image, "tag_v2", {})  # of TIFF; gone once the image is turned
    deep = image.mode in _16_BITS or (image.mode == "I" and image.format == "PNG")
    image.load()  # a PNG can say how it is to be turned behind its pixels
    if tags or any(name in image.info for name in _MAY_TURN):
        ImageOps.exif_transpose(image, in_place=True)  # most need no turning, and no copy
    if deep:
        image = _from_16_bits(image, 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1, tags.get(_PHOTOMETRIC) == 0)
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits (Pillow's mode {image.mode}), whose black and white are not known")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*_GROUND, 255)), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bits(image: Any, white: int, inverted: bool) -> Any:
    """Grey of up to 16 bits in 8, where Pillow itself would cut off everything above 255."""
    import numpy
    from PIL import Image

    deep = numpy.asarray(image)
    grey = numpy.empty(deep.shape, numpy.uint8)
    for start in range(0, len(deep), _ROWS):  # of the whole, four copies in 32 bits would be made
        rows = deep[start : start + _ROWS].astype(numpy.float32) * (255 / white)
        grey[start : start + _ROWS] = rows.round().clip(0, 255)
    return Image.fromarray(255 - grey if inverted else grey)

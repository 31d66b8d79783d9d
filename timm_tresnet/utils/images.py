"""Find image files and read them as 8-bit images, with bounds on the memory that untrusted files need."""

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

# Only Pillow's most used decoders: rare ones are a larger risk with untrusted files.
FORMATS = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
}
CHANNELS = {1: "L", 3: "RGB"}  # channels of a network -> Pillow mode of its images, as in timm's scripts
_SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
_LARGEST_RATIO = 100  # of the sides; resizing the short side of a narrow image would make a huge image
_MOST_BYTES = 2**29  # of an image's pixels in memory; modes that are copied to become 8-bit RGB count 8 bytes a pixel
_ROWS = 64  # converted to 8 bits at a time
_GROUND = (255, 255, 255)  # background of transparent images, which are mostly drawn for white pages
_16_BITS = ("I;16", "I;16L", "I;16B", "I;16N")  # Pillow modes; for PNG, older releases have "I"
_MAY_TURN = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # Pillow reads the orientation from these
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags; a photometric interpretation of 0 means that 0 is white


def find_samples(pretrained_cfg: Mapping[str, Any]) -> Path:
    """Return the folder of sample photographs for a model: its own if the package has one, else `SAMPLES`."""
    name = f"{pretrained_cfg.get('architecture')}.{pretrained_cfg.get('tag')}"
    return {folder.name: folder for folder in _SAMPLES.iterdir()}.get(name, SAMPLES)


def find_images(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the given files and, for each given folder, the image files in it and its subfolders, sorted.

    In folders, files with a suffix of `FORMATS` are images; links to folders are not followed. A folder that cannot be
    listed is yielded itself, so that reading it raises the error. Memory holds the names of one folder a level.
    """
    for path in paths:
        if os.path.isdir(path):  # unlike Path.is_dir, False without permission
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
    """Return the images and subfolders of a folder, sorted, each with whether it is a folder."""
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
    except OSError:  # a link to itself
        return False


def printable(path: Path | str) -> str:
    """Return a file's name for messages and results, with control characters and bytes outside UTF-8 escaped."""
    return escape(os.fsencode(path).decode("utf-8", "backslashreplace"))


def read_image(
    path: str | Path,
    as_stored: bool = False,
    most_bytes: int = _MOST_BYTES,
    in_chans: int = 3,
    least_side: int | None = None,
) -> Any:
    """Read the first frame of an image file as 8-bit RGB or grey.

    The image is rotated by its EXIF orientation, transparent pixels are composed on white, and 16-bit pixels are scaled
    to 8 bits.

    Args:
        path: the file, in one of `FORMATS`.
        as_stored: read it as timm's scripts do: no rotation, the stored colour of transparent pixels, and Pillow's own
            conversion of 16-bit pixels.
        most_bytes: largest size of the pixels in memory, checked before decoding.
        in_chans: channels of the image, one of `CHANNELS`.
        least_side: decode a JPEG file at 1/2, 1/4 or 1/8 of its size if no side becomes shorter than this, in pixels;
            None for full size.

    Returns:
        A `PIL.Image.Image` in mode RGB, or L with one channel.

    Raises:
        ValueError: if the file cannot be read or is in no known format, or if its image is too large, too narrow, or
            has 32-bit pixels, whose range is unknown.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            os.listdir(path)  # raises the reason if it cannot be listed
        if not stat.S_ISREG(mode):  # reading a pipe would block
            raise ValueError("not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow repairs what it warns of
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=list(FORMATS)) as image:
                _check_size(image, most_bytes)
                if least_side:
                    image.draft(None, (least_side, least_side))  # other formats ignore it
                image = image if as_stored else _to_rgb(image)
                image.load()
                return image if image.mode == CHANNELS[in_chans] else image.convert(CHANNELS[in_chans])
    except UnidentifiedImageError as error:
        raise ValueError(f"not an image in {', '.join(FORMATS)}") from error
    except Image.DecompressionBombWarning as error:
        raise ValueError(
            f"the image has more than {(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} megapixels, which is not opened"
        ) from error
    except Exception as error:  # a decoder can raise anything for a damaged file
        raise ValueError(summarise(error)) from error


def _check_size(image: Any, most_bytes: int) -> None:
    short, long = sorted(image.size)
    if long > _LARGEST_RATIO * short:
        raise ValueError(f"{image.width}x{image.height} pixels, one side is over {_LARGEST_RATIO} times the other")
    # Bytes a pixel; 8 where copies are made.
    pixel = 8 if image.mode.endswith("A") or image.mode in ("I", "F", *_16_BITS) else 4
    if pixel * image.width * image.height > most_bytes:
        raise ValueError(
            f"{image.width}x{image.height} pixels of {image.mode} take {pixel * image.width * image.height / 1e6:.0f} "
            f"MB, more than {most_bytes / 1e6:.0f}"
        )


def _to_rgb(image: Any) -> Any:
    from PIL import Image, ImageOps

    tags = getattr(image, "tag_v2", {})  # of TIFF; lost when the image is rotated
    deep = image.mode in _16_BITS or (image.mode == "I" and image.format == "PNG")
    image.load()  # a PNG can have its orientation after the pixels
    if tags or any(name in image.info for name in _MAY_TURN):
        ImageOps.exif_transpose(image, in_place=True)  # no copy where no rotation is needed
    if deep:
        image = _from_16_bits(image, 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1, tags.get(_PHOTOMETRIC) == 0)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"32-bit pixels (Pillow mode {image.mode}) have no known range; save the image with 8 or 16 bits"
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*_GROUND, 255)), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bits(image: Any, white: int, inverted: bool) -> Any:
    """Scale grey of up to 16 bits to 8. Pillow itself clips values above 255."""
    import numpy
    from PIL import Image

    deep = numpy.asarray(image)
    grey = numpy.empty(deep.shape, numpy.uint8)
    for start in range(0, len(deep), _ROWS):  # the whole image at once would need four 32-bit copies
        rows = deep[start : start + _ROWS].astype(numpy.float32) * (255 / white)
        grey[start : start + _ROWS] = rows.round().clip(0, 255)
    return Image.fromarray(255 - grey if inverted else grey)

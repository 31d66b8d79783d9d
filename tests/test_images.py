import contextlib
import gc
import os
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy
import PIL
import pytest
import timm
from PIL import Image, ImageFile

from timm_tresnet.utils.images import FORMATS, SAMPLES, find_images, find_samples, printable, read_image

PHOTO = Image.open(SAMPLES / "cat.jpg").convert("RGB").resize((96, 64))
GREY = PHOTO.convert("L")
DEEP = numpy.asarray(GREY, dtype=numpy.uint16) * 257
PALETTE = PHOTO.quantize(64, dither=Image.Dither.NONE)
TURNED = PHOTO.transpose(Image.Transpose.ROTATE_90)
TURN_TO_VIEW = Image.Exif()
TURN_TO_VIEW[0x0112] = 6  # clockwise
OTHERS = {"save_all": True, "append_images": [Image.new("RGB", PHOTO.size)] * 2}


def with_alpha(image, alpha=99):
    image = image.copy()
    image.putalpha(alpha)
    return image


def on_white(image, alpha=99):
    """Return an image composed on white with a uniform opacity."""
    return Image.blend(Image.new("RGB", image.size, "white"), image.convert("RGB"), alpha / 255)


def blank(colour, mode="RGB", size=(9, 9)):
    return Image.new(mode, size, colour)


PICTURES = {  # what is saved under a name, how, and what is to be seen
    "rgb.png": (PHOTO, {}, PHOTO),
    "rgb.bmp": (PHOTO, {}, PHOTO),
    "rgb.tiff": (PHOTO, {}, PHOTO),
    "rgb.jpeg": (PHOTO, {"quality": 95}, PHOTO),
    "progressive.JPG": (PHOTO, {"quality": 95, "progressive": True}, PHOTO),
    "rgb.webp": (PHOTO, {"lossless": True}, PHOTO),
    "grey.png": (GREY, {}, GREY),
    "bits.png": (GREY.convert("1"), {}, GREY.convert("1")),
    "grey_16.png": (Image.fromarray(DEEP), {}, GREY),
    "grey_16.tif": (Image.fromarray(DEEP), {}, GREY),
    "cmyk.jpg": (PHOTO.convert("CMYK"), {"quality": 95}, PHOTO),
    "cmyk.tif": (PHOTO.convert("CMYK"), {}, PHOTO),
    "ycbcr.tif": (PHOTO.convert("YCbCr"), {"compression": "raw"}, PHOTO),
    "palette.png": (PALETTE, {}, PALETTE),
    "palette_transparent.png": (PALETTE, {"transparency": bytes([99] * 64)}, on_white(PALETTE)),
    "palette_transparent.gif": (blank(3, "P"), {"transparency": 3}, blank("white")),
    "colour_key.png": (blank((7, 8, 9)), {"transparency": (7, 8, 9)}, blank("white")),
    "grey_key.png": (blank(7, "L"), {"transparency": 7}, blank("white")),
    "rgba.png": (with_alpha(PHOTO), {}, on_white(PHOTO)),
    "rgba.webp": (with_alpha(PHOTO), {"lossless": True, "exact": True}, on_white(PHOTO)),
    "rgba.tif": (with_alpha(PHOTO), {}, on_white(PHOTO)),
    "la.png": (with_alpha(GREY), {}, on_white(GREY)),
    "opaque.png": (with_alpha(PHOTO, 255), {}, PHOTO),
    "hidden.png": (with_alpha(PHOTO, 0), {}, on_white(PHOTO, 0)),
    "turned.jpg": (TURNED, {"exif": TURN_TO_VIEW, "quality": 95}, PHOTO),
    "turned.png": (TURNED, {"exif": TURN_TO_VIEW}, PHOTO),
    "turned.webp": (TURNED, {"exif": TURN_TO_VIEW, "lossless": True}, PHOTO),
    "turned.tif": (TURNED, {"exif": TURN_TO_VIEW}, PHOTO),
    "turned_16.png": (
        Image.fromarray(DEEP).transpose(Image.Transpose.ROTATE_90),
        {"exif": TURN_TO_VIEW},
        GREY,
    ),
    "odd_exif.jpg": (PHOTO, {"exif": b"Exif\0\0II*\0noise" * 9, "quality": 95}, PHOTO),
    "animated.gif": (PALETTE, OTHERS, PALETTE),
    "animated.png": (PHOTO, OTHERS, PHOTO),
    "animated.webp": (PHOTO, {**OTHERS, "lossless": True}, PHOTO),
    "pages.tif": (PHOTO, OTHERS, PHOTO),
    "several.jpg": (PHOTO, {**OTHERS, "format": "MPO", "quality": 95}, PHOTO),
    "really_a_png.jpg": (PHOTO, {"format": "PNG"}, PHOTO),
    "no_suffix": (PHOTO, {"format": "PNG"}, PHOTO),
    "narrow.png": (blank("red", size=(100, 1)), {}, blank("red", size=(100, 1))),
    "pixel.png": (blank("red", size=(1, 1)), {}, blank("red", size=(1, 1))),
}


def assert_shows(path, expected):
    read = read_image(path)
    assert (read.mode, read.size) == ("RGB", expected.size)
    difference = numpy.asarray(read, dtype=float) - numpy.asarray(expected.convert("RGB"), dtype=float)
    assert numpy.abs(difference).mean() <= (3 if path.suffix.lower() in (".jpg", ".jpeg") else 1.5)


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves files open
def test_images_are_read_as_timm_does_where_that_is_asked_for(in_chans, tmp_path):
    (tmp_path / "class").mkdir()
    for name, (image, options, _) in PICTURES.items():
        if name.lower().endswith((".jpg", ".jpeg", ".png")):  # what timm takes
            others = {"append_images": [each.copy() for each in options.get("append_images", [])]}
            # Copies, since Pillow's images remember how they were saved last.
            image.copy().save(tmp_path / "class" / name, **options | (others if others["append_images"] else {}))
    mode = {1: "L", 3: "RGB"}[in_chans]  # as validate.py chooses
    data = timm.data.create_dataset("", root=str(tmp_path), input_img_mode=mode)
    otherwise = set()
    for index in range(len(data)):
        path = tmp_path / data.filename(index)
        with warnings.catch_warnings(action="ignore"):  # Pillow's, of odd files
            expected = numpy.asarray(data[index][0])
        assert numpy.array_equal(numpy.asarray(read_image(path, as_stored=True, in_chans=in_chans)), expected), path
        usual = numpy.asarray(read_image(path, in_chans=in_chans))
        if not numpy.array_equal(usual, expected):
            otherwise.add(path.name)
    assert len(data) > 20
    others = {"palette_transparent.png", "rgba.png", "la.png", "hidden.png", "colour_key.png", "grey_key.png"}
    assert otherwise == others | {"turned.jpg", "turned.png", "turned_16.png", "grey_16.png"}
    gc.collect()


@pytest.mark.parametrize("name", PICTURES)
def test_image_of_any_kind_shows_the_right_picture(name, tmp_path):
    if name == "ycbcr.tif" and int(PIL.__version__.partition(".")[0]) < 13:  # as Gradio wants it
        pytest.skip("Pillow before 13 does not read uncompressed TIFF in YCbCr")
    image, options, expected = PICTURES[name]
    image.save(tmp_path / name, **options)
    assert_shows(tmp_path / name, expected)


def write_tiff(path, pixels, bits=16, photometric=1, order="<", sample_format=1):
    """Write numbers as TIFF, of a kind that Pillow reads but does not write."""
    height, width = pixels.shape
    data = pixels.astype(f"{order}u{bits // 8}").tobytes()
    if bits == 12:
        pairs = pixels.reshape(-1, 2).astype(numpy.uint32)
        packed = (pairs[:, 0] << 12) | pairs[:, 1]
        data = numpy.stack([packed >> 16, packed >> 8, packed], 1).astype(numpy.uint8).tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    tags[339] = sample_format
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    path.write_bytes(start + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize(
    ("pixels", "options"),
    [
        (DEEP, {}),
        (DEEP, {"order": ">"}),
        (65535 - DEEP, {"photometric": 0}),
        (DEEP >> 4, {"bits": 12}),
    ],
    ids=["little_endian", "big_endian", "white_is_0", "12_bits"],
)
def test_deep_grey_is_neither_black_nor_saturated(pixels, options, tmp_path):
    write_tiff(tmp_path / "grey.tif", pixels, **options)
    assert_shows(tmp_path / "grey.tif", GREY)


def bomb(path, side):
    """Write a PNG of few bytes whose header declares a square of that side."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(10**6))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def save(path, image=PHOTO, **options):
    image.save(path, **options)


def save_spider(path):
    GREY.convert("F").save(path.with_suffix(".spider"), "SPIDER")  # by Pillow, images of that suffix then are SPIDER
    path.with_suffix(".spider").rename(path)


def link(path, target):
    path.symlink_to(target)


CAT = (SAMPLES / "cat.jpg").read_bytes()
UNREADABLE = {  # how a file gets that way, and what is said of it
    "empty": (lambda path: path.touch(), "not an image in JPEG, PNG, WEBP, BMP, GIF, TIFF"),
    "text": (lambda path: path.write_text("not an image"), "not an image in"),
    "zeros": (lambda path: path.write_bytes(bytes(1000)), "not an image in"),
    "cut": (lambda path: path.write_bytes(CAT[:2000]), "truncated"),
    "cut_header": (lambda path: path.write_bytes(CAT[:30]), "."),
    "ppm": (lambda path: save(path, format="PPM"), "not an image in"),
    "tga": (lambda path: save(path, format="TGA"), "not an image in"),
    "dds": (lambda path: save(path, format="DDS"), "not an image in"),
    "spider": (save_spider, "not an image in"),
    "eps": (lambda path: save(path, format="EPS"), "not an image in"),
    "pdf": (lambda path: save(path, format="PDF"), "not an image in"),
    "bomb_of_100_megapixels": (lambda path: bomb(path, 10_000), "more than 89 megapixels"),
    "bomb_of_10_000_megapixels": (lambda path: bomb(path, 100_000), "exceeds limit"),
    "needle": (lambda path: save(path, blank("red", size=(101, 1)), format="PNG"), "101x1 pixels, one side is over"),
    "integers": (lambda path: save(path, GREY.convert("I"), format="TIFF"), "mode I"),
    "floats": (lambda path: save(path, GREY.convert("F"), format="TIFF"), "mode F"),
    "signed": (lambda path: write_tiff(path, DEEP, sample_format=2), "mode I"),
    "missing": (lambda path: None, "there is no "),
    "folder": (lambda path: path.mkdir(), "not a file"),
    "pipe": (os.mkfifo, "not a file"),
    "device": (lambda path: link(path, "/dev/zero"), "not a file"),
    "loop": (lambda path: link(path, path), "symbolic links"),
    "dangling": (lambda path: link(path, "nowhere"), "there is no "),
}


@pytest.mark.parametrize(("make", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_image_is_a_value_error_in_one_line(make, message, tmp_path):
    make(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=message) as caught:
        read_image(tmp_path / "a.jpg")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["a/b.jpg", "\0.jpg", "x" * 300])
def test_impossible_names_are_value_errors(name, tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match="."):
        read_image(tmp_path / name)


@pytest.mark.parametrize(
    "error",
    [AttributeError(), MemoryError(), NotImplementedError("no"), RecursionError("a\nb"), TypeError(), KeyError(3)],
)
def test_whatever_a_decoder_raises_is_the_failure_of_that_file(error, tmp_path, monkeypatch):
    PHOTO.save(tmp_path / "a.png")

    def fail(self):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ValueError, match=r"\A.+\Z"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("format", FORMATS)
def test_mutated_files_are_read_or_value_errors(format, tmp_path):
    path = tmp_path / "a"
    PHOTO.resize((32, 24)).save(path, format)
    content = path.read_bytes()
    draw = numpy.random.default_rng(0)
    read = 0
    for _ in range(60):
        mutated = bytearray(content)
        for position in draw.integers(0, min(len(content), 400), int(draw.integers(7))):
            mutated[position] = int(draw.integers(256))
        path.write_bytes(mutated[: int(draw.integers(1, 2 * len(content)))])
        with contextlib.suppress(ValueError):
            assert read_image(path).mode == "RGB"
            read += 1
    assert 0 < read < 60


def test_images_in_folders_are_found_in_order_and_named_files_as_they_are(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "e.jpg").mkdir()  # a folder all the same
    for name in ("b/d.PNG", "b/c.jpeg", "a.jpg", "b/e.tiff", "b/f.webp", "b/g.gif", "b/h.bmp", "notes.txt", "b/i.psd"):
        (tmp_path / name).touch()
    found = [tmp_path / name for name in ("a.jpg", "b/c.jpeg", "b/d.PNG", "b/e.tiff", "b/f.webp", "b/g.gif", "b/h.bmp")]
    assert list(find_images([tmp_path])) == found
    assert list(find_images([tmp_path / "notes.txt", tmp_path / "b"])) == [tmp_path / "notes.txt", *found[1:]]


def test_links_to_folders_are_not_followed_and_everything_named_like_an_image_is_found(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "sub" / "a.jpg").symlink_to("a.jpg")
    (tmp_path / "b.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "c.png")
    assert list(find_images([tmp_path])) == [tmp_path / "b.jpg", tmp_path / "c.png", tmp_path / "sub" / "a.jpg"]
    loop = tmp_path / "loop.jpg"
    loop.symlink_to(loop)
    assert list(find_images([loop, tmp_path / "missing"])) == [loop, tmp_path / "missing"]


def test_order_is_that_of_sorted_paths_and_no_folder_is_listed_before_its_turn(tmp_path, monkeypatch):
    names = ("a", "a.jpg", "a-b", "A", "aa", "b.png", "ä")
    for first in names:
        for second in names:
            file = tmp_path / first.removesuffix(".jpg") / second / "x.jpg" if "." not in second else None
            file = file or tmp_path / first.removesuffix(".jpg") / second
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    (tmp_path / "a.jpg").touch()
    deep = tmp_path / "z"
    for _ in range(200):
        deep /= "z"
    deep.mkdir(parents=True)
    (deep / "last.jpg").touch()
    expected = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert list(find_images([tmp_path])) == expected
    listed, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scan(path))
    next(find_images([tmp_path]))
    assert len(listed) == 3


def test_jpeg_is_decoded_smaller_where_no_side_falls_below_the_least(tmp_path):
    from PIL import Image

    photo = Image.new("RGB", (640, 400), (200, 30, 60))
    photo.save(tmp_path / "a.jpg")
    photo.save(tmp_path / "a.png")
    sizes = {side: read_image(tmp_path / "a.jpg", least_side=side).size for side in (None, 401, 201, 200, 60, 50, 1)}
    assert sizes == {
        **{None: (640, 400), 401: (640, 400), 201: (640, 400), 200: (320, 200)},
        **{60: (160, 100), 50: (80, 50), 1: (80, 50)},
    }
    assert read_image(tmp_path / "a.png", least_side=50).size == (640, 400)


def test_an_orientation_in_xmp_turns_an_image_too(tmp_path):
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png", pnginfo=text)
    assert read_image(tmp_path / "a.png").size == (20, 40)
    assert read_image(tmp_path / "a.png", as_stored=True).size == (40, 20)


def test_folder_that_cannot_be_listed_is_found_and_says_so_when_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").touch()
    closed = tmp_path / "closed"
    closed.mkdir()
    listed = os.scandir

    def refuse(path="."):  # not by its mode, which root may ignore
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    assert list(find_images([tmp_path])) == [tmp_path / "a.jpg", closed]
    with pytest.raises(ValueError, match="permission denied"):
        read_image(closed)


def test_names_are_printable_whatever_their_bytes(tmp_path):
    name = os.fsdecode(b"na\xc3\xafve\xff\n\x1b.png")
    PHOTO.save(tmp_path / name)
    (path,) = find_images([tmp_path])
    assert_shows(path, PHOTO)
    assert printable(path) == f"{tmp_path}/naïve\\xff\\n\\x1b.png"
    printable(path).encode()


def test_every_folder_of_samples_belongs_to_a_model_in_the_package_and_names_its_sources():
    folders = list(SAMPLES.parent.iterdir())
    assert SAMPLES in folders
    for folder in folders:
        architecture, tag = folder.name.split(".")
        assert find_samples({"architecture": architecture, "tag": tag}) == folder
        assert timm.models.get_pretrained_cfg(folder.name).file
        sources = (folder / "SOURCES.md").read_text(encoding="utf-8")
        photographs = list(find_images([folder]))
        assert photographs
        for path in photographs:
            assert f"| `{path.name}` |" in sources
            assert max(read_image(path).size) > 32


LICENCES = re.compile(r"CC0 1\.0|public domain|CC BY 4\.0|Apache-2\.0|MIT")
SOURCE = {".py", ".toml", ".typed", ".md"}  # written for this package, whose LICENSE holds


def test_every_file_that_is_shipped_names_its_source_and_its_licence():
    package, root = SAMPLES.parents[2], Path(__file__).parents[1]
    shipped = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    shipped += [path for path in (root / "docs").rglob("*") if path.suffix in (".webp", ".png", ".jpg", ".gif")]
    others = [path for path in shipped if path.suffix not in SOURCE]
    assert {path.suffix for path in others} == {".jpg", ".safetensors", ".webp"}
    for path in others:
        if path.suffix == ".safetensors":
            name = path.stem
            (page,) = [each for each in (root / "hub").glob("*/README.md") if f"# {name}\n" in each.read_text()]
            said = re.search(r"^license: (.*)$", page.read_text(), re.MULTILINE)[1]
            assert said == "apache-2.0"
            assert "## Data" in page.read_text()
        else:
            (row,) = [
                row
                for row in next(path.parent.glob("SOURCES.*")).read_text().splitlines()
                if f"| `{path.name}` |" in row
            ]
            cells = [cell.strip() for cell in row.strip("| ").split(" | ")]
            assert len(cells) == 5
            assert all(cells)
            assert LICENCES.search(cells[3]), f"{path.name} has no licence: {cells[3]}"
            assert "none" not in cells[3]


@pytest.mark.parametrize("tag", ["other", "..", None, "r64_cifar10/../../samples"])
def test_samples_of_a_model_that_is_not_in_the_package_are_those_of_the_first(tag):
    assert find_samples({"architecture": "test_tresnet", "tag": tag}) == SAMPLES
    assert find_samples({}) == SAMPLES

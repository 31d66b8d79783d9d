import pytest
from PIL import Image

from timm_tresnet.images import SAMPLES, find_images, read_image


def test_images_in_folders_are_found_in_order_and_named_files_as_they_are(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "e.jpg").mkdir()  # a folder all the same
    for name in ("b/d.PNG", "b/c.jpeg", "a.jpg", "notes.txt"):
        (tmp_path / name).touch()
    found = [tmp_path / "a.jpg", tmp_path / "b" / "c.jpeg", tmp_path / "b" / "d.PNG"]
    assert list(find_images([tmp_path])) == found
    assert list(find_images([tmp_path / "notes.txt", tmp_path / "b"])) == [tmp_path / "notes.txt", *found[1:]]


def test_image_is_rgb_and_turned_as_its_camera_was_held(tmp_path):
    image = Image.open(SAMPLES / "cat.jpg").convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn clockwise to view
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    read = read_image(tmp_path / "turned.png")
    assert read.mode == "RGB"
    assert read.tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize(
    "content", [b"", b"text", (SAMPLES / "cat.jpg").read_bytes()[:2000]], ids=["empty", "text", "cut"]
)
def test_unreadable_image_is_a_value_error(content, tmp_path):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ValueError, match="."):
        read_image(tmp_path / "a.jpg")

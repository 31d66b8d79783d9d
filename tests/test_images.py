import pytest
import timm
from PIL import Image

from timm_tresnet.images import SAMPLES, find_images, read_image
from timm_tresnet.labels import is_multi_label, label_lookup


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


def test_classes_are_named_by_config_then_imagenet_then_number():
    named = timm.create_model("test_tresnet", pretrained_cfg_overlay={"label_names": ["a", "b"]}, num_classes=2)
    assert label_lookup(named)(1) == "b"
    named.reset_classifier(3)
    assert label_lookup(named)(1) == "class 1"
    described = timm.create_model(
        "test_tresnet",
        pretrained_cfg_overlay={"label_names": ["a", "b"], "label_descriptions": {"b": "the letter b"}},
        num_classes=2,
    )
    assert [label_lookup(described)(index) for index in range(2)] == ["a", "the letter b"]
    assert label_lookup(timm.create_model("tresnet_m", device="meta"))(281) == "tabby, tabby cat"
    assert label_lookup(timm.create_model("tresnet_m", num_classes=17, device="meta"))(4) == "class 4"


@pytest.mark.parametrize(
    ("config", "multi_label"),
    [({}, False), ({"notes": None}, False), ({"notes": ["other"]}, False), ({"notes": ("multi-label",)}, True)],
    ids=["nothing", "none", "other_notes", "multi_label"],
)
def test_config_says_whether_an_image_has_any_number_of_labels(config, multi_label):
    assert is_multi_label(config) == multi_label

import importlib.util
from pathlib import Path

from PIL import Image

SCRIPT = Path(__file__).parents[1] / "hub" / "test_tresnet" / "prepare.py"


class Photographs:
    """What torchvision's CIFAR10 is to the script: classes, and pairs of an image and the index of its class."""

    classes = ("cat", "dog")

    def __iter__(self):
        for index in range(6):
            yield Image.new("RGB", (32, 32), (40 * index, 0, 0)), index % 2


def test_photographs_are_written_into_numbered_files_of_their_class(tmp_path):
    spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    assert prepare.write_class_folders(Photographs(), tmp_path) == {"cat": 3, "dog": 3}
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jpg"))
    assert files == [f"{name}/000{index}.jpg" for name in ("cat", "dog") for index in range(3)]
    assert abs(Image.open(tmp_path / "dog" / "0002.jpg").getpixel((5, 5))[0] - 200) < 5

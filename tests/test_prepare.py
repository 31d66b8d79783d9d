import os
import sys

import pytest
from PIL import Image
from scripts import load_script


class Photographs:
    """A stand-in for torchvision's CIFAR10: classes, and pairs of image and class index."""

    classes = ("cat", "dog")

    def __iter__(self):
        for index in range(6):
            yield Image.new("RGB", (32, 32), (40 * index, 0, 0)), index % 2


@pytest.fixture
def prepare():
    return load_script("hub/test_tresnet/prepare.py")


def test_photographs_are_written_into_numbered_files_of_their_class(prepare, tmp_path):
    assert prepare.write_class_folders(Photographs(), tmp_path) == {"cat": 3, "dog": 3}
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jpg"))
    assert files == [f"{name}/000{index}.jpg" for name in ("cat", "dog") for index in range(3)]
    assert abs(Image.open(tmp_path / "dog" / "0002.jpg").getpixel((5, 5))[0] - 200) < 5


def test_the_script_writes_both_splits_whole_and_never_over_anything(prepare, tmp_path, monkeypatch):
    def load(cache, train, download):
        if not train and (tmp_path / "offline").exists():
            raise RuntimeError("no network")
        return Photographs()

    monkeypatch.setattr(prepare.torchvision.datasets, "CIFAR10", load)
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path / "new" / "cifar10")])
    (tmp_path / "offline").touch()
    with pytest.raises(RuntimeError, match="no network"):
        prepare.main()
    assert os.listdir(tmp_path / "new") == []
    (tmp_path / "offline").unlink()
    prepare.main()
    assert os.listdir(tmp_path / "new") == ["cifar10"]
    files = [path for path in (tmp_path / "new" / "cifar10").rglob("*.jpg") if path.parts[-3] in ("train", "test")]
    assert len(files) == 12
    with pytest.raises(SystemExit, match="exists already; name a new folder"):
        prepare.main()

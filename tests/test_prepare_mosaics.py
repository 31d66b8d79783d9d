import contextlib
import random
import sys
from pathlib import Path

import pytest
from PIL import Image
from scripts import load_script

from timm_tresnet.tagging.annotations import read_annotations

COLOURS = {"cat": (250, 0, 0), "dog": (0, 250, 0), "frog": (0, 0, 250)}


@pytest.fixture
def prepare(monkeypatch):
    module = load_script("hub/mosaic_cifar10/prepare.py")
    monkeypatch.setattr(module, "HELD_OUT", 8)
    return module


@pytest.fixture
def photographs(tmp_path):
    for split, count in (("train", 12), ("test", 4)):
        for name, colour in COLOURS.items():
            (tmp_path / "cifar10" / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (32, 32), colour).save(tmp_path / "cifar10" / split / name / f"{index:04}.jpg")
    return tmp_path / "cifar10"


def test_each_photograph_is_once_in_a_round(prepare):
    photographs = [Path(f"{index}.jpg") for index in range(10)]
    mosaics = list(prepare.arrange(photographs, 3, random.Random(0)))
    assert len(mosaics) == 6
    for start in (0, 2, 4):
        used = [photograph for mosaic in mosaics[start : start + 2] for photograph in mosaic]
        assert len(set(used)) == 8


def test_labels_are_the_classes_of_the_four_photographs(prepare, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(photographs), str(tmp_path / "mosaics")])
    prepare.main()
    counts = {}
    for name in ("train", "val", "test"):
        annotations = read_annotations(tmp_path / "mosaics" / f"{name}.csv")
        counts[name] = len(annotations.examples)
        for example in annotations.examples:
            with Image.open(example.path) as image:
                assert image.size == (64, 64)
                found = [image.getpixel((x, y)) for x in (16, 48) for y in (16, 48)]
            brightest = {pixel.index(max(pixel)) for pixel in found}
            assert set(example.labels) == {list(COLOURS)[channel] for channel in brightest}
    assert counts == {"train": 14, "val": 2, "test": 3}
    with pytest.raises(SystemExit, match="exists already; name a new folder"):
        prepare.main()


def test_held_out_mosaics_share_no_photograph_with_those_to_train_on(prepare, photographs, tmp_path, monkeypatch):
    written = {}
    monkeypatch.setattr(prepare, "write_mosaics", lambda mosaics, folder, name: written.update({name: list(mosaics)}))
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(photographs), str(tmp_path / "mosaics")])
    monkeypatch.setattr(prepare, "atomic_write", lambda path, overwrite: contextlib.nullcontext(path))
    prepare.main()
    used = {name: {photograph for mosaic in mosaics for photograph in mosaic} for name, mosaics in written.items()}
    assert not used["train"] & used["val"]
    assert {path.parts[-3] for path in used["train"] | used["val"]} == {"train"}
    assert {path.parts[-3] for path in used["test"]} == {"test"}

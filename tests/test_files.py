import re

import pytest

from timm_tresnet.files import whole


def test_files_appear_with_all_that_belongs_to_them(tmp_path):
    path = tmp_path / "new" / "network.xml"
    with whole(path) as unfinished:
        unfinished.write_text("network")
        unfinished.with_suffix(".bin").write_text("weights")
        assert not path.exists()
    assert {each.name: each.read_text() for each in path.parent.iterdir()} == {
        "network.xml": "network",
        "network.bin": "weights",
    }


def test_folders_appear_whole(tmp_path):
    with whole(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
        (unfinished / "a").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["folder", "folder/a"]


def test_an_error_leaves_nothing_and_what_was_there(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("before")

    def fail():
        with whole(path) as unfinished:
            unfinished.write_text("half")
            raise ValueError("out of luck")

    with pytest.raises(ValueError, match="out of luck"):
        fail()
    assert [each.name for each in tmp_path.iterdir()] == ["page.md"]
    assert path.read_text() == "before"


def test_files_are_replaced_unless_they_must_not_be(tmp_path):
    path = tmp_path / "results.json"
    for text in ("one", "two"):
        with whole(path) as unfinished:
            unfinished.write_text(text)
    assert path.read_text() == "two"

    def write_three():
        with whole(path, overwrite=False) as unfinished:
            unfinished.write_text("three")

    with pytest.raises(FileExistsError, match=re.escape(f"{path} came to exist meanwhile")) as caught:
        write_three()
    assert path.read_text() == "two"
    (left,) = set(tmp_path.iterdir()) - {path}
    assert left.read_text() == "three"
    assert str(left) in str(caught.value)

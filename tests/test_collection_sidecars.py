import os
import stat
from pathlib import Path

import pytest
from killing import run_killed

from timm_tresnet.collection.sidecars import Sidecars
from timm_tresnet.tagging.annotations import read_annotations

TAGS = ["long_hair", "saber_(fate)", "o_o", "^_^", "(o)_(o)", "ä"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "long_hair, saber_(fate), o_o, ^_^, (o)_(o), ä"),
        ({"replace_underscores": True}, "long hair, saber (fate), o_o, ^_^, (o)_(o), ä"),
        ({"escape_parentheses": True}, r"long_hair, saber_\(fate\), o_o, ^_^, \(o\)_\(o\), ä"),
        ({"prefix": "my_cat (a)"}, "my_cat (a), long_hair, saber_(fate), o_o, ^_^, (o)_(o), ä"),
        ({"prefix": "my cat, "}, "my cat, long_hair, saber_(fate), o_o, ^_^, (o)_(o), ä"),
    ],
    ids=["plain", "underscores", "parentheses", "prefix", "prefix_with_comma"],
)
def test_tags_are_written_as_trainers_take_them(options, text, tmp_path):
    assert Sidecars(**options).write(tmp_path / "a.b.jpg", TAGS)
    assert os.listdir(tmp_path) == ["a.b.txt"]
    assert (tmp_path / "a.b.txt").read_text(encoding="utf-8") == f"{text}\n"


def test_no_tags_are_an_empty_line_and_annotations_read_them_all(tmp_path):
    for name, tags in (("a", ["cat", "dog"]), ("b", []), ("c", ["bird"])):
        (tmp_path / f"{name}.jpg").touch()
        Sidecars().write(tmp_path / f"{name}.jpg", tags)
    assert (tmp_path / "b.txt").read_bytes() == b"\n"
    annotations = read_annotations(tmp_path)
    assert [example.labels for example in annotations.examples] == [("cat", "dog"), ("bird",)]


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_existing_files_stay(make, tmp_path):
    make(tmp_path / "a.txt")
    before = os.lstat(tmp_path / "a.txt")
    assert Sidecars().is_done(tmp_path / "a.jpg")
    assert not Sidecars().write(tmp_path / "a.jpg", ["cat"])
    assert os.lstat(tmp_path / "a.txt") == before
    assert os.listdir(tmp_path) == ["a.txt"]


def test_names_may_be_as_long_as_the_file_system_has_them(tmp_path):
    for name in ("a" * 251, "ä" * 125, "b" * 247):  # names in collections often list all tags
        assert Sidecars().write(tmp_path / f"{name}.jpg", ["cat"])
        assert (tmp_path / f"{name}.txt").read_text() == "cat\n"
    assert len(os.listdir(tmp_path)) == 3


@pytest.mark.parametrize("links", [True, False], ids=["links", "no_links"])
def test_files_created_meanwhile_stay(links, tmp_path, monkeypatch):
    link = os.link

    def come_first(source, target):
        Path(target).write_text("precious")
        if not links:
            raise PermissionError(1, "Operation not permitted")
        link(source, target)

    monkeypatch.setattr(os, "link", come_first)
    assert not Sidecars().write(tmp_path / "a.jpg", ["cat"])
    assert (tmp_path / "a.txt").read_text() == "precious"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_file_systems_without_links_are_written_to(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert Sidecars().write(tmp_path / "a.jpg", ["cat"])
    assert (tmp_path / "a.txt").read_text() == "cat\n"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_files_are_replaced_if_asked_to_and_links_are_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "a.txt").symlink_to("elsewhere")
    (tmp_path / ".a.txt.partial").symlink_to("elsewhere")
    assert not Sidecars(overwrite=True).is_done(tmp_path / "a.jpg")
    assert Sidecars(overwrite=True).write(tmp_path / "a.jpg", ["cat"])
    assert (tmp_path / "a.txt").read_text() == "cat\n"
    assert (tmp_path / "elsewhere").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "elsewhere"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_moment_a_file_is_whole_or_not_there_and_nothing_is_left_by_the_next(overwrite, tmp_path):
    moment = 0
    sidecars = Sidecars(overwrite=overwrite)
    while run_killed(lambda: sidecars.write(tmp_path / f"{moment}.jpg", ["cat"]), moment):  # noqa: B023
        text = tmp_path / f"{moment}.txt"
        assert not text.exists() or text.read_text() == "cat\n"
        sidecars.write(tmp_path / f"{moment}.jpg", ["cat"])
        assert text.read_text() == "cat\n"
        moment += 1
    assert moment >= 2
    assert {path.suffix for path in tmp_path.iterdir()} == {".txt"}


def test_files_have_the_permissions_of_any_other(tmp_path):
    (tmp_path / "other").touch()
    Sidecars().write(tmp_path / "a.jpg", ["cat"])
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Sidecars().write(tmp_path / "gone" / "a.jpg", ["cat"])

"""Strangers' names reach no terminal as they are."""

import re
import sys

import pytest
import torch
from safetensors.torch import save_file

from timm_tresnet import convert_checkpoint
from timm_tresnet.cli import main as cli
from timm_tresnet.conversion.reading import shorten_names
from timm_tresnet.utils.schema import TEXT
from timm_tresnet.utils.terminal import escape

HOSTILE = {
    "title": "\x1b]0;owned\x07",
    "clear_screen": "\x1b[2J\x1b[H",
    "eight_bit_control": "\x9b2J",
    "line": "a\ntimm-tresnet: all is well",
    "return": "a\rb",
    "backspace": "ab\b\bcd",
    "line_separator": "a\u2028b",
    "turned_around": "a\u202egpj.exe",
    "half_a_pair": "\ud800",
    "null": "a\0b",
}
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_a_terminal_obeys_is_escaped(text):
    assert not re.search(r"[^ -~]", escape(text))
    assert not TEXT.fits(text)
    assert escape(text).encode("ascii").decode("unicode_escape") == text


@pytest.mark.parametrize("text", ["cat", "Käse", "猫", "אב", "👩‍🔬", "a b", "C:\\x1b"])
def test_other_text_stays(text):
    assert escape(text) == text
    assert TEXT.fits(text)


def test_lines_stay_where_they_are_asked_for():
    assert escape("a\n\x1b", lines=True) == "a\n\\x1b"


def test_long_names_are_shortened():
    assert len(shorten_names(["x" * 10**6] * 30)) < 5000


WRONG = {  # what is done to a good checkpoint, by a tensor's hostile name
    "unexpected": lambda tensors, name: tensors | {name: torch.zeros(2)},
    "missing": lambda tensors, name: {name: tensors["body.conv1.0.weight"]},
    "no_tensor": lambda tensors, name: tensors | {name: 3},
    "odd_dtype": lambda tensors, name: tensors | {name: torch.zeros(2, dtype=torch.int8)},
    "number": lambda tensors, name: tensors | {name: torch.tensor(1.0)},
    "twice": lambda tensors, name: {f"{name}.{key}": tensors[key] for key in tensors} | {name + ".x": 1, "x": 1},
    "class_names": lambda tensors, name: {"model": tensors, "idx_to_class": {0: name}},
    "wrapper": lambda tensors, name: {name: tensors},
}


@pytest.mark.parametrize(
    ("wrong", "suffix"),
    [
        pytest.param(wrong, suffix, marks=[] if suffix == ("pth", "safetensors")[index % 2] else pytest.mark.thorough)
        for index, wrong in enumerate(WRONG)
        for suffix in ("pth", "safetensors")
    ],
)
def test_convert_prints_no_name_as_it_is(wrong, suffix, tensors, tmp_path, capsys):
    for number, name in enumerate(HOSTILE.values()):
        checkpoint = WRONG[wrong](tensors, name)
        path = tmp_path / f"{number}.{suffix}"
        if suffix == "pth":
            torch.save(checkpoint, path)
        elif any(not isinstance(each, torch.Tensor) for each in checkpoint.values()) or "\ud800" in name:
            continue
        else:
            save_file(checkpoint, path)
        cli.main(["convert", str(path), "--output", str(tmp_path / f"{number} {suffix}")])
        printed = capsys.readouterr()
        assert (printed.out + printed.err).strip()
        assert not OBEYED.search(printed.out + printed.err)
        assert all(re.match(r"timm-tresnet: |  |/", line) for line in (printed.out + printed.err).splitlines())


def test_errors_of_the_interface_are_escaped_too(tensors, tmp_path):
    torch.save({**tensors, HOSTILE["title"]: torch.zeros(2)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="unexpected") as caught:
        convert_checkpoint(tmp_path / "a.pth")
    assert not OBEYED.search(str(caught.value))


@pytest.mark.skipif(sys.platform == "win32", reason="needs names of files that are any bytes")
def test_names_of_files_are_escaped(tmp_path, capsys):
    for name in (b"\x1b]0;owned\x07.pth", b"\xff.pth"):
        path = tmp_path / name.decode(errors="surrogateescape")
        path.write_bytes(b"nothing")
        assert cli.main(["convert", str(path), "--output", str(tmp_path / "out")]) == 1
        assert not OBEYED.search(capsys.readouterr().err)

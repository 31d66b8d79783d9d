import dataclasses
import os

import pytest
import reference
import timm
import torch
from scripts import load_script

from timm_tresnet.weights import checkpoint
from timm_tresnet.weights.catalogue import load_catalogue

NAME = "test_tresnet.demo"


@pytest.fixture
def script():
    return load_script("hub/convert.py")


@pytest.fixture
def convert(script, tmp_path, monkeypatch):
    """Write a small file of the official code, register a public weight for it, run the script on it."""

    def run(change=lambda tensors: tensors, slope=None, **official):
        tensors = reference.official_state_dict((2, 2, 3, 1), planes=16, num_classes=20, **official)
        torch.save({"model": change(tensors)}, tmp_path / "demo.pth")
        public = dataclasses.replace(
            load_catalogue()["tresnet_xl.asl_voc_448"],
            architecture="test_tresnet",
            tag="demo",
            files=("demo.pth",),
            head=official.get("head", "linear"),
            negative_slope=slope,
            stem_negative_slope=slope,
        )
        monkeypatch.setattr("timm_tresnet.conversion.description.load_catalogue", lambda: {NAME: public})
        arguments = [str(tmp_path / "demo.pth"), "--public-weight", NAME, "--output", str(tmp_path / "folder")]
        return script.main([*arguments, "--repo", "owner/demo"])

    return run


@pytest.mark.parametrize(
    "official",
    [{}, {"head": "bottleneck"}, {"head": "ml_decoder"}, {"slope": 1e-6}],
    ids=["linear", "bottleneck", "ml_decoder", "cars_slope"],
)
def test_equal_output_is_proved_and_written(official, convert, tmp_path, capsys):
    assert convert(**official) == 0
    assert "equal to" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    assert model.pretrained_cfg["tag"] == "demo"
    assert model.num_classes == 20
    assert "owner/demo" in (tmp_path / "folder" / "README.md").read_text()


def test_nothing_is_written_if_the_output_differs(convert, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "batch_norm_weight", lambda weight: weight.abs())  # forgets the 1e-5
    assert convert(slope=0.2) == 1
    assert "differs by" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["demo.pth"]


def spoil(tensors):
    tensors["head.fc.bias"][0] = float("nan")
    return tensors


def rename(tensors):
    return checkpoint.from_official(tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil, "cannot be compared: NaN or infinite values in head.fc.bias"),
        (rename, "needs a file of the official code to compare with, got timm names"),
        (lambda tensors: {}, "needs a TResNet, with body.conv1"),
    ],
    ids=["nan", "timm", "empty"],
)
def test_nothing_is_written_if_there_is_nothing_to_compare(change, message, convert, tmp_path, capsys):
    assert convert(change) == 1
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["demo.pth"]

import importlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import reference
import torch
from huggingface_hub import ModelCard

from timm_tresnet.cli import main as cli


@pytest.fixture
def checkpoints(tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    for name in ("a", "b"):
        torch.save({"model": reference.official_state_dict((2, 2, 3, 1), planes=16)}, folder / f"{name}.pth")
    return folder


def test_convert_writes_a_folder_that_classify_loads(checkpoints, tmp_path, capsys):
    known = ["--input-size", "64", "--mean", "0", "0", "0", "--std", "1", "1", "1", "--crop-pct", "1"]
    known += ["--interpolation", "bilinear", "--crop-mode", "squash", "--license", "mit", "--dataset", "Demo"]
    output = tmp_path / "new"
    assert cli.main(["convert", str(checkpoints / "a.pth"), "--output", str(output), "--multi-label", *known]) == 0
    first, names, norms = capsys.readouterr().out.splitlines()
    assert first == f"{output}: test_tresnet, 10 classes, official names, no public weight"
    assert names == "  class names: none found; give them with --labels FILE"
    assert norms.startswith("  In-Place ABN weights")
    assert cli.main(["classify", "--json", "--threshold", "0", "--model", f"local-dir:{output}"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert {len(result["predictions"]) for result in results} == {10}


def test_card_says_what_the_config_says(checkpoints, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "hub")
    known = ["--input-size", "64", "--license", "mit", "--dataset", "My *birds*", "--multi-label"]
    output = tmp_path / "new"
    assert cli.main(["convert", str(checkpoints / "a.pth"), "--output", str(output), *known]) == 0
    pretrained_cfg = json.loads((output / "config.json").read_text())["pretrained_cfg"]
    assert (pretrained_cfg["license"], pretrained_cfg["notes"]) == ("mit", ["multi-label"])
    assert pretrained_cfg["description"] == "Trained on My *birds*"
    card = ModelCard((output / "README.md").read_text())
    assert card.data.license == "mit"
    assert "multi-label" in card.data.tags
    for said in (r"Converted from a checkpoint trained on My \*birds\*.", "one sigmoid a class", "[0].sigmoid()"):
        assert said in card.text
    assert not re.search(r"not known|softmax|None", card.text)
    checks = importlib.import_module("checks")
    card.save(output / "README.md")
    text = (output / "README.md").read_text().replace("local-dir:FOLDER", "hf-hub:owner/birds")
    (output / "README.md").write_text(text)
    assert checks.find_problems(output, checks.read_shapes(output / "model.safetensors"), "owner/birds") == []


def test_convert_writes_a_subfolder_for_each_of_several_files(checkpoints, tmp_path, capsys):
    (checkpoints / "c.pth").write_text("<html>403 Forbidden</html>")
    files = [str(checkpoints / f"{name}.pth") for name in ("a", "c", "b")]
    assert cli.main(["convert", *files, "--output", str(tmp_path / "new")]) == 1
    captured = capsys.readouterr()
    assert f"timm-tresnet: cannot read {files[1]}" in captured.err
    assert sorted(os.listdir(tmp_path / "new")) == ["a", "b"]
    assert cli.main(["convert", *files[::2], "--output", str(tmp_path / "new")]) == 1
    assert "or overwrite it" in capsys.readouterr().err
    assert cli.main(["convert", *files[::2], "--output", str(tmp_path / "new"), "--overwrite"]) == 0


def test_convert_refuses_files_that_would_share_a_subfolder(checkpoints, tmp_path, capsys):
    shutil.copy(checkpoints / "a.pth", tmp_path / "a.pt")
    assert cli.main(["convert", str(checkpoints / "a.pth"), str(tmp_path / "a.pt"), "--output", str(tmp_path)]) == 2
    assert "two of the files have the same name" in capsys.readouterr().err


def test_convert_warns_of_bad_numbers(checkpoints, tmp_path, capsys):
    tensors = reference.official_state_dict((2, 2, 3, 1), planes=16)
    tensors["head.fc.bias"][0] = float("nan")
    torch.save(tensors, checkpoints / "nan.pth")
    assert cli.main(["convert", str(checkpoints / "nan.pth"), "--output", str(tmp_path / "new")]) == 0
    assert "nan.pth: NaN or infinite values in head.fc.bias" in capsys.readouterr().err


def test_the_old_name_of_a_public_weight_is_taken_and_not_shown(capsys):
    words = ["convert", "file.pth", "--output", "folder", "--recipe", "tresnet_m.miil_in1k"]
    assert cli.make_parser().parse_args(words).public_weight == "tresnet_m.miil_in1k"
    with pytest.raises(SystemExit, match="0"):
        cli.main(["convert", "--help"])
    assert "recipe" not in capsys.readouterr().out

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_tresnet.cli import main as cli
from timm_tresnet.cli.commands.list import describe_weights


def test_list_names_every_weight_with_its_size(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert cli.main(["list", "--json"]) == 0
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(timm.list_models(module="tresnet", include_tags=True))
    row = rows["tresnet_m.miil_in1k_448"]
    assert row["params_m"] == pytest.approx(31.4, abs=0.05)
    assert row["gmacs"] == pytest.approx(4 * rows["tresnet_m.miil_in1k"]["gmacs"], rel=0.01)
    assert row["input_size"] == [3, 448, 448]
    assert row["imagenet_top1"] == 81.71
    assert row["weights"] == "on the Hub: timm/tresnet_m.miil_in1k_448"
    assert rows["test_tresnet.r64_cifar10"]["weights"] == "in the package"
    assert rows["tresnet_s.untrained"]["weights"] == "none"


def test_list_says_which_weights_are_cached(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--timm--tresnet_m.miil_in1k" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, snapshot / "model.safetensors")
    refs = tmp_path / "models--timm--tresnet_m.miil_in1k" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    weights = {row["model"]: row["weights"] for row in describe_weights()}
    assert weights["tresnet_m.miil_in1k"] == "cached"
    assert weights["tresnet_l.miil_in1k"] == "on the Hub: timm/tresnet_l.miil_in1k"


def test_list_prints_a_table(capsys):
    assert cli.main(["list"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["model", "params", "(M)"]
    assert len(lines) == len(timm.list_models(module="tresnet", include_tags=True))


def test_list_names_the_file_that_missing_weights_are_made_from():
    weights = {row["model"]: row["weights"] for row in describe_weights()}
    assert weights["tresnet_l.asl_coco_448"] == "to convert from MS_COCO_TRresNet_L_448_86.6.pth"


def test_list_needs_neither_pytorch_nor_timm(run_python):
    code = (
        "import sys; from timm_tresnet.cli.main import main; main(['list']); print({'torch', 'timm'} & {*sys.modules})"
    )
    assert run_python("-c", code).stdout.endswith("\nset()\n")

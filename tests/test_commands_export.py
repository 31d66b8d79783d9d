import json
import shutil

import pytest
import timm
from exporting import ENGINES, each_format, exporters_warn, needs

from timm_tresnet import cli, export_model

pytestmark = exporters_warn


def test_export_command_says_what_it_wrote(tmp_path, capsys):
    output = tmp_path / "network.pt"
    assert cli.main(["export", "test_tresnet", "--format", "torchscript", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert f"{output}: test_tresnet.r64_cifar10, torchscript, float32" in printed
    assert "logits equal PyTorch's" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"network.pt", "network.pt.json"}


@each_format
def test_classify_runs_artifacts(format, artifact, capsys):
    assert cli.main(["classify", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert cli.main(["classify", "--json", "--engine", ENGINES[format], str(artifact(format))]) == 0
    for actual, wanted in zip(json.loads(capsys.readouterr().out), expected, strict=True):
        assert actual["image"] == wanted["image"]
        for entry, other in zip(actual["predictions"], wanted["predictions"], strict=True):
            assert entry["label"] == other["label"]
            assert entry["probability"] == pytest.approx(other["probability"], abs=1e-4)


@needs("onnx")
def test_export_command_quantises_and_counts_images_that_it_cannot_read(tmp_path, crops, capfd):
    arguments = ["export", "test_tresnet", "--format", "onnx", "--output", str(tmp_path / "network.onnx"), "--int8"]
    arguments += ["--batch", "4", "--size", "64", "64"]
    assert cli.main(arguments) == 2
    assert "go together" in capfd.readouterr().err
    assert cli.main([*arguments, "--calibration", str(crops)]) == 0
    assert "of 24 images held out; calibrated on 24" in capfd.readouterr().out
    (crops / "broken.jpg").touch()
    assert cli.main([*arguments, "--calibration", str(crops)]) == 1
    assert "skipped 1 images" in capfd.readouterr().err


def test_artifact_of_a_backbone_classifies_nothing(tmp_path, capsys):
    output = tmp_path / "backbone.pt"
    export_model(timm.create_model("test_tresnet", num_classes=0).eval(), output, "torchscript")
    assert cli.main(["classify", "--engine", "torch", str(output)]) == 2
    assert f"{output} is a backbone without classes" in capsys.readouterr().err


def test_artifacts_that_cannot_be_run_are_named(tmp_path, artifact, capsys):
    path = tmp_path / "network.pt2"
    for engine, message in [("torch", "No such file"), ("tensorrt", "one of torch, onnx, openvino")]:
        assert cli.main(["classify", "--engine", engine, str(path)]) == 2
        assert message in capsys.readouterr().err
    shutil.copy(artifact("torch-export").with_name("network.pt2.json"), tmp_path)
    assert cli.main(["classify", "--engine", "onnx", str(path)]) == 2
    assert "is for the engine torch, not for onnx" in capsys.readouterr().err
    assert cli.main(["classify", "--engine", "torch", str(path)]) == 2
    assert "no file" in capsys.readouterr().err


@pytest.mark.parametrize("batch", ["0", "many"])
def test_batch_must_be_dynamic_or_a_positive_number(batch, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", "test_tresnet", "--format", "onnx", "--output", "a.onnx", "--batch", batch])
    assert "--batch" in capsys.readouterr().err

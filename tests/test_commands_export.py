import argparse
import inspect
import io
import json
import os
import random
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from exporting import ENGINES, each_format, exporters_warn, most_formats, needs

from timm_tresnet import export_model
from timm_tresnet.cli import main as cli
from timm_tresnet.cli.commands import export

pytestmark = exporters_warn


def test_export_command_says_what_it_wrote(tmp_path, capsys):
    output = tmp_path / "network.pt"
    assert cli.main(["export", "test_tresnet", "--format", "torchscript", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert f"{output}: test_tresnet.r64_cifar10, torchscript, float32" in printed
    assert "logits equal PyTorch's" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"network.pt", "network.pt.json"}


@most_formats
def test_classify_runs_artifacts(format, artifact, capsys):
    assert cli.main(["classify", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert cli.main(["classify", "--json", "--trust", "--engine", ENGINES[format], str(artifact(format))]) == 0
    for actual, wanted in zip(json.loads(capsys.readouterr().out), expected, strict=True):
        assert actual["image"] == wanted["image"]
        for entry, other in zip(actual["predictions"], wanted["predictions"], strict=True):
            assert entry["label"] == other["label"]
            assert entry["probability"] == pytest.approx(other["probability"], abs=1e-4)


def test_the_floor_of_the_command_is_that_of_export_model():
    parser = argparse.ArgumentParser()
    export.add_options(parser)
    floor = inspect.signature(export_model).parameters["min_agreement"].default
    assert parser.get_default("min_agreement") == floor
    assert f"default: {floor}" in parser.format_help()


@needs("onnx")
def test_export_command_quantises_and_counts_images_that_it_cannot_read(tmp_path, crops, capfd):
    arguments = ["export", "test_tresnet", "--format", "onnx", "--output", str(tmp_path / "network.onnx"), "--int8"]
    arguments += ["--batch", "4", "--size", "64", "64", "--min-agreement", "0.8"]
    assert cli.main(arguments) == 2
    assert "go together" in capfd.readouterr().err
    assert cli.main([*arguments, "--calibration", str(crops)]) == 0
    half = len(list(crops.iterdir())) // 2
    assert f"of {half} images held out; calibrated on {half}" in capfd.readouterr().out
    (crops / "broken.jpg").touch()
    assert cli.main([*arguments, "--calibration", str(crops)]) == 1
    assert "skipped 1 images" in capfd.readouterr().err


def test_artifact_of_a_backbone_classifies_nothing(tmp_path, capsys):
    output = tmp_path / "backbone.pt"
    export_model(timm.create_model("test_tresnet", num_classes=0).eval(), output, "torchscript")
    assert cli.main(["classify", "--trust", "--engine", "torch", str(output)]) == 2
    assert f"{output} is a backbone without classes" in capsys.readouterr().err


def test_artifacts_that_cannot_be_run_are_named(tmp_path, artifact, capsys):
    path = tmp_path / "network.pt2"
    for engine, message in [("torch", "there is no "), ("tensorrt", "one of torch, onnx, openvino")]:
        assert cli.main(["classify", "--engine", engine, str(path)]) == 2
        assert message in capsys.readouterr().err
    shutil.copy(artifact("torch-export").with_name("network.pt2.json"), tmp_path)
    assert cli.main(["classify", "--engine", "onnx", str(path)]) == 2
    assert "needs the engine torch, got onnx" in capsys.readouterr().err
    assert cli.main(["classify", "--engine", "torch", str(path)]) == 2
    assert "no file" in capsys.readouterr().err


@pytest.mark.parametrize("batch", ["0", "many"])
def test_batch_must_be_dynamic_or_a_positive_number(batch, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", "test_tresnet", "--format", "onnx", "--output", "a.onnx", "--batch", batch])
    assert "--batch" in capsys.readouterr().err


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def put_trap_into_pt2(path, trap):
    """Have the archive say that its first weight is a pickle, and be one."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in files if name.endswith("weights_config.json"))
    config = json.loads(files[name])
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    files[name] = json.dumps(config).encode()
    buffer = io.BytesIO()
    torch.save(trap, buffer)
    files[f"{name.rpartition('/')[0]}/{first['path_name']}"] = buffer.getvalue()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_torchscript_that_makes_a_file(path, trap):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.path = str(trap.path)

        def forward(self, x):
            return torch.from_file(self.path, shared=True, size=10)[None].expand(x.shape[0], 10)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is about to go
        torch.jit.script(Network()).save(path)


@pytest.mark.parametrize(
    ("format", "put_trap"),
    [("torch-export", put_trap_into_pt2), ("torchscript", write_torchscript_that_makes_a_file)],
    ids=["pickle_in_pt2", "torchscript"],
)
def test_files_that_can_execute_code_are_refused_before_loading(format, put_trap, artifact, tmp_path, capfd):
    folder = shutil.copytree(artifact(format).parent, tmp_path / "folder")
    path, trap = folder / artifact(format).name, Trap(tmp_path / "trap")
    put_trap(path, trap)
    assert cli.main(["classify", "--engine", "torch", str(path)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{path} can execute code when it is loaded" in line
    assert "--trust" in line
    assert not trap.path.exists()
    cli.main(["classify", "--trust", "--engine", "torch", str(path)])  # which shows that the trap is one
    assert trap.path.exists()


def noise(content):
    return random.Random(0).randbytes(len(content))


DAMAGES = {
    "empty": lambda content: b"",
    "noise": noise,
    "text": lambda content: b"not a network",
    "cut": lambda content: content[: len(content) // 2],
    "without_its_end": lambda content: content[:-7],
    "zeros": lambda content: bytes(len(content)),
}


@each_format
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_artifact_is_refused_in_one_sentence(format, damage, artifact, tmp_path, capfd):
    folder = shutil.copytree(artifact(format).parent, tmp_path / "folder")
    path = folder / artifact(format).name
    path.write_bytes(damage(path.read_bytes()))
    assert cli.main(["classify", "--trust", "--engine", ENGINES[format], str(path)]) == 2
    output, error = capfd.readouterr()
    assert output == ""
    (line,) = error.splitlines()
    assert line.startswith(f"timm-tresnet: cannot load {path}: ")


@pytest.mark.parametrize(
    ("format", "kwargs"),
    [
        ("torchscript", {"num_classes": 4}),
        ("torchscript", {"num_classes": 0}),
        ("torchscript", {"in_chans": 1}),
        pytest.param("onnx", {"in_chans": 1}, marks=needs("onnx")),
        pytest.param("openvino", {"in_chans": 1}, marks=needs("openvino")),
    ],
)
def test_artifact_of_another_network_is_refused_in_one_sentence(format, kwargs, artifact, tmp_path, capfd):
    folder = shutil.copytree(artifact(format).parent, tmp_path / "folder")
    path = folder / artifact(format).name
    other = tmp_path / "other" / path.name
    export_model(timm.create_model("test_tresnet", layers=(1, 1, 1, 1), **kwargs).eval(), other, format)
    for file in other.parent.iterdir():
        if file.suffix != ".json":
            shutil.copy(file, folder)
    capfd.readouterr()
    assert cli.main(["classify", "--trust", "--engine", ENGINES[format], str(path)]) == 2
    output, error = capfd.readouterr()
    assert output == ""
    *names, line = error.splitlines()
    assert str(path) in line
    assert [name.partition(", ")[0] for name in names] in ([], ["timm-tresnet: class names: no names are known"])


def test_artifact_must_be_a_file_and_named_like_its_format(artifact, tmp_path, capfd):
    for name in ("network.pt", "network.pt2"):
        shutil.copy(artifact("torch-export").with_name("network.pt2.json"), tmp_path / f"{name}.json")
        os.mkfifo(tmp_path / name)
    for name, message in (("network.pt", "needs to end in .pt2"), ("network.pt2", "no file")):
        assert cli.main(["classify", "--trust", "--engine", "torch", str(tmp_path / name)]) == 2
        assert message in capfd.readouterr().err

import functools
import json
import math

import pytest
from damaging import MISSING, first_of_each_path
from exporting import exporters_warn

from timm_tresnet.cli import main as cli
from timm_tresnet.deployment.description import Description

pytestmark = exporters_warn


def test_description_says_how_to_feed_the_artifact(artifact):
    description = json.loads(artifact("torchscript").with_name("network.pt.json").read_text())
    assert description["model"] == "test_tresnet.r64_cifar10"
    assert description["input"]["name"] == "image"
    assert (description["input"]["size_multiple"], description["input"]["size_minimum"]) == (4, 20)
    assert description["class_names"][3] == "cat"
    assert description["preprocessing"] == {
        "input_size": [3, 64, 64],
        "interpolation": "bilinear",
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    assert description["multi_label"] is False
    assert "torch" in description["versions"]


@pytest.mark.parametrize("shape", [(None, 3, None, None), (2, 3, 32, 48), (None, 1, 64, 64), (8, 3, None, None)])
def test_description_is_read_as_it_was_written(shape):
    free = shape[2] is None
    description = Description(
        model="test_tresnet.r64_cifar10",
        format="onnx",
        precision="int8",
        shape=shape,
        size_limits=(4, 20) if free else (1, 1),
        num_classes=2,
        preprocessing={
            "input_size": [shape[1], shape[2] or 64, shape[3] or 64],
            "interpolation": "bilinear",
            "mean": [0.5] * shape[1],
            "std": [0.5] * shape[1],
            "crop_pct": 0.875,
            "crop_mode": "squash",
        },
        class_names=["cat", "dog"],
        multi_label=True,
        label_thresholds=[0.25, 0.5] if free else None,
    )
    written = description.to_json()
    assert ("size_multiple" in written["input"]) == free
    assert Description.from_json(json.loads(json.dumps(written))) == description


DAMAGES = [
    *((path, MISSING) for path in [
        "model", "format", "precision", "input", "output", "preprocessing", "class_names", "multi_label", "input.shape",
        "output.shape", "preprocessing.input_size", "preprocessing.mean", "preprocessing.std",
        "preprocessing.interpolation", "preprocessing.crop_pct", "preprocessing.crop_mode",
    ]),
    *((path, value) for path, values in {
        "model": [None, 3, "\x1b[2J"],
        "format": [None, 3, ["onnx"]],
        "precision": ["float16", None, 8],
        "input": [None, [], "image"],
        "input.shape": [
            None, "batch", [], ["batch", 3, "height"], ["batch", "channels", 64, 64], [0, 3, 64, 64], [1, 3, -1, 64],
            ["width", 3, 64, 64], [1.5, 3, 64, 64], [1, 3, 32, 32], [1, 4, 64, 64], [10**9, 3, 64, 64],
        ],
        "input.size_multiple": [0, "4", None],
        "input.size_minimum": [-1, "4", 10**9],
        "output": [None, [], 10],
        "output.shape": [None, [10], ["batch", "ten"], ["batch", -1], ["batch", 9], ["batch", 10**9], ["batch", 10.0]],
        "preprocessing": [None, [], "none"],
        "preprocessing.input_size": [None, 64, [3, 64], [3, 64, 10**9], [4, 64, 64], [3, "64", 64]],
        "preprocessing.mean": [None, 0, [0, 0], [math.nan] * 3, ["0"] * 3],
        "preprocessing.std": [None, [0, 0, 0], [math.inf] * 3, [1, 1]],
        "preprocessing.interpolation": ["cubist", None, 3],
        "preprocessing.crop_pct": [0, math.nan, "all", -1, 1e-9],
        "preprocessing.crop_mode": ["round", None],
        "class_names": [None, "cat", ["cat"], [None] * 10, ["\ud800"] * 10, {"0": "cat"}],
        "multi_label": [None, 1, "no"],
    }.items() for value in values),
]  # fmt: skip


@first_of_each_path(DAMAGES)
def test_damaged_description_is_refused_in_one_sentence(path, value, artifact, tmp_path, capfd):
    described = json.loads(artifact("torchscript").with_name("network.pt.json").read_text())
    *parents, name = path.split(".")
    table = functools.reduce(dict.__getitem__, parents, described)
    if value is MISSING:
        del table[name]
    else:
        table[name] = value
    (tmp_path / "network.pt").touch()
    beside = tmp_path / "network.pt.json"
    beside.write_text(json.dumps(described))
    assert cli.main(["classify", "--engine", "torch", str(tmp_path / "network.pt"), "--trust"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"timm-tresnet: cannot load {tmp_path / 'network.pt'}: {beside} needs ")
    assert parents or f"needs {name}" in line


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"not JSON", b"\xff\xfe", b"[" * 10**5])
def test_invalid_descriptions_are_refused_in_one_sentence(content, tmp_path, capfd):
    (tmp_path / "network.pt2").touch()
    (tmp_path / "network.pt2.json").write_bytes(content)
    assert cli.main(["classify", "--engine", "torch", str(tmp_path / "network.pt2"), "--trust"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "network.pt2.json" in line


def test_thresholds_are_one_for_each_class_or_left_out_as_by_older_versions(artifact):
    description = json.loads(artifact("torchscript").with_name("network.pt.json").read_text())
    del description["label_thresholds"]
    assert Description.from_json(description).label_thresholds is None
    with pytest.raises(ValueError, match="needs label_thresholds for 10 classes, got 2"):
        Description.from_json({**description, "label_thresholds": [0.5, 0.5]})
    with pytest.raises(ValueError, match="label_thresholds to be a list"):
        Description.from_json({**description, "label_thresholds": [2.0] * 10})


def test_identifiers_are_one_for_each_class_or_left_out_as_by_older_versions(artifact):
    description = json.loads(artifact("torchscript").with_name("network.pt.json").read_text())
    del description["class_identifiers"]
    assert Description.from_json(description).class_identifiers is None
    for identifiers in (["n1"], ["n1"] * 10):
        with pytest.raises(ValueError, match="needs 10 different class_identifiers, one for each class, got 1"):
            Description.from_json({**description, "class_identifiers": identifiers})
    with pytest.raises(ValueError, match="class_identifiers to be a list"):
        Description.from_json({**description, "class_identifiers": [None] * 10})

"""Rows of `acceptance.py`, with timm's scripts from a folder that TIMM_SCRIPTS names."""

import os
from importlib.util import find_spec

import acceptance
import pytest
import torch

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("TIMM_SCRIPTS"),
        reason="TIMM_SCRIPTS does not name a folder with timm's train.py, validate.py, ...",
    ),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork, which makes a row cheap"),
]
ROWS = {row.name: row for row in acceptance.ROWS}
PACKAGES = {  # that a script or a row needs and this package does not
    "benchmark_profile": ["fvcore"],
    "inference.py": ["pandas"],
    "onnx_export.py": ["onnx", "onnxscript", "onnxruntime"],
    "onnx_validate.py": ["onnx", "onnxscript", "onnxruntime"],
}


def mark_row(row):
    needed = PACKAGES.get(row.script, []) + PACKAGES.get(row.name, [])
    missing = [name for name in needed if not find_spec(name)]
    skip = pytest.mark.skipif(bool(missing), reason=f"{row.name} needs {', '.join(missing)}, which is not installed")
    return pytest.param(row, id=row.name, marks=skip)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    with acceptance.Sides(tmp_path_factory.mktemp("acceptance")) as sides:
        yield sides


@pytest.mark.parametrize("row", [mark_row(row) for row in acceptance.ROWS])
def test_row_does_what_timms_own_network_does(sides, row):
    results = sides.run(row)
    relation, difference = acceptance.compare(results)
    assert acceptance.meets(row, relation), (
        f"{difference}\nours: {results['ours'].error}\n{results['ours'].log[-3000:]}\n"
        f"built-in: {results['builtin'].error}\n{results['builtin'].log[-3000:]}"
    )


def test_each_side_runs_the_network_it_is_named_after(sides):
    results = sides.run(ROWS["base"])
    assert acceptance.PLUGIN_LINE in results["ours"].log
    assert acceptance.PLUGIN_LINE not in results["builtin"].log


@pytest.mark.parametrize("side", acceptance.SIDES)
def test_resumed_training_ends_with_the_weights_of_uninterrupted_training(sides, side):
    uninterrupted, resumed = (sides.run(ROWS[name])[side].values for name in ("epochs_in_order", "resume_in_order"))
    assert resumed.keys() == uninterrupted.keys()
    assert any(name.startswith("ema.") for name in resumed)
    for name, value in uninterrupted.items():
        assert torch.equal(torch.as_tensor(resumed[name]), torch.as_tensor(value)), name


@pytest.mark.parametrize("side", acceptance.SIDES)
def test_timm_does_not_resume_the_random_order_of_images(sides, side):
    uninterrupted, resumed = (sides.run(ROWS[name])[side].values for name in ("epochs", "resume"))
    assert not torch.equal(resumed["body.conv1.conv.weight"], uninterrupted["body.conv1.conv.weight"])


@pytest.mark.parametrize(
    "name",
    ["drop", "drop_path", "gp", "layer_decay", "clip_grad", "mixup_cutmix", "split_bn", "model_dtype", "kd_logit"],
)
def test_flag_changes_the_weights(sides, name):
    without, with_flag = (sides.run(ROWS[each])["ours"].values for each in ("base", name))
    weight = "body.layer1.0.conv1.conv.weight"
    assert not torch.equal(with_flag[weight], without[weight])

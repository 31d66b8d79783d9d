import json

import pytest
from exporting import exporters_warn

from timm_tresnet.deployment.description import Description

pytestmark = exporters_warn


def test_description_says_how_to_feed_the_artifact(artifact):
    description = json.loads(artifact("torch-export").with_name("network.pt2.json").read_text())
    assert description["model"] == "test_tresnet.r64_cifar10"
    assert description["input"]["name"] == "image"
    assert (description["input"]["size_multiple"], description["input"]["size_minimum"]) == (4, 36)
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
        preprocessing={"input_size": [3, 64, 64]},
        class_names=["cat", "dog"],
        multi_label=True,
    )
    written = description.to_json()
    assert ("size_multiple" in written["input"]) == free
    assert Description.from_json(json.loads(json.dumps(written))) == description

import copy
import importlib

import pytest
import timm
import torch
from exporting import ENGINES, SUFFIXES, each_int8_format, exporters_warn, needs
from reference import relative_error

from timm_tresnet import ExportedModel, export_model
from timm_tresnet.deployment.int8 import CalibrationImages
from timm_tresnet.utils.images import SAMPLES
from timm_tresnet.weights.preprocessing import resolve_preprocessing

pytestmark = exporters_warn


@each_int8_format
def test_int8_artifact_agrees_with_float32_and_keeps_gates_in_float(format, tmp_path, crops, embedded):
    (crops / "broken.jpg").write_bytes((SAMPLES / "cat.jpg").read_bytes()[:2000])
    path = tmp_path / f"network{SUFFIXES[format]}"
    description = export_model(embedded, path, format, calibration=crops, min_agreement=0.8)
    check = description["check"]
    # Of 32 crops, harder than photographs; benchmarks/int8_accuracy.py counts 10,000 of those: 98 % for both.
    assert 0.8 <= check["top1_agreement"] <= 1
    assert check["held_out_images"] + check["calibration_images"] == 64
    assert check["skipped_images"] == 1
    assert "body.layer1.0.se" in description["kept_in_float"]
    x = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(ExportedModel(path, ENGINES[format], trust=True)(x), embedded(x)) <= 0.3
    weights = path.with_suffix(".bin") if format == "openvino" else path
    parameters = sum(parameter.numel() for parameter in embedded.parameters())
    assert weights.stat().st_size < 1.5 * parameters
    if format == "onnx":  # else CPUs without VNNI overflow
        onnx = importlib.import_module("onnx")
        int8, to_array = onnx.TensorProto.INT8, onnx.numpy_helper.to_array
        kernels = [to_array(each) for each in onnx.load(path).graph.initializer if each.data_type == int8]
        largest = max(abs(kernel.astype(int)).max() for kernel in kernels)
        assert 60 <= largest <= 64


def widen_one_channel(model):
    """The same network, but for rounding: one channel of each block is 10,000 times larger, its weights smaller."""
    with torch.no_grad():
        for block in (block for layer in range(1, 5) for block in getattr(model.body, f"layer{layer}")):
            block.conv1.bn.weight[3] *= 1e4
            block.conv1.bn.bias[3] *= 1e4
            block.conv2.conv.weight[:, 3] *= 1e-4


@needs("onnx")
def test_int8_that_is_another_network_is_not_written(tmp_path, crops, embedded):
    model = copy.deepcopy(embedded)
    widen_one_channel(model)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(model(x), embedded(x)) <= 1e-4
    said = r"top-1 class as float32 on at least 90.0% of .*, got \d+\.\d% of 32;.* --min-agreement"
    with pytest.raises(RuntimeError, match=said):
        export_model(model, tmp_path / "network.onnx", "onnx", calibration=crops)
    assert [path.name for path in tmp_path.iterdir()] == ["crops"]


@pytest.mark.parametrize("in_chans", [1, 3])
def test_calibration_is_done_in_the_networks_channels(in_chans, crops):
    model = timm.create_model("test_tresnet", in_chans=in_chans)
    images = CalibrationImages(crops, resolve_preprocessing(model), None)
    assert {batch.shape for batch in images.calibration_batches()} == {(8, in_chans, 64, 64)}


@needs("onnx")
def test_agreement_is_a_share(tmp_path, embedded):
    with pytest.raises(ValueError, match="min_agreement from 0 to 1, got 90"):
        export_model(embedded, tmp_path / "network.onnx", "onnx", min_agreement=90)


@needs("onnx")
def test_folders_that_cannot_calibrate_are_named(tmp_path, embedded):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        with pytest.raises(ValueError, match=f"{folder} with [01] images, of which [01] are"):
            export_model(embedded, tmp_path / "network.onnx", "onnx", calibration=folder)
        (folder / name).write_bytes(b"not an image")
    with pytest.raises(ValueError, match="missing with 0 images"):
        export_model(embedded, tmp_path / "network.onnx", "onnx", calibration=tmp_path / "missing")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]

import copy

import pytest
import timm
import torch
from exporting import (
    ALTERATIONS,
    ENGINES,
    SUFFIXES,
    adapt_by_lora,
    drop_gates,
    each_format,
    exporters_warn,
    few_formats,
    hook_block,
    hook_blur,
    hook_convolution,
    hook_network,
    hook_norm_before,
    hook_unit,
    in_formats,
    make_altered,
    make_small,
    most_formats,
    needs,
    normalize_weights,
    normalize_weights_by_hooks,
    patch_convolution,
    patch_unit,
    prune_weights,
    use_group_norm,
    use_own_head,
    use_subclass,
)
from reference import relative_error

from timm_tresnet import ExportedModel, export_model, optimize_for_inference
from timm_tresnet.weights.labels import is_multi_label

pytestmark = exporters_warn


@each_format
def test_artifact_computes_the_network_for_any_batch_and_size(format, embedded, artifact):
    path = artifact(format)
    exported = ExportedModel(path, ENGINES[format], trust=True)
    assert exported.description["check"]["max_relative_error"] <= 1e-4
    for shape in [(1, 3, 64, 64), (3, 3, 68, 100), (2, 3, 36, 128)]:
        x = torch.rand(shape)
        with torch.no_grad():
            assert relative_error(exported(x), embedded(x)) <= 1e-4
    names = {path.name, f"{path.name}.json"} | ({"network.bin"} if format == "openvino" else set())
    assert {file.name for file in path.parent.iterdir()} == names


@few_formats
def test_fixed_batch_and_size_are_in_the_description_and_short_batches_are_padded(format, tmp_path, embedded):
    path = tmp_path / f"network{SUFFIXES[format]}"
    description = export_model(embedded, path, format, batch_size=2, image_size=(32, 48))
    assert description["input"] == {"name": "image", "shape": [2, 3, 32, 48], "dtype": "float32"}
    assert description["preprocessing"]["input_size"] == (3, 32, 48)
    x = torch.rand(5, 3, 32, 48)
    with torch.no_grad():
        assert relative_error(ExportedModel(path, ENGINES[format], trust=True)(x), embedded(x)) <= 1e-4


@few_formats
def test_network_without_space_to_depth_exports(format, tmp_path):
    path = tmp_path / f"network{SUFFIXES[format]}"
    description = export_model(make_small(stem="conv7x7", in_chans=1), path, format)
    assert description["input"]["shape"] == ["batch", 1, "height", "width"]


def test_networks_without_batch_norm_are_exported_and_optimized_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, **kwargs: network)
    model = timm.create_model("test_tresnet", norm_layer="groupnorm1").eval()
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(optimize_for_inference(model)(x), model(x).detach(), rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())
    path = tmp_path / "network.pt"
    export_model(model, path, "torchscript")
    torch.testing.assert_close(ExportedModel(path, "torch", trust=True)(x), model(x).detach(), rtol=1e-4, atol=1e-5)


@most_formats
def test_networks_with_ml_decoder_are_exported_with_constant_queries(format, tmp_path):
    model = make_small("test_tresnet", head="ml_decoder", num_groups=3, decoder_embedding=16)
    path = tmp_path / f"network{SUFFIXES[format]}"
    export_model(model, path, format)
    exported = ExportedModel(path, ENGINES[format], trust=True)
    for shape in [(1, 3, 64, 64), (3, 3, 36, 100)]:
        x = torch.rand(shape)
        with torch.no_grad():
            assert relative_error(exported(x), model(x)) <= 1e-4


def test_artifact_of_a_multi_label_network_says_so(tmp_path):
    model = timm.create_model("test_tresnet", pretrained_cfg_overlay={"notes": ("multi-label",)}).eval()
    output = tmp_path / "network.pt"
    assert export_model(model, output, "torchscript")["multi_label"]
    assert is_multi_label(ExportedModel(output, "torch", trust=True).pretrained_cfg)


def test_wrong_artifact_is_not_written(tmp_path, embedded, monkeypatch):
    (tmp_path / "network.pt").write_text("the one before")
    monkeypatch.setattr("timm_tresnet.deployment.artifact.TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="nothing was written"):
        export_model(embedded, tmp_path / "network.pt", "torchscript")
    assert (tmp_path / "network.pt").read_text() == "the one before"
    assert len(list(tmp_path.iterdir())) == 1


@in_formats("openvino", "torchscript")
def test_files_of_an_earlier_export_stay_until_the_new_ones_are_checked(format, tmp_path, embedded, monkeypatch):
    path = tmp_path / f"network{SUFFIXES[format]}"
    files = [path, path.with_suffix(".bin"), tmp_path / f"{path.name}.json"]
    for file in files:
        file.write_text("the one before")
    with monkeypatch.context() as patch:
        patch.setattr("timm_tresnet.deployment.artifact.TOLERANCE", -1.0)
        with pytest.raises(RuntimeError, match="nothing was written"):
            export_model(embedded, path, format)
    assert {file: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(files, "the one before")
    export_model(embedded, path, format)
    replaced = {file for file in tmp_path.iterdir() if file.read_bytes() != b"the one before"}
    assert replaced == set(files if format == "openvino" else files[::2])


@pytest.mark.parametrize(
    ("format", "suffix", "kwargs", "message"),
    [
        ("tensorrt", ".onnx", {}, "format to be one of"),
        ("onnx", ".pt", {}, r"ends in \.onnx"),
        ("torchscript", ".pt", {"calibration": "."}, "needs the format onnx or openvino for int8, got torchscript"),
        ("torch-export", ".pt2", {"image_size": (62, 64)}, "multiples of 4"),
        ("torch-export", ".pt2", {"image_size": (64, 12)}, "at least"),
    ],
)
def test_mistakes_in_arguments_are_named(format, suffix, kwargs, message, tmp_path, embedded):
    with pytest.raises(ValueError, match=message):
        export_model(embedded, tmp_path / f"network{suffix}", format, **kwargs)
    assert not list(tmp_path.iterdir())


def test_images_too_small_for_any_size_are_exported_with_theirs(tmp_path, embedded):
    network = copy.deepcopy(embedded)
    network.pretrained_cfg = {**embedded.pretrained_cfg, "input_size": (3, 32, 32)}
    artifact = tmp_path / "network.pt2"
    with pytest.raises(ValueError, match=r"at least 36, .* images are 32x32; fix the size with image_size=\(32, 32\)"):
        export_model(network, artifact, "torch-export")
    assert not list(tmp_path.iterdir())
    assert export_model(network, artifact, "torch-export", image_size=(32, 32))["input"]["shape"][2:] == [32, 32]


FEW = (hook_unit, patch_unit, prune_weights)  # of each kind that a trace can miss


def check_altered(alter, format, path):
    _, model = make_altered(alter)
    export_model(model, path, format)
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        assert relative_error(ExportedModel(path, ENGINES[format], trust=True)(x), model(x)) <= 1e-4


@pytest.mark.parametrize(
    "alter",
    [
        pytest.param(alter, marks=[] if alter in FEW else pytest.mark.thorough)
        for alter in ALTERATIONS
        if alter is not patch_convolution
    ],
)
def test_artifact_computes_the_altered_network(alter, tmp_path):
    check_altered(alter, "torchscript", tmp_path / "network.pt")


@pytest.mark.parametrize(
    ("alterations", "format"),  # several at a time: what all these formats come from, torch.export, takes long
    [
        pytest.param(alterations, format, marks=[needs(format), *([pytest.mark.thorough] if index else [])])
        for index, (alterations, format) in enumerate(
            [
                ((hook_unit, hook_norm_before, patch_convolution, prune_weights, use_group_norm), "onnx"),
                ((hook_unit, hook_convolution, hook_norm_before, hook_block, hook_blur, hook_network), "openvino"),
                ((use_subclass, drop_gates, normalize_weights), "torch-export"),
                ((patch_unit, normalize_weights_by_hooks, use_own_head), "onnx"),
                ((adapt_by_lora,), "onnx"),
            ]
        )
    ],
    ids=["several", "hooks", "modules", "patches", "lora"],
)
def test_artifact_of_another_format_computes_the_altered_network(alterations, format, tmp_path):
    def alter(model):
        for each in alterations:
            model = each(model) or model
        return model

    check_altered(alter, format, tmp_path / f"network{SUFFIXES[format]}")


def test_code_that_a_format_cannot_hold_is_named(tmp_path):
    _, model = make_altered(patch_convolution)  # its patch runs the original's convolution, not the copy's
    with pytest.raises(RuntimeError, match=r"as torchscript: .*body.layer1.0.conv2.conv \(hooks or patched methods\)"):
        export_model(model, tmp_path / "network.pt", "torchscript")
    assert not list(tmp_path.iterdir())


def test_artifact_that_differs_from_the_given_network_is_refused_with_the_number(tmp_path):
    model = make_small("test_tresnet")
    calls = []

    def change_with_every_call(module, args, output):
        calls.append(0)
        return output + len(calls)

    model.body.layer2.register_forward_hook(change_with_every_call)
    with pytest.raises(RuntimeError, match=r"by \d.\de.\d+ \(relative L2\).*body.layer2 \(hooks"):
        export_model(model, tmp_path / "network.pt", "torchscript")
    assert not list(tmp_path.iterdir())


def replace_fc(model):
    model.head.fc = torch.nn.Linear(model.num_features, 7)


def replace_head(model):
    model.head = torch.nn.Flatten(2)


@pytest.mark.parametrize(
    ("replace", "got"), [(replace_fc, "got 7 logits"), (replace_head, r"output of shape \(3, 512, 4\)")]
)
def test_classifier_replaced_by_hand_names_reset_classifier(replace, got, tmp_path):
    model = make_small("test_tresnet")
    replace(model)
    model.eval()
    with pytest.raises(ValueError, match=rf"needs 10 logits an image.*{got}.*model.reset_classifier\(num_classes\)"):
        export_model(model, tmp_path / "network.pt", "torchscript", image_size=(64, 64))


@in_formats("torchscript", "torch-export", thorough=["torch-export"])
def test_the_first_two_arguments_may_be_swapped_and_files_that_run_code_need_trust(format, artifact):
    path = artifact(format)
    with pytest.raises(ValueError, match="trust=True"):
        ExportedModel(path, "torch")
    with pytest.warns(DeprecationWarning, match=r"is now ExportedModel\(FILE, 'torch'\)"):
        swapped = ExportedModel("torch", path, trust=True)
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(swapped(x), ExportedModel(path, "torch", trust=True)(x))


def test_networks_in_wrappers_are_named(tmp_path):
    wrapped = torch.optim.swa_utils.AveragedModel(make_small()).eval()
    with pytest.raises(ValueError, match=r"AveragedModel; .*\(model.module\)"):
        export_model(wrapped, tmp_path / "network.pt", "torchscript")


def test_networks_that_cannot_be_exported_are_named(tmp_path):
    with pytest.raises(ValueError, match="eval mode"):
        export_model(make_small().train(), tmp_path / "network.pt2", "torch-export")
    with pytest.raises(ValueError, match="float32"):
        export_model(make_small().half(), tmp_path / "network.pt2", "torch-export")

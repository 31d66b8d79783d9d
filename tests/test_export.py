import copy
import functools
import importlib.util
import io
import json
import pickle
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from test_tresnet import randomise, relative_error
from timm.utils import reparameterize_model

import timm_tresnet
from timm_tresnet import ExportedModel, cli, export, export_model, fold_batch_norms, optimize_for_inference
from timm_tresnet.export import FORMATS
from timm_tresnet.images import SAMPLES
from timm_tresnet.labels import is_multi_label
from timm_tresnet.layers import ConvNormAct

SMALL = {"layers": (1, 1, 1, 1), "num_classes": 10}
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2", "torchscript": ".pt"}
ENGINES = {"onnx": "onnx", "openvino": "openvino", "torch-export": "torch", "torchscript": "torch"}
PACKAGES = {"onnx": ["onnx", "onnxscript", "onnxruntime"], "openvino": ["onnx", "onnxscript", "openvino"]}


def needs(format, int8=False):
    packages = [*PACKAGES.get(format, []), *(["nncf"] if int8 and format == "openvino" else [])]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"exporting to {format} needs {', '.join(missing)}")


each_format = pytest.mark.parametrize("format", [pytest.param(format, marks=needs(format)) for format in FORMATS])
each_int8_format = pytest.mark.parametrize(
    "format", [pytest.param(format, marks=needs(format, int8=True)) for format in ("onnx", "openvino")]
)
# The exporters of PyTorch and ONNX and NNCF warn about themselves and each other; ours are errors all the same.
pytestmark = [
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
]


@pytest.fixture(scope="module")
def embedded():
    return timm.create_model("test_tresnet", pretrained=True).eval()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, embedded):
    """A function that gives the embedded network in a format, exported once."""

    @functools.cache
    def export_once(format):
        path = tmp_path_factory.mktemp(format) / f"network{SUFFIXES[format]}"
        export_model(embedded, path, format)
        return path

    return export_once


@pytest.fixture
def crops(tmp_path):
    """Crops of the package's photographs, the size of its network's images."""
    folder = tmp_path / "crops"
    folder.mkdir()
    for path in SAMPLES.glob("*.jpg"):
        with Image.open(path) as image:
            for index in range(16):
                left, top = (int(torch.randint(0, side - 64, ())) for side in image.size)
                image.crop((left, top, left + 64, top + 64)).save(folder / f"{path.stem}{index}.png")
    return folder


def make_small(variant="tresnet_m", **kwargs):
    return randomise(timm.create_model(variant, **SMALL, **kwargs)).eval()


# ---- folding


@pytest.mark.parametrize("variant", ["tresnet_m", "tresnet_v2_l", "test_tresnet"])
@pytest.mark.parametrize("kwargs", [{}, {"act_layer": "relu", "aa_layer": False, "stem": "conv7x7"}], ids=str)
def test_folded_network_has_the_same_logits_and_no_batch_norm(variant, kwargs):
    model = make_small(variant, **kwargs)
    state_dict = copy.deepcopy(model.state_dict())
    folded = fold_batch_norms(model)
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        assert relative_error(folded(x), model(x)) <= 1e-5
    assert not any("bn" in name for name in folded.state_dict())
    torch.testing.assert_close(model.state_dict(), state_dict, rtol=0, atol=0)


def test_whole_tresnet_m_folds_within_the_tolerance():
    model = randomise(timm.create_model("tresnet_m")).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(fold_batch_norms(model)(x), model(x)) <= 1e-4


def test_timm_folds_in_training_mode_and_eval_makes_it_run():
    model = make_small()
    folded = reparameterize_model(copy.deepcopy(model).train())  # as validate.py does
    x = torch.rand(2, 3, 64, 64)
    with pytest.raises(ValueError, match=r"call eval\(\)"):
        folded(x)
    with torch.no_grad():
        assert relative_error(folded.eval()(x), model(x)) <= 1e-5


def test_folding_refuses_training_mode_and_norms_that_it_does_not_know():
    with pytest.raises(ValueError, match="eval mode"):
        fold_batch_norms(make_small().train())
    half = make_small()
    half.body.layer2[0].conv1.bn = torch.nn.GroupNorm(8, 128).eval()
    with pytest.raises(ValueError, match="GroupNorm"):
        fold_batch_norms(half)
    assert isinstance(half.body.conv1, ConvNormAct)


def test_folding_a_folded_network_changes_nothing():
    once = fold_batch_norms(make_small())
    torch.testing.assert_close(fold_batch_norms(once).state_dict(), once.state_dict(), rtol=0, atol=0)


def test_folded_network_can_be_pickled_copied_scripted_traced_and_moved():
    folded = fold_batch_norms(make_small())
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = folded(x)
        for copied in (pickle.loads(pickle.dumps(folded)), copy.deepcopy(folded)):
            torch.testing.assert_close(copied(x), expected)
        with warnings.catch_warnings():  # PyTorch announces the end of TorchScript
            warnings.filterwarnings("ignore", message="`torch.jit.* is deprecated")
            torch.testing.assert_close(torch.jit.script(folded)(x), expected)
            torch.testing.assert_close(torch.jit.trace(folded, x)(x), expected)
        torch.testing.assert_close(torch.fx.symbolic_trace(folded.body.layer1)(torch.rand(1, 64, 8, 8)).shape[1], 64)
        assert relative_error(folded.double()(x.double()).float(), expected) <= 1e-5
        assert folded.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        assert folded.to("meta")(x.bfloat16().to("meta")).shape == (2, 10)


def test_state_dict_of_a_folded_network_loads_into_another():
    folded, other = fold_batch_norms(make_small()), fold_batch_norms(make_small())
    buffer = io.BytesIO()
    torch.save(folded.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(other(x), folded(x))
    assert "FoldedConvNormAct(\n" in repr(folded)


@pytest.mark.parametrize("dynamic", [False, True])
def test_optimized_network_computes_the_same(dynamic, monkeypatch):
    model = make_small()
    compiler = torch.compile

    def compile_without_code(network, fullgraph, dynamic, mode):
        assert mode is None  # on the CPU
        return compiler(network, fullgraph=fullgraph, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_without_code)
    optimized = optimize_for_inference(model, dynamic=dynamic)
    for shape in [(2, 3, 64, 64), (3, 3, 64, 96)]:
        x = torch.rand(shape)
        y = optimized(x)
        assert not y.requires_grad
        assert relative_error(y, model(x).detach()) <= 1e-5


def test_networks_without_batch_norm_are_exported_and_optimized_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, **kwargs: network)
    model = timm.create_model("test_tresnet", norm_layer="groupnorm1").eval()
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(optimize_for_inference(model)(x), model(x).detach(), rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())
    path = tmp_path / "network.pt"
    export_model(model, path, "torchscript")
    torch.testing.assert_close(ExportedModel("torch", path)(x), model(x).detach(), rtol=1e-4, atol=1e-5)


# ---- artifacts


@each_format
@pytest.mark.parametrize("variant", ["test_tresnet", "tresnet_m"])
def test_artifact_computes_the_network_for_any_batch_and_size(variant, format, tmp_path, embedded, artifact):
    if variant == "test_tresnet":
        model, path = embedded, artifact(format)
    else:
        model, path = make_small(variant), tmp_path / f"network{SUFFIXES[format]}"
        export_model(model, path, format)
    exported = ExportedModel(ENGINES[format], path)
    assert exported.description["check"]["max_relative_error"] <= 1e-4
    for shape in [(1, 3, 64, 64), (3, 3, 68, 100), (2, 3, 36, 128)]:
        x = torch.rand(shape)
        with torch.no_grad():
            assert relative_error(exported(x), model(x)) <= 1e-4
    names = {path.name, f"{path.name}.json"} | ({"network.bin"} if format == "openvino" else set())
    assert {file.name for file in path.parent.iterdir()} == names


@each_format
def test_fixed_batch_and_size_are_in_the_description_and_short_batches_are_padded(format, tmp_path, embedded):
    path = tmp_path / f"network{SUFFIXES[format]}"
    description = export_model(embedded, path, format, batch_size=2, image_size=(32, 48))
    assert description["input"] == {"name": "image", "shape": [2, 3, 32, 48], "dtype": "float32"}
    assert description["preprocessing"]["input_size"] == (3, 32, 48)
    x = torch.rand(5, 3, 32, 48)
    with torch.no_grad():
        assert relative_error(ExportedModel(ENGINES[format], path)(x), embedded(x)) <= 1e-4


@each_format
def test_network_without_space_to_depth_exports(format, tmp_path):
    path = tmp_path / f"network{SUFFIXES[format]}"
    description = export_model(make_small(stem="conv7x7", in_chans=1), path, format)
    assert description["input"]["shape"] == ["batch", 1, "height", "width"]


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


def test_artifact_of_a_multi_label_network_says_so(tmp_path):
    model = timm.create_model("test_tresnet", pretrained_cfg_overlay={"notes": ("multi-label",)}).eval()
    output = tmp_path / "network.pt"
    assert export_model(model, output, "torchscript")["multi_label"]
    assert is_multi_label(ExportedModel("torch", output).pretrained_cfg)


def test_artifact_of_a_backbone_classifies_nothing(tmp_path, capsys):
    output = tmp_path / "backbone.pt"
    export_model(timm.create_model("test_tresnet", num_classes=0).eval(), output, "torchscript")
    assert cli.main(["classify", "--engine", "torch", str(output)]) == 2
    assert f"{output} is a backbone without classes" in capsys.readouterr().err


@needs("onnx")
def test_onnx_file_has_standard_operators_and_no_path_of_this_machine(artifact):
    import onnx

    path = artifact("onnx")
    network = onnx.load(path, load_external_data=False)
    assert [(opset.domain, opset.version) for opset in network.opset_import] == [("", export.OPSET)]
    assert {node.op_type for node in network.graph.node} <= {
        "Add", "AveragePool", "Concat", "Conv", "Div", "Gemm", "LeakyRelu", "Mul", "Pad", "ReduceMean", "Relu",
        "Reshape", "Shape", "Sigmoid", "Squeeze", "Transpose",
    }  # fmt: skip
    constants = {tensor.name for tensor in network.graph.initializer}
    for node in network.graph.node:  # what TensorRT's parser asks of these
        axes = {"ReduceMean": node.input[1:2], "Squeeze": node.input[1:2], "Pad": node.input[3:4]}
        assert {name for name in axes.get(node.op_type, ()) if name} <= constants
    assert str(Path(timm_tresnet.__file__).parent).encode() not in path.read_bytes()


ALONE = {
    "onnx": "import onnxruntime; run = onnxruntime.InferenceSession(path).run; y = run(None, {'image': x})[0]",
    "openvino": "import openvino; y = openvino.Core().compile_model(path, 'CPU')(x)[0]",
}


@pytest.mark.parametrize("format", [pytest.param(format, marks=needs(format)) for format in ALONE])
def test_artifact_runs_where_neither_torch_nor_timm_is_imported(format, tmp_path, embedded, artifact, run_python):
    import numpy

    path = artifact(format)
    x = torch.rand(2, 3, 64, 64)
    numpy.save(tmp_path / "x.npy", x.numpy())
    run_python(
        "-c",
        f"import sys, numpy\npath = {str(path)!r}\nx = numpy.load('x.npy')\n{ALONE[format]}\nnumpy.save('y.npy', y)\n"
        "assert not {'torch', 'timm', 'timm_tresnet'} & set(sys.modules), sorted(sys.modules)",
    )
    with torch.no_grad():
        assert relative_error(torch.from_numpy(numpy.load(tmp_path / "y.npy")), embedded(x)) <= 1e-2


def test_wrong_artifact_is_not_written(tmp_path, embedded, monkeypatch):
    (tmp_path / "network.pt2").write_text("the one before")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="nothing was written"):
        export_model(embedded, tmp_path / "network.pt2", "torch-export")
    assert (tmp_path / "network.pt2").read_text() == "the one before"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("format", "suffix", "kwargs", "message"),
    [
        ("tensorrt", ".onnx", {}, "format to be one of"),
        ("onnx", ".pt", {}, r"ends in \.onnx"),
        ("torchscript", ".pt", {"calibration": "."}, "int8 for onnx and openvino"),
        ("torch-export", ".pt2", {"image_size": (62, 64)}, "multiples of 4"),
        ("torch-export", ".pt2", {"image_size": (64, 12)}, "at least"),
    ],
)
def test_mistakes_in_arguments_are_named(format, suffix, kwargs, message, tmp_path, embedded):
    with pytest.raises(ValueError, match=message):
        export_model(embedded, tmp_path / f"network{suffix}", format, **kwargs)
    assert not list(tmp_path.iterdir())


def test_networks_that_cannot_be_exported_are_named(tmp_path):
    with pytest.raises(ValueError, match="eval mode"):
        export_model(make_small().train(), tmp_path / "network.pt2", "torch-export")
    with pytest.raises(ValueError, match="float32"):
        export_model(make_small().half(), tmp_path / "network.pt2", "torch-export")


@pytest.mark.parametrize(("format", "extra"), [("onnx", "export"), ("openvino", "openvino")])
def test_missing_packages_are_named_with_their_extra(format, extra, tmp_path, embedded, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    output = tmp_path / f"network{SUFFIXES[format]}"
    assert cli.main(["export", "test_tresnet", "--format", format, "--output", str(output)]) == 2
    assert (
        f"needs onnxscript, which is not installed; run pip install 'timm-tresnet[{extra}]'" in capsys.readouterr().err
    )


def test_broken_package_is_named_with_what_it_says(tmp_path, embedded, monkeypatch, capsys):
    (tmp_path / "packages" / "onnx").mkdir(parents=True)
    (tmp_path / "packages" / "onnx" / "__init__.py").write_text("raise OSError('libprotobuf.so.32 is missing')\n")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "onnx", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    output = tmp_path / "network.onnx"
    assert cli.main(["export", "test_tresnet", "--format", "onnx", "--output", str(output)]) == 2
    assert "onnx, which is installed but cannot be imported (OSError: libprotobuf.so.32 is" in capsys.readouterr().err
    assert not output.exists()


# ---- int8


@each_int8_format
def test_int8_artifact_agrees_with_float32_and_keeps_gates_in_float(format, tmp_path, crops, embedded):
    (crops / "broken.jpg").write_bytes((SAMPLES / "cat.jpg").read_bytes()[:2000])
    path = tmp_path / f"network{SUFFIXES[format]}"
    description = export_model(embedded, path, format, calibration=crops)
    check = description["check"]
    # Of 23 crops, harder than photographs; benchmarks/int8_accuracy.py counts 10,000 of those: 98 % for both.
    assert check["top1_agreement"] >= 0.8
    assert check["held_out_images"] + check["calibration_images"] == 48
    assert check["skipped_images"] == 1
    assert "body.layer1.0.se" in description["kept_in_float"]
    x = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(ExportedModel(ENGINES[format], path)(x), embedded(x)) <= 0.3
    weights = path.with_suffix(".bin") if format == "openvino" else path
    parameters = sum(parameter.numel() for parameter in embedded.parameters())
    assert weights.stat().st_size < 1.5 * parameters
    if format == "onnx":  # else CPUs without VNNI overflow
        onnx = importlib.import_module("onnx")
        int8, to_array = onnx.TensorProto.INT8, onnx.numpy_helper.to_array
        kernels = [to_array(each) for each in onnx.load(path).graph.initializer if each.data_type == int8]
        largest = max(abs(kernel.astype(int)).max() for kernel in kernels)
        assert 60 <= largest <= 64


@needs("onnx")
def test_folders_that_cannot_calibrate_are_named(tmp_path, embedded):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        with pytest.raises(ValueError, match=f"{folder} has [01], and [01] of those"):
            export_model(embedded, tmp_path / "network.onnx", "onnx", calibration=folder)
        (folder / name).write_bytes(b"not an image")
    with pytest.raises(ValueError, match="missing has 0"):
        export_model(embedded, tmp_path / "network.onnx", "onnx", calibration=tmp_path / "missing")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


# ---- the command


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

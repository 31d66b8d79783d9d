import importlib.util
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from exporting import SUFFIXES, exporters_warn, needs
from reference import relative_error

import timm_tresnet
from timm_tresnet.cli import main as cli
from timm_tresnet.deployment import engines
from timm_tresnet.deployment.engines import OPSET

pytestmark = exporters_warn


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_torchscript_on_a_full_disk_is_an_error_of_the_disk():
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PyTorch announces its end
        program = torch.jit.script(torch.nn.ReLU())
        with pytest.raises(OSError, match="No space left"):  # PyTorch's own writer ends the process
            engines._save(torch.jit.save, program, Path("/dev/full"))


@needs("onnx")
def test_onnx_file_has_standard_operators_and_no_path_of_this_machine(artifact):
    import onnx

    path = artifact("onnx")
    network = onnx.load(path, load_external_data=False)
    assert [(opset.domain, opset.version) for opset in network.opset_import] == [("", OPSET)]
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
    # Without the hint OpenVINO computes in bfloat16 where the CPU is faster at that, as docs/inference.md says.
    "openvino": "import openvino; y = openvino.Core().compile_model(path, 'CPU', "
    "{'INFERENCE_PRECISION_HINT': 'f32'})(x)[0]",
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
        assert relative_error(torch.from_numpy(numpy.load(tmp_path / "y.npy")), embedded(x)) <= 1e-4


@pytest.mark.parametrize(("format", "extra"), [("onnx", "export"), ("openvino", "openvino")])
def test_missing_packages_are_named_with_their_extra(format, extra, tmp_path, embedded, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    output = tmp_path / f"network{SUFFIXES[format]}"
    assert cli.main(["export", "test_tresnet", "--format", format, "--output", str(output)]) == 2
    assert (
        f"needs onnxscript, which is not installed; in the clone of timm-tresnet, run pip install '.[{extra}]'"
        in capsys.readouterr().err
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


INSIDE = ("weights.bin", "sub/weights.bin")
OUTSIDE = (
    "../weights.bin",
    "sub/../../weights.bin",
    "{folder}/weights.bin",
    "link.bin",
    "linked/weights.bin",
    "/etc/passwd",
)


@needs("onnx")
@pytest.mark.parametrize("engine", ["onnx", pytest.param("openvino", marks=needs("openvino"))])
@pytest.mark.parametrize("location", [*INSIDE, *OUTSIDE])
def test_data_of_an_onnx_file_stay_inside_its_folder(location, engine, artifact, tmp_path, capfd):
    import onnx

    folder = shutil.copytree(artifact("onnx").parent, tmp_path / "folder")
    (folder / "sub").mkdir()
    (folder / "link.bin").symlink_to("../weights.bin")
    (folder / "linked").symlink_to("..")
    path = folder / "network.onnx"
    network = onnx.load(path)
    tensor = max(network.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    for place in (tmp_path, folder, folder / "sub"):
        (place / "weights.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location.format(folder=tmp_path))
    path.write_bytes(network.SerializeToString())
    status = cli.main(["classify", "--engine", engine, str(path)])
    output, error = capfd.readouterr()
    if location in INSIDE:
        assert (status, error) == (0, "")
    else:
        assert (status, output) == (2, "")
        (line,) = error.splitlines()
        assert line.startswith(f"timm-tresnet: cannot load {path}: ")

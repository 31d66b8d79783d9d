"""Tables of formats and engines: how to write an artifact, how to run it, and the packages that this needs."""

import importlib.util
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_tresnet.deployment.description import AXES, Description
from timm_tresnet.deployment.int8 import quantise_onnx, quantise_openvino
from timm_tresnet.utils.extras import how_to_install

OPSET = 18  # the exporter's native one; it converts to all others
Run = Callable[[Tensor], Tensor]  # images to logits
_ONNX = ("onnx", "onnxscript")


@dataclass(frozen=True)
class Engine:
    """An engine that runs artifacts.

    Args:
        packages: packages that it needs.
        extra: the extra in pyproject.toml with these packages.
        runs_code: how loading a file can execute code; "" if it cannot.
    """

    packages: tuple[str, ...] = ()
    extra: str = ""
    runs_code: str = ""


@dataclass(frozen=True)
class Format:
    """A format of artifacts.

    Args:
        suffix: suffix of the file.
        write: writes a folded network for the described images.
        load: function that loads the artifact, by engine; the first engine is the default.
        packages: packages for writing, in addition to the default engine's.
        quantise: quantises a written artifact to int8, see `quantise_onnx`; None if int8 is not supported.
        packages_int8: packages for int8, in addition to these.
        size_minimum: least dynamic side, in pixels, if larger than the network's own minimum.
    """

    suffix: str
    write: Callable[[nn.Module, Path, Description], None]
    load: Mapping[str, Callable[[Path], Run]]
    packages: tuple[str, ...] = ()
    quantise: Callable[[Path, Iterator[Any]], list[str]] | None = None
    packages_int8: tuple[str, ...] = ()
    size_minimum: int = 0

    @property
    def engine(self) -> str:
        """The default engine, the first in `load`."""
        return next(iter(self.load))


def require(purpose: str, extra: str, packages: Sequence[str]) -> None:
    """Import packages; if one is missing or broken, raise an ImportError that names it and says what to do."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{purpose} needs {', '.join(missing)}, which is not installed; {how_to_install(extra)}"
        )
    for package in packages:
        try:
            importlib.import_module(package)
        except Exception as error:  # a foreign package can fail in any way
            raise ImportError(
                f"{purpose} needs {package}, which is installed but cannot be imported "
                f"({type(error).__name__}: {error}); try pip install --force-reinstall {package}"
            ) from error


def _make_example(description: Description) -> tuple[Tensor, dict[int, Any]]:
    """Make images to trace a network with; return them and their dynamic axes for torch.export."""
    shape, (multiple, minimum) = description.shape, description.size_limits
    # Not 1: the exporter treats a dimension of 1 as constant.
    example = torch.rand([side or default for side, default in zip(shape, (2, shape[1] or 3, 64, 96), strict=True)])
    dims: dict[int, Any] = {0: torch.export.Dim("batch")}
    for axis, name in ((2, "rows"), (3, "columns")):
        dims[axis] = multiple * torch.export.Dim(name, min=minimum // multiple)
    return example, {axis: dim for axis, dim in dims.items() if not shape[axis]}


def _bind(model: nn.Module, dims: dict[int, Any]) -> tuple[Any, ...]:
    """Arrange dynamic axes by the arguments of a network's forward, which is *args in peft's models."""
    parameters = inspect.signature(model.forward).parameters.values()
    takes_any = next(iter(parameters)).kind is inspect.Parameter.VAR_POSITIONAL
    return ((dims,),) if takes_any else (dims,)


def _write_onnx(model: nn.Module, path: Path, description: Description) -> None:
    import onnx

    example, dims = _make_example(description)
    program: Any = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        dynamic_shapes=_bind(model, dims),
        input_names=["image"],
        output_names=["logits"],
        opset_version=OPSET,
        verbose=False,
    )
    proto = program.model_proto
    graph = proto.graph
    for axis, name in enumerate(AXES):
        if axis in dims:
            graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    del graph.value_info[:]  # has the exporter's names of axes
    weights = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        del node.metadata_props[:]  # source locations, with this machine's paths
        if node.op_type in ("Conv", "Gemm") and node.input[1] in weights:
            node.name = node.input[1].rpartition(".")[0]  # the module's name, for readers of the graph and for int8
    custom = {opset.domain for opset in proto.opset_import} - {""}
    if custom:
        raise RuntimeError(f"the exporter used operators that are not ONNX's, from {', '.join(sorted(custom))}")
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def _write_openvino(model: nn.Module, path: Path, description: Description) -> None:
    import openvino

    via = path.with_suffix(".onnx")
    _write_onnx(model, via, description)
    openvino.save_model(openvino.convert_model(via), path, compress_to_fp16=False)
    via.unlink()


def _write_torch_export(model: nn.Module, path: Path, description: Description) -> None:
    example, dims = _make_example(description)
    _save(torch.export.save, torch.export.export(model, (example,), dynamic_shapes=_bind(model, dims)), path)


def _write_torchscript(model: nn.Module, path: Path, description: Description) -> None:
    with _quiet_torchscript():
        try:
            program = torch.jit.script(model)
        except Exception:  # scripting reads source code and fails for much user-defined code
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # the artifact is compared on other shapes
                program = torch.jit.trace(model, _make_example(description)[0], check_trace=False)
        _save(torch.jit.save, program, path)


def _save(save: Callable[[Any, Any], object], program: Any, path: Path) -> None:
    """Save through memory: on a full disk, PyTorch's own writer of files ends the process."""
    content = io.BytesIO()
    save(program, content)
    path.write_bytes(content.getbuffer())


@contextmanager
def _quiet_torchscript() -> Iterator[None]:
    with warnings.catch_warnings():  # PyTorch warns that TorchScript is deprecated
        warnings.filterwarnings("ignore", message="`torch.jit.* is deprecated")
        yield


def _load_onnx(artifact: Path) -> Run:
    import onnxruntime

    # Both engines refuse data outside the folder, even through a link; tests/test_deployment_engines.py checks it.
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal; it would also print the errors that it raises
    session = onnxruntime.InferenceSession(artifact, options, providers=onnxruntime.get_available_providers())
    return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


def _load_openvino(artifact: Path) -> Run:
    import openvino
    import openvino.frontend

    weights = artifact.with_suffix(".bin")
    if weights.exists() and not weights.is_file():  # reading a pipe would block
        raise ValueError(f"{weights} is not a file")
    # By default, OpenVINO tries all of its readers on a file, TensorFlow's included.
    reader = openvino.frontend.FrontEndManager().load_by_framework("ir" if artifact.suffix == ".xml" else "onnx")
    network = reader.convert(reader.load(str(artifact)))
    # In float32, as exported; by default OpenVINO computes in bfloat16 if the CPU is faster with it.
    compiled = openvino.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled(images.numpy())[0].copy())


def _load_torch_export(artifact: Path) -> Run:
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)  # for a damaged file, torch prints a traceback before it raises
    try:
        return torch.export.load(artifact).module()
    finally:
        logger.setLevel(level)


def _load_torchscript(artifact: Path) -> Run:
    with _quiet_torchscript():
        return torch.jit.load(artifact)


ENGINES = {
    # TorchScript is a program with access to files; torch.export.load unpickles pickles in a .pt2 file.
    "torch": Engine(runs_code="TorchScript is a program, and a .pt2 file can contain a pickle"),
    "onnx": Engine(("onnxruntime",), "export"),
    "openvino": Engine(("openvino",), "openvino"),
}
FORMATS = {
    "onnx": Format(".onnx", _write_onnx, {"onnx": _load_onnx, "openvino": _load_openvino}, _ONNX, quantise_onnx),
    "openvino": Format(".xml", _write_openvino, {"openvino": _load_openvino}, _ONNX, quantise_openvino, ("nncf",)),
    # torch.export's graph is valid only if the last feature map has more than one pixel.
    "torch-export": Format(".pt2", _write_torch_export, {"torch": _load_torch_export}, size_minimum=36),
    "torchscript": Format(".pt", _write_torchscript, {"torch": _load_torchscript}),
}

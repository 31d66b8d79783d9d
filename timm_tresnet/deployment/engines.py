"""Formats and engines, as tables: how a network is written, what runs the artifact and how, what that needs."""

import importlib.util
import inspect
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

OPSET = 18  # the exporter's own; every other is converted from it
Run = Callable[[Tensor], Tensor]  # images to logits
_ONNX = ("onnx", "onnxscript")


@dataclass(frozen=True)
class Engine:
    """What runs artifacts.

    Args:
        packages: what it needs.
        extra: the one of pyproject.toml that has them.
        runs_code: how a file can have it run anything; "" if it cannot.
    """

    packages: tuple[str, ...] = ()
    extra: str = ""
    runs_code: str = ""


@dataclass(frozen=True)
class Format:
    """A kind of artifact.

    Args:
        suffix: of the file's name.
        write: writes a folded network that takes images as described.
        load: for each engine that runs the artifact, what opens it; the first is the one that it is for.
        packages: what writing needs, beside those of that engine.
        quantise: makes a written artifact int8, as `quantise_onnx`; None if there is no int8.
        packages_int8: what that needs more.
        size_minimum: the least of sides that are not fixed, in pixels, if the network itself takes less.
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
        """The engine that it is for."""
        return next(iter(self.load))


def require(purpose: str, extra: str, packages: Sequence[str]) -> None:
    """Import packages, or raise an ImportError that says which is missing or broken and what to do."""
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
    """Images to trace a network with, and what of their shape is free, as in torch.export's dynamic_shapes."""
    shape, (multiple, minimum) = description.shape, description.size_limits
    # Not 1: the exporter takes a dimension of 1 for a constant.
    example = torch.rand([side or default for side, default in zip(shape, (2, shape[1] or 3, 64, 96), strict=True)])
    dims: dict[int, Any] = {0: torch.export.Dim("batch")}
    for axis, name in ((2, "rows"), (3, "columns")):
        dims[axis] = multiple * torch.export.Dim(name, min=minimum // multiple)
    return example, {axis: dim for axis, dim in dims.items() if not shape[axis]}


def _bind(model: nn.Module, dims: dict[int, Any]) -> tuple[Any, ...]:
    """Free dimensions of the image for a network's forward, which may take *args, as that of peft's models does."""
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
    del graph.value_info[:]  # shapes in terms of the exporter's names
    weights = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        del node.metadata_props[:]  # where in the source code, with this machine's paths
        if node.op_type in ("Conv", "Gemm") and node.input[1] in weights:
            node.name = node.input[1].rpartition(".")[0]  # the module's, for whoever reads the graph and for int8
    custom = {opset.domain for opset in proto.opset_import} - {""}
    if custom:
        raise RuntimeError(f"the exporter used operators outside ONNX's own, of {', '.join(sorted(custom))}")
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
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=_bind(model, dims)), path)


def _write_torchscript(model: nn.Module, path: Path, description: Description) -> None:
    with _quiet_torchscript():
        try:
            program = torch.jit.script(model)
        except Exception:  # it reads source code, which user-defined code often does not suit
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # the artifact is compared on other shapes
                program = torch.jit.trace(model, _make_example(description)[0], check_trace=False)
        program.save(path)


@contextmanager
def _quiet_torchscript() -> Iterator[None]:
    with warnings.catch_warnings():  # PyTorch announces its end
        warnings.filterwarnings("ignore", message="`torch.jit.* is deprecated")
        yield


def _load_onnx(artifact: Path) -> Run:
    import onnxruntime

    # Both engines refuse data outside the folder, by a link too; tests/test_deployment_engines.py holds them to it.
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal; it prints what it raises
    session = onnxruntime.InferenceSession(artifact, options, providers=onnxruntime.get_available_providers())
    return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


def _load_openvino(artifact: Path) -> Run:
    import openvino
    import openvino.frontend

    weights = artifact.with_suffix(".bin")
    if weights.exists() and not weights.is_file():  # a pipe would keep us waiting
        raise ValueError(f"{weights} is not a file")
    # By itself OpenVINO shows a file to every reader that it has, TensorFlow's among them.
    reader = openvino.frontend.FrontEndManager().load_by_framework("ir" if artifact.suffix == ".xml" else "onnx")
    network = reader.convert(reader.load(str(artifact)))
    # As exported; by default OpenVINO computes float32 networks in bfloat16 where the CPU is faster at that.
    compiled = openvino.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled(images.numpy())[0].copy())


def _load_torch_export(artifact: Path) -> Run:
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)  # for a damaged file it prints a traceback, before it raises
    try:
        return torch.export.load(artifact).module()
    finally:
        logger.setLevel(level)


def _load_torchscript(artifact: Path) -> Run:
    with _quiet_torchscript():
        return torch.jit.load(artifact)


ENGINES = {
    # TorchScript is a program, with access to files; torch.export.load unpickles what a .pt2 says is to be unpickled.
    "torch": Engine(runs_code="TorchScript is a program, and a .pt2 file can hold a pickle"),
    "onnx": Engine(("onnxruntime",), "export"),
    "openvino": Engine(("openvino",), "openvino"),
}
FORMATS = {
    "onnx": Format(".onnx", _write_onnx, {"onnx": _load_onnx, "openvino": _load_openvino}, _ONNX, quantise_onnx),
    "openvino": Format(".xml", _write_openvino, {"openvino": _load_openvino}, _ONNX, quantise_openvino, ("nncf",)),
    # The graph of torch.export holds for last maps of more than one pixel.
    "torch-export": Format(".pt2", _write_torch_export, {"torch": _load_torch_export}, size_minimum=36),
    "torchscript": Format(".pt", _write_torchscript, {"torch": _load_torchscript}),
}

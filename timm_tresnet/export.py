"""From a network to the fastest thing the machine runs: folding, compiling, artifacts for other engines, int8."""

import copy
import importlib.util
import json
import logging
import os
import random
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm.data
import torch
from timm.layers import FrozenBatchNormAct2d
from timm.utils import reparameterize_model
from torch import Tensor, nn

from timm_tresnet.images import SAMPLES, find_images, read_image
from timm_tresnet.labels import MULTI_LABEL, is_multi_label, label_lookup
from timm_tresnet.layers import SpaceToDepth

OPSET = 18  # the exporter's own; every other is converted from it
TOLERANCE = 1e-4  # relative L2 distance of an artifact's logits from PyTorch's, float32
_CALIBRATION_IMAGES = 300
_HELD_OUT_IMAGES = 1000
_BATCH_SIZE = 8


@dataclass(frozen=True)
class _Format:
    suffix: str
    engine: str
    packages: tuple[str, ...] = ()  # what writing needs
    packages_int8: tuple[str, ...] = ()
    extra: str = ""  # of pyproject.toml, with those packages


_FORMATS = {
    "onnx": _Format(".onnx", "onnx", ("onnx", "onnxscript", "onnxruntime"), ("onnxruntime",), "export"),
    "openvino": _Format(".xml", "openvino", ("onnx", "onnxscript", "openvino"), ("nncf",), "openvino"),
    "torch-export": _Format(".pt2", "torch"),
    "torchscript": _Format(".pt", "torch"),
}
FORMATS = tuple(_FORMATS)
ENGINES = ("torch", "onnx", "openvino")


# ---- in PyTorch


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Copy of a network whose batch norms are folded into its convolutions: the same logits, fewer passes.

    Args:
        model: a TResNet in eval mode.

    Returns:
        The folded network, for inference only. Its state dict has `conv.bias` in place of `bn`.

    Raises:
        ValueError: if model is in training mode, or has a norm that cannot be folded.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("fold_batch_norms needs a network in eval mode, got one in training mode; call eval() first")
    return reparameterize_model(model)


def optimize_for_inference(model: nn.Module, dynamic: bool = False, mode: str | None = None) -> nn.Module:
    """Fold, lay out and compile a network for the device that it is on.

    The network is compiled as one graph when it first sees an image, which takes a minute on a CPU with few cores.
    On CUDA with a static shape, the whole network is replayed as a CUDA graph; an output is then overwritten by the
    next call.

    Args:
        model: a TResNet in eval mode, on its device and in its dtype (bfloat16 or float16 for speed, where the device
            has it).
        dynamic: compile once for all batch and image sizes; without it, again for each shape.
        mode: mode of `torch.compile`; None for "reduce-overhead", which has CUDA graphs, on CUDA with a static shape
            and for PyTorch's default elsewhere. "max-autotune" has CUDA graphs too, and first times several kernels
            for each operation, which takes minutes.

    Returns:
        A module that takes and returns what model does, without gradients.

    Raises:
        ValueError: as in `fold_batch_norms`.
    """
    network = _copy_folded(model).to(memory_format=torch.channels_last).requires_grad_(False)
    if mode is None and not dynamic and next(network.parameters()).device.type == "cuda":
        mode = "reduce-overhead"
    return _Inference(torch.compile(network, fullgraph=True, dynamic=dynamic, mode=mode))


class _Inference(nn.Module):
    """Runs a network without gradients, on images in channels-last layout."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.network(x.contiguous(memory_format=torch.channels_last))


def _copy_folded(model: nn.Module) -> nn.Module:
    """Copy, with its batch norms folded if that is what its norms are."""
    norms = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNormAct2d)
    if any(isinstance(module, norms) for module in model.modules()):
        return fold_batch_norms(model)
    return copy.deepcopy(model)


# ---- artifacts


def export_model(
    model: nn.Module,
    output: str | Path,
    format: str,
    batch_size: int | None = None,
    image_size: tuple[int, int] | None = None,
    calibration: str | Path | None = None,
) -> dict[str, Any]:
    """Write a network as one self-contained artifact, and a JSON file beside it that says how to feed it.

    Batch norms are folded. The artifact is run in its engine and compared with PyTorch, on random images and on the
    package's photographs, before the files get their names.

    Args:
        model: a network with a `pretrained_cfg`, in eval mode and float32.
        output: the artifact, FILE.onnx, FILE.xml (for "openvino", with FILE.bin beside it), FILE.pt2 (for
            "torch-export") or FILE.pt (for "torchscript"). Files of these names are replaced.
        format: one of `FORMATS`.
        batch_size: images in a batch; None for any number.
        image_size: height and width of the images, in pixels; None for any that the network takes.
        calibration: folder of images like those that the network will see, to quantise to int8 with, for "onnx" and
            "openvino". Part of them is held out to compare with float32.

    Returns:
        What the JSON file, FILE.onnx.json and so on, says: "input" (name, shape, dtype, and for a dynamic size its
        multiple and minimum), "output", "preprocessing" as timm means it, "class_names", "multi_label", "precision",
        "check" and versions.

    Raises:
        ValueError: if an argument is not one of the above, or the folder has too few images.
        ImportError: if the format needs packages that are not installed (then a ModuleNotFoundError) or broken.
        RuntimeError: if the artifact does not compute what PyTorch does.
    """
    output = Path(output)
    kind = _check_arguments(model, output, format, image_size, calibration)
    folded = _copy_folded(model).cpu()
    size = image_size or model.pretrained_cfg["input_size"][1:]
    preprocessing = timm.data.resolve_data_config({"input_size": (model.in_chans, *size)}, model=model)
    description = {
        "model": ".".join(filter(None, (model.pretrained_cfg.get("architecture"), model.pretrained_cfg.get("tag")))),
        "format": format,
        "precision": "int8" if calibration else "float32",
        "input": _describe_input(model, format, batch_size, image_size),
        "output": {"name": "logits", "shape": [batch_size or "batch", model.num_classes]},
        "preprocessing": preprocessing,
        "class_names": [label_lookup(model)(index) for index in range(model.num_classes)],
        "multi_label": is_multi_label(model.pretrained_cfg),
    }
    images = _CalibrationImages(Path(calibration), preprocessing, batch_size) if calibration else None
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.stem}-") as folder:
        unfinished = Path(folder) / output.name
        _write(folded, unfinished, format, description)
        if images:
            quantise = _quantise_onnx if format == "onnx" else _quantise_openvino
            description["kept_in_float"] = sorted(
                {name.partition(".se.")[0] + ".se" for name in quantise(unfinished, images)}
            )
        exported = ExportedModel(kind.engine, unfinished, description)
        if images:
            description["check"] = images.compare(folded, exported)
        else:
            description["check"] = {"max_relative_error": _compare(folded, exported, preprocessing)}
        description["versions"] = _versions(kind)
        description_path(unfinished).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        del exported  # it may have the files open
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == output.name):  # the artifact last
            os.replace(file, output.parent / file.name)
    return description


def description_path(artifact: Path) -> Path:
    """The JSON file that describes an artifact: FILE.onnx.json for FILE.onnx."""
    return artifact.with_name(artifact.name + ".json")


def _check_arguments(
    model: nn.Module, output: Path, format: str, image_size: tuple[int, int] | None, calibration: str | Path | None
) -> _Format:
    if format not in _FORMATS:
        raise ValueError(f"export_model needs format to be one of {', '.join(FORMATS)}, got {format!r}")
    kind = _FORMATS[format]
    if output.suffix != kind.suffix:
        raise ValueError(f"export_model needs an output that ends in {kind.suffix} for {format}, got {output}")
    if calibration and not kind.packages_int8:
        raise ValueError(f"export_model quantises to int8 for onnx and openvino, not for {format}")
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise ValueError("export_model needs a network in float32; call float() on it")
    if any(module.training for module in model.modules()):
        raise ValueError("export_model needs a network in eval mode, got one in training mode; call eval() first")
    multiple, smallest = _size_limits(model)
    if image_size and any(side % multiple or side < smallest for side in image_size):
        raise ValueError(
            f"{type(model).__name__} needs image sizes in multiples of {multiple}, at least {smallest}, got "
            f"{image_size[0]}x{image_size[1]}"
        )
    _require(f"exporting to {format}", kind.extra, kind.packages + (kind.packages_int8 if calibration else ()))
    return kind


def _require(purpose: str, extra: str, packages: Sequence[str]) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{purpose} needs {', '.join(missing)}, which is not installed; run pip install 'timm-tresnet[{extra}]'"
        )
    for package in packages:
        try:
            importlib.import_module(package)
        except Exception as error:  # a foreign package can fail in any way
            raise ImportError(
                f"{purpose} needs {package}, which is installed but cannot be imported "
                f"({type(error).__name__}: {error}); try pip install --force-reinstall {package}"
            ) from error


def _size_limits(model: nn.Module, format: str | None = None) -> tuple[int, int]:
    """Multiple and minimum of the sides of images, in pixels; with a format, of those that are not fixed in it."""
    for module in model.modules():
        if isinstance(module, SpaceToDepth):
            # torch.export's graph holds for last maps of more than one pixel
            return module.block_size, max(module.min_size, 36 if format == "torch-export" else 0)
    # torch.export cannot tell for which other sizes max pool, blur and average pool agree
    return (32, 64) if format else (1, 1)


def _describe_input(
    model: nn.Module, format: str, batch_size: int | None, image_size: tuple[int, int] | None
) -> dict[str, Any]:
    described = {
        "name": "image",
        "shape": [batch_size or "batch", model.in_chans, *(image_size or ("height", "width"))],
        "dtype": "float32",
    }
    if image_size is None:
        described["size_multiple"], described["size_minimum"] = _size_limits(model, format)
    return described


def _versions(kind: _Format) -> dict[str, str]:
    packages = ("timm-tresnet", "timm", "torch", *kind.packages, *kind.packages_int8)
    return {package: version(package) for package in dict.fromkeys(packages) if _is_installed(package)}


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


# ---- writing


def _write(model: nn.Module, path: Path, format: str, description: dict[str, Any]) -> None:
    if format == "torchscript":
        with _torchscript():
            torch.jit.script(model).save(path)
        return
    batch, channels, height, width = description["input"]["shape"]
    # Not 1: the exporter takes a dimension of 1 for a constant.
    sides = (64, 96) if height == "height" else (height, width)
    example = torch.rand(2 if batch == "batch" else batch, channels, *sides)
    dims: dict[int, Any] = {0: torch.export.Dim("batch")} if batch == "batch" else {}
    if height == "height":
        multiple, smallest = description["input"]["size_multiple"], description["input"]["size_minimum"]
        for axis, name in ((2, "rows"), (3, "columns")):
            dims[axis] = multiple * torch.export.Dim(name, min=smallest // multiple)
    if format == "torch-export":
        torch.export.save(torch.export.export(model, (example,), dynamic_shapes=(dims,)), path)
    elif format == "onnx":
        _write_onnx(model, path, example, dims)
    else:
        import openvino

        via = path.with_suffix(".onnx")
        _write_onnx(model, via, example, dims)
        openvino.save_model(openvino.convert_model(via), path, compress_to_fp16=False)
        via.unlink()


@contextmanager
def _torchscript() -> Iterator[None]:
    with warnings.catch_warnings():  # PyTorch announces its end
        warnings.filterwarnings("ignore", message="`torch.jit.* is deprecated")
        yield


def _write_onnx(model: nn.Module, path: Path, example: Tensor, dims: dict[int, Any]) -> None:
    import onnx

    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        dynamic_shapes=(dims,),
        input_names=["image"],
        output_names=["logits"],
        opset_version=OPSET,
        verbose=False,
    )
    proto = program.model_proto
    graph = proto.graph
    for axis, name in enumerate(("batch", "channels", "height", "width")):
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


# ---- running


class ExportedModel:
    """What `export_model` wrote, behind the interface of a network; `timm-tresnet classify` runs it.

    Args:
        engine: "torch", "onnx" (ONNX Runtime) or "openvino" (takes .onnx as well).
        artifact: the file.
        description: what the JSON file beside it says; None to read that.

    Raises:
        ValueError: if the engine is unknown or does not run the artifact's format.
        ImportError: if the engine is not installed (then a ModuleNotFoundError) or broken.
        OSError: if a file is missing.
    """

    def __init__(self, engine: str, artifact: str | Path, description: dict[str, Any] | None = None) -> None:
        artifact = Path(artifact)
        if engine not in ENGINES:
            raise ValueError(f"ExportedModel needs engine to be one of {', '.join(ENGINES)}, got {engine!r}")
        if description is None:
            description = json.loads(description_path(artifact).read_text(encoding="utf-8"))
        format = description["format"]
        if engine != _FORMATS[format].engine and (engine, format) != ("openvino", "onnx"):
            raise ValueError(f"{artifact} is for the engine {_FORMATS[format].engine}, not for {engine}")
        if not artifact.exists():
            raise FileNotFoundError(f"no file {artifact}")
        self.description = description
        self.num_classes = description["output"]["shape"][1]
        self.pretrained_cfg = {
            **description["preprocessing"],
            "label_names": description["class_names"],
            "notes": (MULTI_LABEL,) if description["multi_label"] else (),
        }
        self._run = {"torch": _load_torch, "onnx": _load_onnx, "openvino": _load_openvino}[engine](artifact)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of images, (N, C, H, W) -> (N, num_classes); N is any, the last batch of a fixed size is padded."""
        size = self.description["input"]["shape"][0]
        logits = []
        for batch in images.split(len(images) if size == "batch" else size):
            missing = 0 if size == "batch" else size - len(batch)
            logits.append(self._run(torch.cat([batch, batch[:1].expand(missing, -1, -1, -1)])))
        return torch.cat(logits)[: len(images)]


def _load_torch(artifact: Path) -> Any:
    if artifact.suffix == ".pt":
        with _torchscript():
            network = torch.jit.load(artifact)
    else:
        network = torch.export.load(artifact).module()

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return network(images)

    return run


def _load_onnx(artifact: Path) -> Any:
    _require("the engine onnx", "export", ["onnxruntime"])
    import onnxruntime

    session = onnxruntime.InferenceSession(artifact, providers=onnxruntime.get_available_providers())
    return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


def _load_openvino(artifact: Path) -> Any:
    _require("the engine openvino", "openvino", ["openvino"])
    import openvino

    # As exported; by default OpenVINO computes float32 networks in bfloat16 where the CPU is faster at that.
    compiled = openvino.Core().compile_model(artifact, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled(images.numpy())[0].copy())


def _compare(model: nn.Module, exported: ExportedModel, preprocessing: dict[str, Any]) -> float:
    """Largest relative L2 distance of an artifact's logits from PyTorch's, on random images and on photographs."""
    channels, height, width = preprocessing["input_size"]
    batches = [torch.rand(3, channels, height, width)]
    if exported.description["input"]["shape"][2] == "height":
        smallest, multiple = (exported.description["input"][name] for name in ("size_minimum", "size_multiple"))
        batches.append(torch.rand(1, channels, smallest, 2 * smallest + multiple))
    if channels == 3:
        transform = timm.data.create_transform(**preprocessing)
        batches.append(torch.stack([transform(read_image(path)) for path in find_images([SAMPLES])]))
    largest = 0.0
    for images in batches:
        with torch.no_grad():
            expected = model(images)
        error = ((exported(images) - expected).norm() / expected.norm()).item()
        if not error <= TOLERANCE:  # nan neither
            raise RuntimeError(
                f"the exported network's logits differ from PyTorch's by {error:.1e} (relative L2) on images of "
                f"{tuple(images.shape)}, more than {TOLERANCE}; nothing was written"
            )
        largest = max(largest, error)
    return largest


# ---- int8


class _CalibrationImages:
    """Images of a folder in a seeded order: some to calibrate on, others held out to compare with float32."""

    def __init__(self, folder: Path, preprocessing: dict[str, Any], batch_size: int | None) -> None:
        paths = list(find_images([folder])) if folder.is_dir() else []
        random.Random(0).shuffle(paths)
        self._transform = timm.data.create_transform(**preprocessing)
        self._batch_size = batch_size or _BATCH_SIZE
        self._fixed = batch_size is not None
        held_out = min(len(paths) // 2, _HELD_OUT_IMAGES)
        self.skipped = 0
        self._held_out = paths[:held_out]
        self._calibration = paths[held_out : held_out + _CALIBRATION_IMAGES]
        self.folder = folder
        if not any(True for _ in self._read(self._held_out)) or not any(True for _ in self._read(self._calibration)):
            raise ValueError(
                f"int8 needs a folder of images like those that the network will see, a few hundred of them; {folder} "
                f"has {len(paths)}, and {self.skipped} of those looked at cannot be read"
            )
        self.skipped = 0
        self.used = 0

    def _read(self, paths: Sequence[Path]) -> Iterator[Tensor]:
        for path in paths:
            try:
                yield self._transform(read_image(path))
            except ValueError:
                self.skipped += 1

    def _batches(self, paths: Sequence[Path]) -> Iterator[Tensor]:
        batch: list[Tensor] = []
        for image in self._read(paths):
            batch.append(image)
            if len(batch) == self._batch_size:
                yield torch.stack(batch)
                batch = []
        if batch:
            missing = self._batch_size - len(batch) if self._fixed else 0
            yield torch.stack(batch + batch[:1] * missing)

    def calibration_batches(self) -> Iterator[Any]:
        """Batches to calibrate on, as NumPy arrays."""
        for batch in self._batches(self._calibration):
            self.used += len(batch)
            yield batch.numpy()

    def compare(self, model: nn.Module, exported: ExportedModel) -> dict[str, Any]:
        """How often both networks put the same class first, on the images held out."""
        same = total = 0
        for batch in self._batches(self._held_out):
            with torch.no_grad():
                same += int((model(batch).argmax(-1) == exported(batch).argmax(-1)).sum())
            total += len(batch)
        return {
            "top1_agreement": same / total,
            "held_out_images": total,
            "calibration_images": self.used,
            "skipped_images": self.skipped,
        }


# Squeeze-and-excitation works on one number a channel: no time to gain, and its gate scales whole channels.
_ONNX_INT8_OPERATORS = ("Conv", "Gemm", "LeakyRelu", "Relu", "Add", "AveragePool", "Pad")


def _quantise_onnx(path: Path, images: _CalibrationImages) -> list[str]:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = images.calibration_batches()

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"image": batch}

    prepared = path.with_suffix(".prepared")
    quant_pre_process(path, prepared, skip_optimization=True, skip_symbolic_shape=True)
    gates = [node.name for node in onnx.load(path).graph.node if ".se." in node.name]
    quantize_static(
        prepared,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        reduce_range=True,  # weights of 7 bits: CPUs without VNNI add products of 8 in 16 bits, which overflow
        op_types_to_quantize=list(_ONNX_INT8_OPERATORS),
        nodes_to_exclude=gates,
    )
    prepared.unlink()
    return gates


def _quantise_openvino(path: Path, images: _CalibrationImages) -> list[str]:
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)  # else it names every gate that it was told to ignore
    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # the weights' file is about to be overwritten
    network = core.read_model(path)
    batches = list(images.calibration_batches())
    gates = [node.get_friendly_name() for node in network.get_ops() if ".se." in node.get_friendly_name()]
    quantised = nncf.quantize(
        network,
        nncf.Dataset(batches),
        subset_size=len(batches),
        ignored_scope=nncf.IgnoredScope(names=gates, validate=False),
    )
    openvino.save_model(quantised, path, compress_to_fp16=False)
    return gates

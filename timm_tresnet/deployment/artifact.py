"""Export a network for another engine, check the artifact against PyTorch, and run artifacts."""

import copy
import importlib.util
import json
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm.data
import torch
from torch import Tensor, nn

from timm_tresnet.deployment.description import Description, description_path
from timm_tresnet.deployment.engines import ENGINES, FORMATS, Format, require
from timm_tresnet.deployment.folding import copy_folded, require_eval
from timm_tresnet.deployment.int8 import CalibrationImages
from timm_tresnet.models.layers import SpaceToDepth
from timm_tresnet.models.layers.observed import is_observed
from timm_tresnet.utils.errors import summarise
from timm_tresnet.utils.files import atomic_write
from timm_tresnet.utils.images import CHANNELS, SAMPLES, find_images, read_image
from timm_tresnet.utils.schema import read_json
from timm_tresnet.weights.labels import (
    is_multi_label,
    label_lookup,
    list_identifiers,
    make_notes,
    read_thresholds,
)
from timm_tresnet.weights.preprocessing import find_assumed, note_assumed, resolve_preprocessing

MIN_AGREEMENT = 0.9  # the default; benchmarks/int8_accuracy.py finds 98 % for a trained network
TOLERANCE = 1e-4  # relative L2 distance of an artifact's logits from PyTorch's, float32


def export_model(
    model: nn.Module,
    output: str | Path,
    format: str,
    batch_size: int | None = None,
    image_size: tuple[int, int] | None = None,
    calibration: str | Path | None = None,
    min_agreement: float = MIN_AGREEMENT,
) -> dict[str, Any]:
    """Export a network as a self-contained artifact, with a JSON file beside it that describes its input and output.

    Batch norms are folded, see `fold_batch_norms`. Before the files get their final names, the artifact is run in its
    engine. Its logits are compared with the given network's, including hooks and patched methods, on random images and
    on the package's photographs.

    Args:
        model: a network with a `pretrained_cfg`, in eval mode and float32.
        output: the artifact: FILE.onnx, FILE.xml (for "openvino", with FILE.bin beside it), FILE.pt2 (for
            "torch-export") or FILE.pt (for "torchscript"). Existing files are replaced.
        format: one of `FORMATS`.
        batch_size: images in a batch; None for any number.
        image_size: height and width of the images, in pixels; None for any size that the network accepts.
        calibration: folder of typical input images for quantising to int8, with "onnx" and "openvino". Some of them are
            held out for the comparison with float32.
        min_agreement: for int8, the least share of held-out images with the same top-1 class as the given network, from
            0 to 1.

    Returns:
        The content of the JSON file, FILE.onnx.json and so on: "input" (name, shape, dtype, and the multiple and
        minimum of a dynamic size), "output", "preprocessing" in timm's terms, "class_names", "class_identifiers",
        "multi_label", "label_thresholds", "precision", "check" and "versions".

    Raises:
        ValueError: if an argument is invalid, the network does not return `model.num_classes` logits an image, or the
            folder has too few images.
        ImportError: if the format needs packages that are not installed (ModuleNotFoundError) or cannot be imported.
        RuntimeError: if PyTorch cannot write the network in this format, the artifact's logits differ, or int8 agrees
            on fewer images than min_agreement.
    """
    output = Path(output)
    kind = _check_arguments(model, output, format, image_size, calibration)
    if not 0 <= min_agreement <= 1:
        raise ValueError(f"export_model needs min_agreement from 0 to 1, got {min_agreement}")
    precision = "int8" if calibration else "float32"
    description = _describe(model, format, precision, batch_size, image_size)
    network = model
    if any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
        network = copy.deepcopy(model).cpu()
    _check_output(network, description)
    images = CalibrationImages(Path(calibration), description.preprocessing, batch_size) if calibration else None
    report = description.to_json()
    with atomic_write(output) as unfinished:
        _write(network, kind, unfinished, description)
        exported = ExportedModel(unfinished, kind.engine, report, trust=True)
        report["check"] = {"max_relative_error": _compare(network, exported, description)}
        del exported  # may have the files open
        if images and kind.quantise:  # _check_arguments refuses images for formats without it
            kept = kind.quantise(unfinished, images.calibration_batches())
            report["kept_in_float"] = sorted({name.partition(".se.")[0] + ".se" for name in kept})
            exported = ExportedModel(unfinished, kind.engine, report, trust=True)
            report["check"] = images.compare(network, exported)
            del exported
            _require_agreement(report["check"], min_agreement)
        report["versions"] = _versions(kind)
        description_path(unfinished).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _check_arguments(
    model: nn.Module, output: Path, format: str, image_size: tuple[int, int] | None, calibration: str | Path | None
) -> Format:
    if format not in FORMATS:
        raise ValueError(f"export_model needs format to be one of {', '.join(FORMATS)}, got {format!r}")
    kind = FORMATS[format]
    if output.suffix != kind.suffix:
        raise ValueError(f"export_model needs an output that ends in {kind.suffix} for {format}, got {output}")
    if calibration and not kind.quantise:
        int8 = " or ".join(name for name, each in FORMATS.items() if each.quantise)
        raise ValueError(f"export_model needs the format {int8} for int8, got {format}")
    if not isinstance(getattr(model, "pretrained_cfg", None), dict) or not hasattr(model, "num_classes"):
        raise ValueError(
            "export_model needs a network as timm.create_model makes it, with pretrained_cfg and num_classes, got "
            f"{type(model).__name__}; pass the network inside a wrapper (model.module)"
        )
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise ValueError("export_model needs a network in float32; call float() on it")
    require_eval(model, "export_model")
    multiple, minimum = _size_limits(model)
    if image_size and any(side % multiple or side < minimum for side in image_size):
        raise ValueError(
            f"{type(model).__name__} needs image sizes in multiples of {multiple}, at least {minimum}, got "
            f"{image_size[0]}x{image_size[1]}"
        )
    height, width = resolve_preprocessing(model)["input_size"][1:]
    multiple, minimum = _size_limits(model, kind)
    if kind.size_minimum and not image_size and min(height, width) < minimum:
        raise ValueError(
            f"{format} for any size needs image sizes in multiples of {multiple}, at least {minimum}, and the "
            f"network's images are {height}x{width}; fix the size with image_size=({height}, {width}), in the command "
            f"--size {height} {width}, or export in another format"
        )
    engine = ENGINES[kind.engine]
    packages = (*kind.packages, *engine.packages, *(kind.packages_int8 if calibration else ()))
    require(f"exporting to {format}", engine.extra, packages)
    return kind


def _check_output(model: nn.Module, description: Description) -> None:
    shape = [3, *description.preprocessing["input_size"]]
    with torch.no_grad():
        logits = model(torch.rand(shape))
    classes = description.num_classes
    if not isinstance(logits, Tensor):
        raise ValueError(f"export_model needs a network that returns one tensor, got {type(logits).__name__}")
    if classes and logits.shape != (3, classes):
        got = f"{logits.shape[1]} logits an image" if logits.ndim == 2 else f"an output of shape {tuple(logits.shape)}"
        raise ValueError(
            f"export_model needs {classes} logits an image, the model.num_classes, got {got}; call "
            "model.reset_classifier(num_classes) instead of replacing the head or head.fc by hand, or set "
            "model.num_classes too"
        )


def _write(model: nn.Module, kind: Format, path: Path, description: Description) -> None:
    try:
        kind.write(copy_folded(model), path, description)
    except (ImportError, OSError):
        raise
    except Exception as error:  # exporters can raise anything for user-defined code
        raise RuntimeError(
            f"PyTorch cannot write this network as {description.format}: {summarise(error)}"
            f"{_name_user_code(model)}; nothing was written"
        ) from error


def _name_user_code(model: nn.Module) -> str:
    """Return the user-defined parts of a network and what to do about them, for messages; "" if there are none."""
    own = ("torch", "timm", "timm_tresnet")
    named = [
        f"{name or 'the network'} ({'hooks or patched methods' if is_observed(module) else type(module).__name__})"
        for name, module in model.named_modules()
        if is_observed(module) or type(module).__module__.partition(".")[0] not in own
    ]
    if not named:
        return ""
    more = ", ..." if len(named) > 5 else ""
    return (
        f"; it has user-defined code: {', '.join(named[:5])}{more}; remove the hooks (handle.remove()), merge adapters "
        "(merge_and_unload() of peft), or export in another format"
    )


def _size_limits(model: nn.Module, kind: Format | None = None) -> tuple[int, int]:
    """Return multiple and minimum of an image's sides, in pixels; with a format, those of dynamic sides."""
    for module in model.modules():
        if isinstance(module, SpaceToDepth):
            return module.block_size, max(module.min_size, kind.size_minimum if kind else 0)
    # torch.export cannot derive for which other sizes the maps of max pool, blur and average pool fit together
    return (32, 64) if kind else (1, 1)


def _describe(
    model: Any, format: str, precision: str, batch_size: int | None, image_size: tuple[int, int] | None
) -> Description:
    config = model.pretrained_cfg
    return Description(
        model=".".join(filter(None, (config.get("architecture"), config.get("tag")))),
        format=format,
        precision=precision,
        shape=(batch_size, model.in_chans, *(image_size or (None, None))),
        size_limits=_size_limits(model, FORMATS[format]),
        num_classes=model.num_classes,
        preprocessing=resolve_preprocessing(model, image_size),
        class_names=list(map(label_lookup(model), range(model.num_classes))),
        class_identifiers=list_identifiers(model),
        multi_label=is_multi_label(config),
        label_thresholds=read_thresholds(config, model.num_classes),
        preprocessing_assumed=find_assumed(config),
    )


def _compare(model: nn.Module, exported: Callable[[Tensor], Tensor], description: Description) -> float:
    """Return the largest relative L2 distance of an artifact's logits, on random images and on photographs."""
    channels, height, width = description.preprocessing["input_size"]
    batches = [torch.rand(3, channels, height, width)]
    if not description.shape[2]:
        multiple, minimum = description.size_limits
        batches.append(torch.rand(1, channels, minimum, 2 * minimum + multiple))
    if channels in CHANNELS:
        transform = timm.data.create_transform(**description.preprocessing)
        batches.append(torch.stack([transform(read_image(path, in_chans=channels)) for path in find_images([SAMPLES])]))
    largest = 0.0
    for images in batches:
        with torch.no_grad():
            expected = model(images)
        error = ((exported(images) - expected).norm() / expected.norm()).item()
        if not error <= TOLERANCE:  # also true for nan
            raise RuntimeError(
                f"the exported network's logits differ from the given network's by {error:.1e} (relative L2) on images "
                f"of {tuple(images.shape)}, more than {TOLERANCE}{_name_user_code(model)}; nothing was written"
            )
        largest = max(largest, error)
    return largest


def _require_agreement(check: dict[str, Any], least: float) -> None:
    if not check["top1_agreement"] >= least:
        raise RuntimeError(
            f"int8 needs the same top-1 class as float32 on at least {least:.1%} of the held-out images, got "
            f"{check['top1_agreement']:.1%} of {check['held_out_images']}; calibrate on more images, similar to the "
            "network's later input, or lower --min-agreement (in Python min_agreement); nothing was written"
        )


def _versions(kind: Format) -> dict[str, str]:
    others = (*kind.packages, *ENGINES[kind.engine].packages, *kind.packages_int8)
    installed = (package for package in others if importlib.util.find_spec(package))
    return {package: version(package) for package in ("timm-tresnet", "timm", "torch", *installed)}


class ExportedModel:
    """An artifact from `export_model` with the interface of a network; `timm-tresnet classify` runs it.

    Loading a file for the engine "torch" can execute code, so it needs trust=True. The other engines execute none. The
    first two arguments may also come in the order of version 0.2, with a DeprecationWarning.

    Args:
        artifact: the file.
        engine: "torch", "onnx" (ONNX Runtime) or "openvino" (which also runs .onnx files).
        description: content of the JSON file beside it; None to read that file.
        trust: whether to load a file that can execute code; `--trust` in the command.

    Raises:
        ValueError: if the engine is unknown or does not run the artifact's format, the file is not trusted, or the file
            or its description is damaged.
        ImportError: if the engine is not installed (ModuleNotFoundError) or cannot be imported.
        OSError: if a file is missing.
    """

    def __init__(
        self, artifact: str | Path, engine: str, description: dict[str, Any] | None = None, *, trust: bool = False
    ) -> None:
        if artifact in ENGINES and engine not in ENGINES:  # the old order; an artifact's name has a suffix
            warnings.warn(
                f"ExportedModel({str(artifact)!r}, FILE) is now ExportedModel(FILE, {str(artifact)!r})",
                DeprecationWarning,
                stacklevel=2,
            )
            artifact, engine = engine, str(artifact)
        artifact = Path(artifact)
        if engine not in ENGINES:
            raise ValueError(f"ExportedModel needs engine to be one of {', '.join(ENGINES)}, got {engine!r}")
        beside = description_path(artifact)
        if description is None:
            description = read_json(beside)
        described = Description.from_json(description, str(beside))
        if described.format not in FORMATS:
            raise ValueError(f"{beside} needs format to be one of {', '.join(FORMATS)}, got {described.format!r}")
        kind = FORMATS[described.format]
        if engine not in kind.load:
            raise ValueError(f"{artifact} needs the engine {kind.engine}, got {engine}")
        if artifact.suffix != kind.suffix:
            raise ValueError(
                f"{artifact} needs to end in {kind.suffix}, since {beside} describes it as {described.format}"
            )
        if not artifact.is_file():  # reading a pipe would block
            raise FileNotFoundError(f"there is no file {artifact}")
        if ENGINES[engine].runs_code and not trust:
            raise ValueError(
                f"{artifact} can execute code when it is loaded ({ENGINES[engine].runs_code}); if you trust its author,"
                " load it with --trust (in Python trust=True), else ask the author for an .onnx file"
            )
        self.description = description
        self.num_classes, self.in_chans = described.num_classes, described.shape[1]
        self.size_multiple = None if any(described.shape[2:]) else described.size_limits[0]
        names = described.class_identifiers or described.class_names
        self.pretrained_cfg = {
            **described.preprocessing,
            "label_names": names,
            "label_descriptions": dict(zip(names, described.class_names, strict=True)),
            "architecture": described.model.partition(".")[0],
            "notes": note_assumed(
                make_notes(described.multi_label, described.label_thresholds), described.preprocessing_assumed
            )
            or (),
        }
        self._batch_size = described.shape[0]
        self._artifact = artifact
        require(f"the engine {engine}", ENGINES[engine].extra, ENGINES[engine].packages)
        try:
            self._run = kind.load[engine](artifact)
        except Exception as error:  # an engine can raise anything for a damaged file
            raise ValueError(f"the engine {engine} cannot load {artifact}: {summarise(error)}") from error

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Compute logits, (N, C, H, W) -> (N, num_classes), for any N; a fixed-size last batch is padded.

        Raises:
            RuntimeError: if the artifact does not fit its description.
        """
        size = self._batch_size or max(len(images), 1)
        padded = torch.cat([images, images[:1].expand(-len(images) % size, -1, -1, -1)])
        try:
            logits = torch.cat([self._run(batch) for batch in padded.split(size)])[: len(images)]
        except Exception as error:  # as above
            shape = "x".join(map(str, images.shape))
            raise RuntimeError(f"{self._artifact} cannot be run on images of {shape}: {summarise(error)}") from error
        if self.num_classes and logits.shape != (len(images), self.num_classes):
            raise RuntimeError(
                f"{self._artifact} needs to return {self.num_classes} logits an image, as described, got "
                f"an output of shape {tuple(logits.shape)} for {len(images)} images"
            )
        return logits

"""Quantise artifacts to int8 with ONNX Runtime and NNCF, and compare them with float32 on held-out images."""

import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm.data
import torch
from torch import Tensor, nn

from timm_tresnet.utils.images import find_images, read_image

_CALIBRATION_IMAGES = 300
_HELD_OUT_IMAGES = 1000
_BATCH_SIZE = 8
# Not squeeze-and-excitation: with one number a channel, int8 saves no time, and its gate scales whole channels.
_ONNX_OPERATORS = ("Conv", "Gemm", "LeakyRelu", "Relu", "Add", "AveragePool", "Pad")


class CalibrationImages:
    """Images of a folder in a seeded order, split into calibration images and held-out images.

    Args:
        folder: the folder.
        preprocessing: timm's data config.
        batch_size: fixed size of a batch; None if the network accepts any.

    Raises:
        ValueError: if the folder has too few readable images.
    """

    def __init__(self, folder: Path, preprocessing: dict[str, Any], batch_size: int | None) -> None:
        paths = list(find_images([folder])) if folder.is_dir() else []
        random.Random(0).shuffle(paths)
        held_out = min(len(paths) // 2, _HELD_OUT_IMAGES)
        self._held_out = paths[:held_out]
        self._calibration = paths[held_out : held_out + _CALIBRATION_IMAGES]
        self._in_chans = preprocessing["input_size"][0]
        self._transform = timm.data.create_transform(**preprocessing)
        self._batch_size = batch_size or _BATCH_SIZE
        self._fixed = batch_size is not None
        self._used = self._skipped = 0
        if any(next(self._read(part), None) is None for part in (self._held_out, self._calibration)):
            raise ValueError(
                f"int8 needs a folder with a few hundred typical input images, got {folder} with {len(paths)} images, "
                f"of which {self._skipped} are unreadable so far"
            )
        self._skipped = 0

    def _read(self, paths: Sequence[Path]) -> Iterator[Tensor]:
        for path in paths:
            try:
                yield self._transform(read_image(path, in_chans=self._in_chans))
            except ValueError:
                self._skipped += 1

    def _batches(self, paths: Sequence[Path]) -> Iterator[Tensor]:
        images = self._read(paths)
        while batch := list(itertools.islice(images, self._batch_size)):
            missing = self._batch_size - len(batch) if self._fixed else 0
            yield torch.stack(batch + batch[:1] * missing)

    def calibration_batches(self) -> Iterator[Any]:
        """Yield calibration batches, (N, C, H, W) NumPy arrays."""
        for batch in self._batches(self._calibration):
            self._used += len(batch)
            yield batch.numpy()

    def compare(self, model: nn.Module, exported: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Return the share of held-out images with the same top-1 class in both networks, and counts of images."""
        same = total = 0
        for batch in self._batches(self._held_out):
            with torch.no_grad():
                same += int((model(batch).argmax(-1) == exported(batch).argmax(-1)).sum())
            total += len(batch)
        return {
            "top1_agreement": same / total,
            "held_out_images": total,
            "calibration_images": self._used,
            "skipped_images": self._skipped,
        }


def quantise_onnx(path: Path, batches: Iterator[Any]) -> list[str]:
    """Quantise an .onnx file in place.

    Args:
        path: the file.
        batches: calibration batches, (N, C, H, W) NumPy arrays.

    Returns:
        Names of the nodes that stay in float.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            batch = next(batches, None)
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
        reduce_range=True,  # 7-bit weights: CPUs without VNNI sum products in 16 bits, which 8-bit weights overflow
        op_types_to_quantize=list(_ONNX_OPERATORS),
        nodes_to_exclude=gates,
    )
    prepared.unlink()
    return gates


def quantise_openvino(path: Path, batches: Iterator[Any]) -> list[str]:
    """Quantise an .xml file and its weights in place; arguments and result as in `quantise_onnx`."""
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)  # otherwise it lists every ignored gate
    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # the weights file will be overwritten
    network = core.read_model(path)
    gates = [node.get_friendly_name() for node in network.get_ops() if ".se." in node.get_friendly_name()]
    images = list(batches)
    quantised = nncf.quantize(
        network,
        nncf.Dataset(images),
        subset_size=len(images),
        ignored_scope=nncf.IgnoredScope(names=gates, validate=False),
    )
    openvino.save_model(quantised, path, compress_to_fp16=False)
    return gates

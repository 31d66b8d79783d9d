"""Predictions for image files, batch by batch."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_tresnet.collection.reading import Batch, File, ImageFiles, plan_batches, read_batches
from timm_tresnet.deployment.running import Runner, find_size_multiple
from timm_tresnet.utils.images import printable
from timm_tresnet.utils.stacks import Mixed
from timm_tresnet.weights.labels import is_multi_label, label_lookup, read_thresholds
from timm_tresnet.weights.preprocessing import resolve_preprocessing

THRESHOLD = 0.5  # for labels without a threshold of their own
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a collection is classified.

    Args:
        top_k: number of classes to report for each image.
        threshold: for a multi-label network, the least probability of a reported label; None for the thresholds in the
            weights' config, or 0.5 without those.
        as_stored: read images as timm's scripts do, see `timm_tresnet.utils.images.read_image`.
        fast_jpeg: decode large JPEG files at reduced size, see `timm_tresnet.collection.reading.ImageFiles`.
        keep_ratio: keep the aspect ratio of images, see `timm_tresnet.weights.aspect_ratio.KeepRatio`.
        device: device of the network; for this and the next three see `timm_tresnet.deployment.running.Runner`.
        amp: dtype of autocast, such as "bfloat16"; None for float32.
        channels_last: use the channels-last memory format for images and weights.
        compiled: fold and compile the network.
        batch_size: images in a batch.
        workers: processes that read files; 0 to read in this process.
        process: number of this process, from 0.
        processes: number of processes that share the files.
    """

    top_k: int = 3
    threshold: float | None = None
    as_stored: bool = False
    fast_jpeg: bool = False
    keep_ratio: bool = False
    device: str = "cpu"
    amp: str | None = None
    channels_last: bool = False
    compiled: bool = False
    batch_size: int = 32
    workers: int = 0
    process: int = 0
    processes: int = 1

    def describe(self) -> dict[str, Any]:
        """Return the settings that change results by more than rounding, as JSON values."""
        names = ("top_k", "threshold", "as_stored", "fast_jpeg", "keep_ratio", "amp")
        return {**{name: getattr(self, name) for name in names}, "device": self.device.partition(":")[0]}

    def plan(self, paths: Iterable[Path], is_done: Callable[[Path], bool]) -> Iterator[list[File]]:
        """Yield the batches of this process, see `timm_tresnet.collection.reading.plan_batches`."""
        return plan_batches(paths, self.batch_size, is_done, self.process, self.processes)


def classify_files(
    network: Any, paths: Iterable[Path], settings: Settings, is_done: Callable[[Path], bool] = lambda path: False
) -> Iterator[list[tuple[Path, Result]]]:
    """Classify image files, batch by batch, with the preprocessing that the network's weights were made for.

    Args:
        network: a model from `timm.create_model`, in eval mode, or a `timm_tresnet.ExportedModel`.
        paths: the files; consumed a few batches ahead.
        settings: how to classify them.
        is_done: whether a file already has its result; called once for each file.

    Yields:
        The results of each batch, see `classify_batches`.
    """
    amp = getattr(torch, settings.amp) if settings.amp else None
    compile_for = settings.batch_size if settings.compiled else None
    run = Runner(network, settings.device, amp, settings.channels_last, compile_for)
    multiple = find_size_multiple(network) if settings.keep_ratio else None
    images = ImageFiles(resolve_preprocessing(network), settings.as_stored, settings.fast_jpeg, multiple)
    batches = read_batches(images, settings.plan(paths, is_done), settings.workers)
    return classify_batches(network, run, batches, settings.top_k, settings.threshold)


def classify_batches(
    network: Any,
    run: Callable[[Tensor | Mixed], Tensor],
    batches: Iterable[Batch],
    top_k: int,
    threshold: float | None,
) -> Iterator[list[tuple[Path, Result]]]:
    """Classify batches of image files as they come.

    Args:
        network: its pretrained config names the classes and says whether it is multi-label.
        run: computes logits (N, classes) from pixels.
        batches: from `timm_tresnet.collection.reading.read_batches`.
        top_k: see `Settings`.
        threshold: see `Settings`.

    Yields:
        For each batch, a list of (path, result), one for each wanted file. A result is a dict with "image" and either
        "predictions", a list of dicts with "label", "index" and "probability", most probable first, or "error", if the
        file cannot be read or its logits are not finite.
    """
    describe = label_lookup(network)
    choose: Callable[[Tensor], list[list[tuple[int, float]]]]
    if is_multi_label(network.pretrained_cfg):
        choose = functools.partial(_choose_probable, thresholds=choose_thresholds(network, threshold))
    else:
        choose = functools.partial(_choose_top, count=top_k)
    for batch in batches:
        logits = None if batch.pixels is None else run(batch.pixels)
        finite = iter([] if logits is None else logits.isfinite().all(-1).tolist())
        chosen = iter([] if logits is None else choose(logits))
        results = []
        for file in batch.files:
            result: Result = {"image": printable(file.path)}
            if file.error is not None:
                result["error"] = file.error
            else:
                pairs = next(chosen)
                if next(finite):
                    result["predictions"] = [
                        {"label": describe(index), "index": index, "probability": probability}
                        for index, probability in pairs
                    ]
                else:
                    result["error"] = "the network's logits for this image are not finite"
            if file.wanted:
                results.append((file.path, result))
        yield results


def choose_thresholds(network: Any, threshold: float | None) -> list[float]:
    """Return the threshold of each label: the least probability with which an image has it."""
    own = read_thresholds(network.pretrained_cfg, network.num_classes)
    if threshold is None and own is not None:
        return own
    return [THRESHOLD if threshold is None else threshold] * network.num_classes


def _choose_top(logits: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """Return index and probability of the most probable classes of each image (single-label: softmax)."""
    top = logits.softmax(-1).topk(min(count, logits.shape[-1]))
    columns = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [list(zip(indices, values, strict=True)) for indices, values in columns]


def _choose_probable(logits: Tensor, thresholds: Sequence[float]) -> list[list[tuple[int, float]]]:
    """Return index and probability of the labels at or above their thresholds, most probable first (sigmoid)."""
    probabilities, indices = logits.sigmoid().sort(descending=True)
    rows = zip(indices.tolist(), probabilities.tolist(), strict=True)
    return [
        [(index, probability) for index, probability in zip(*row, strict=True) if probability >= thresholds[index]]
        for row in rows
    ]


def fingerprint(network: Any, files: Iterable[Path] = ()) -> dict[str, Any]:
    """Return what a network's results depend on, as JSON values: hashes of weights and labels, and the preprocessing.

    Args:
        network: a module, or a `timm_tresnet.ExportedModel`.
        files: the files of an `ExportedModel`; hashed in place of a state dict.
    """
    weights = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            weights.update(hashlib.file_digest(file, "sha256").digest())
    if isinstance(network, torch.nn.Module):
        for name, tensor in network.state_dict().items():
            weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = network.pretrained_cfg
    names = list(map(label_lookup(network), range(network.num_classes)))
    labels = [names, is_multi_label(config), read_thresholds(config, network.num_classes)]
    return {
        "weights_sha256": weights.hexdigest(),
        "labels_sha256": hashlib.sha256(json.dumps(labels).encode()).hexdigest(),
        "preprocessing": resolve_preprocessing(network),
    }

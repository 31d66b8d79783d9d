"""Training checkpoints: written atomically, and checked completely before a training is resumed from one."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from timm_tresnet.conversion.reading import read_checkpoint, shorten_names
from timm_tresnet.tagging.module import NETWORKS, Tagger
from timm_tresnet.tagging.tasks import Classification
from timm_tresnet.utils.files import atomic_write
from timm_tresnet.utils.images import printable
from timm_tresnet.utils.schema import Kind, Table, choice, find_fault, integer, list_of, number
from timm_tresnet.utils.terminal import escape

_REAL = Kind("a number", lambda value: type(value) in (int, float))  # nan if no held-out image has the label
_MAPPING = Kind("a dict", lambda value: isinstance(value, dict))
_COUNT = integer(0, 2**62)
_PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "epoch", "global_step", "tagging")
_KINDS = {"global_step": _COUNT, **dict.fromkeys(("optimizer_states", "lr_schedulers"), list_of(_MAPPING, 1, 1))}
_LEFT_OUT = ("callbacks",)  # names the last checkpoint for removal, but the next one has the same name


class CheckpointError(ValueError):
    """A file is not a checkpoint of this training; the message says why."""


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, written atomically: a kill or a full disk leaves the old file or the new one.

    Args:
        find_fault: returns what is wrong with a checkpoint to resume from; None if nothing is.
    """

    def __init__(self, find_fault: Callable[[Mapping[str, Any]], str | None]) -> None:
        super().__init__()
        self._find_fault = find_fault

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with atomic_write(Path(path)) as unfinished:
            unfinished.write_bytes(content.getbuffer())

    def load_checkpoint(self, path: Any, *arguments: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            checkpoint = dict(read_checkpoint(Path(path)))
            fault = self._find_fault(checkpoint)
        except ValueError as error:
            fault = str(error)
        if fault:
            raise CheckpointError(f"{printable(Path(path))} is not a checkpoint of this training: {escape(fault)}")
        return {name: part for name, part in checkpoint.items() if name not in _LEFT_OUT}


def find_checkpoint_fault(
    checkpoint: Mapping[str, Any], tagger: Tagger, loops: Mapping[str, Any], images: int
) -> str | None:
    """Return why a training cannot resume from a checkpoint; None if it can.

    Args:
        checkpoint: content of the file.
        tagger: the module at the start of a training.
        loops: state of Lightning's loops at the start of a training.
        images: number of training images.
    """
    epochs = tagger.settings.epochs
    fault = find_fault(checkpoint, Table({**_KINDS, "epoch": integer(0, epochs - 1)}, _PARTS))
    if fault:
        return fault
    done = checkpoint["epoch"] + 1
    labels = tagger.network.num_classes
    figures = tagger.task.figures
    scores = Table(dict.fromkeys(figures, _REAL), figures)
    row = Table(
        {"epoch": integer(1, done), "loss": _REAL, "unreadable": _COUNT, **dict.fromkeys(NETWORKS, scores)},
        ("epoch", "loss", "unreadable", *NETWORKS),
    )
    best: dict[str, Kind | Table] = {
        "epoch": integer(1, done),
        "name": choice(*NETWORKS),
        figures[0]: _REAL,
        "scores": scores,
        "weights": _MAPPING,
    }
    if isinstance(tagger.task, Classification):
        best["accuracies"] = list_of(_REAL, labels, labels)
    else:
        best |= {
            "thresholds": list_of(number(0, 1), labels, labels),
            "average_precisions": list_of(_REAL, labels, labels),
        }
    tagging: dict[str, Kind | Table] = {
        "average": _MAPPING,
        "averaged_steps": _COUNT,
        "best": Table(best, tuple(best)),
        "history": list_of(Kind("an epoch's figures", lambda each: find_fault(each, row) is None), done, done),
        "unreadable": list_of(integer(0, images - 1), 0, images),
    }
    fault = find_fault(checkpoint["tagging"], Table(tagging, tuple(tagging)), "tagging")
    if fault:
        return fault
    network = tagger.network.state_dict()
    return (
        _find_difference(checkpoint["state_dict"], tagger.state_dict(), "state_dict")
        or _find_difference(checkpoint["tagging"]["average"], tagger.average.module.state_dict(), "tagging.average")
        or _find_difference(checkpoint["tagging"]["best"]["weights"], network, "tagging.best.weights")
        or _find_difference(checkpoint["loops"], loops, "loops")
        or _find_odd_epoch(checkpoint["loops"], done)
    )


def _find_difference(found: Any, expected: Any, name: str) -> str | None:
    """Return where a value differs in kind from the expected one: names, lengths, types, shapes, or sign."""
    if isinstance(expected, Tensor):
        same = isinstance(found, Tensor) and (found.shape, found.dtype) == (expected.shape, expected.dtype)
        needed = f"{tuple(expected.shape)}, {expected.dtype}"
        got = f"{tuple(found.shape)}, {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        return None if same else f"needs {name} to be a tensor of {needed}, got {got}"
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping):
            return f"needs {name} to be a dict, got {type(found).__name__}"
        if found.keys() != expected.keys():
            missing, unexpected = (
                shorten_names(sorted(map(str, names))[:3])
                for names in (expected.keys() - found, found.keys() - expected)
            )
            return f"has {name} of another training: missing {missing}, unexpected {unexpected}, and perhaps more"
        parts = (_find_difference(found[each], expected[each], f"{name}.{each}") for each in found)
        return next(filter(None, parts), None)
    count = type(expected) in (int, float) and type(found) in (int, float) and found >= 0
    if type(found) is not type(expected) and not count:
        return f"needs {name} to be of type {type(expected).__name__}, got {type(found).__name__}"
    if type(expected) in (int, float) and not count:
        return f"needs {name} to be a number from 0, got {found}"
    return None


def _find_odd_epoch(loops: Mapping[str, Any], done: int) -> str | None:
    processed = loops["fit_loop"]["epoch_progress"]["current"]["processed"]
    return None if processed == done else f"needs its loops to have processed {done} epochs, got {processed}"

"""Lines and the progress bar that a training shows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import TQDMProgressBar

from timm_tresnet.tagging.settings import TrainingSettings
from timm_tresnet.utils.images import printable


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with the mean loss of the epoch so far."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10)  # steps; on a GPU, reading the loss waits for it

    def get_metrics(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # of the log
        return {**metrics, "loss": f"{pl_module.mean_loss:.3f}"}


def describe_start(
    network: Any,
    settings: TrainingSettings,
    images: tuple[int, int],
    image_size: int,
    device: str,
    processes: int,
    work: Path,
) -> Iterator[str]:
    """Yield lines that describe a training before it starts.

    Args:
        network: the network to train.
        settings: the training settings.
        images: number of training images and of held-out images.
        image_size: side of the images, in pixels.
        device: "auto", "cpu", "cuda" or "mps".
        processes: number of training processes.
        work: folder of the checkpoints.
    """
    share = -(-images[0] // processes)
    batch = min(settings.batch_size, share)
    yield (
        f"{images[0]} training images, {images[1]} held out, {network.num_classes} labels; {settings.epochs} epochs "
        f"of {share // batch} batches of {batch * processes}"
    )
    parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    start = "random weights" if settings.from_scratch else f"the weights {settings.model}"
    architecture = network.pretrained_cfg["architecture"]
    yield f"{architecture} with {parameters:.2f} M parameters, from {start}, at {image_size}x{image_size} pixels"
    chosen = choose_device(device)
    times = f", {processes} processes" if processes > 1 else ""
    yield (
        f"{settings.opt}, learning rate {settings.lr:g}, {settings.sched}; {choose_precision(settings, chosen)} on "
        f"{chosen}{times}; checkpoints go into {printable(work)}"
    )


def choose_device(device: str) -> str:
    """Return the named device; for "auto", the best one that this machine has."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def choose_precision(settings: TrainingSettings, device: str) -> str:
    """Return the precision of the settings; by default that of official training, which uses autocast on a GPU."""
    return settings.precision or ("16-mixed" if device == "cuda" else "32-true")

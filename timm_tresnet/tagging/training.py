"""Train a network on annotations and write a folder that timm loads."""

import contextlib
import csv
import dataclasses
import functools
import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import timm.data
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from timm_tresnet.conversion.reading import shorten_names
from timm_tresnet.conversion.writing import check_free
from timm_tresnet.tagging.annotations import Annotations
from timm_tresnet.tagging.card import Training
from timm_tresnet.tagging.class_card import ClassTraining
from timm_tresnet.tagging.data import LabelledImages, make_loader
from timm_tresnet.tagging.folders import hold_out_of_each
from timm_tresnet.tagging.losses import LabelLoss, order_numbers, weigh_positives
from timm_tresnet.tagging.module import Tagger
from timm_tresnet.tagging.progress import ProgressBar, choose_device, choose_precision, describe_start
from timm_tresnet.tagging.resuming import AtomicCheckpoints, CheckpointError, find_checkpoint_fault
from timm_tresnet.tagging.settings import ClassSettings, Settings, TrainingSettings
from timm_tresnet.tagging.start import make_network, make_pretrained_cfg
from timm_tresnet.tagging.transforms import make_class_transform, make_transform
from timm_tresnet.tagging.writing import TrainedNetwork, write_tagger
from timm_tresnet.utils.errors import summarise
from timm_tresnet.utils.files import atomic_write
from timm_tresnet.utils.images import printable
from timm_tresnet.utils.schema import format_value, read_json

_RUN = "run.json"
_CHECKPOINT = "last.ckpt"
PRIOR = "prior.csv"


@dataclasses.dataclass(frozen=True)
class TrainingFolder:
    """Where a training writes.

    Args:
        output: folder of the result.
        resume: resume an unfinished training, if there is one.
        overwrite: replace files of an earlier training.
    """

    output: Path
    resume: bool = False
    overwrite: bool = False

    @property
    def work(self) -> Path:
        """Folder of checkpoints and logs."""
        return self.output.with_name(self.output.name + ".training")

    @property
    def checkpoint(self) -> Path:
        """Checkpoint of the last epoch, from which a training resumes."""
        return self.work / _CHECKPOINT


def count_processes() -> int:
    """Return the number of processes that `torchrun` started for this training."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process writes files and prints."""
    return os.environ.get("RANK", "0") == "0"


def train_network(
    training: Annotations,
    measuring: Annotations | None,
    settings: TrainingSettings,
    folder: TrainingFolder,
    *,
    device: str = "auto",
    workers: int = 0,
    command: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Train a network on images, and write a folder for `timm.create_model('local-dir:FOLDER', pretrained=True)`.

    Args:
        training: the training images.
        measuring: validation images, which choose the best epoch and the thresholds; None to hold out some training
            images.
        settings: the training settings; `ClassSettings` if each image has one label, its class.
        folder: where to write.
        device: "auto", "cpu", "cuda" or "mps".
        workers: processes that read images, for each training process.
        command: the command to name in the model card; "" for none.
        say: called with each line of progress.

    Returns:
        The folder of the result.

    Raises:
        OSError: if a file cannot be written.
        ValueError: if the settings, the data and an existing training do not fit together.
    """
    multi_label = not isinstance(settings, ClassSettings)
    if measuring is None:
        hold = hold_out if multi_label else hold_out_of_each
        training, measuring = hold(training, settings.held_out, settings.seed)
    finished = folder.resume and not folder.overwrite and folder.checkpoint.exists() and _holds_result(folder.output)
    if not finished:
        check_free(folder.output, folder.overwrite)
    torch.manual_seed(settings.seed)
    network, model_args = make_network(
        settings.model,
        settings.model_args,
        training.names,
        pretrained=not settings.from_scratch,
        multi_label=multi_label,
    )
    pretrained_cfg = make_pretrained_cfg(network, settings.image_size, squash=multi_label)
    _check_runs(network, pretrained_cfg)
    if settings.channels_last:
        network.to(memory_format=torch.channels_last)
    data = _make_data_sets(training, measuring, settings, pretrained_cfg)
    if training.partial and isinstance(settings, Settings):
        say(_describe_known(data["training"], training, settings))
    _check_positives(data["measuring"])
    processes, process = count_processes(), int(os.environ.get("RANK", "0"))
    if process == 0:
        _prepare_folder(
            folder, {"settings": dataclasses.asdict(settings), "processes": processes, **_fingerprint(data)}
        )
    if finished:
        say(f"{printable(folder.output)} is already finished with these settings; train again with --overwrite")
        return folder.output
    checkpoint = folder.checkpoint if folder.resume and folder.checkpoint.exists() else None
    if checkpoint:
        say(f"resuming from {printable(checkpoint)}")

    counts, size = (len(data["training"]), len(data["measuring"])), pretrained_cfg["input_size"][-1]
    for line in describe_start(network, settings, counts, size, device, processes, folder.work):
        say(line)
    loss = _make_loss(settings, data["training"], training.names) if isinstance(settings, Settings) else None
    tagger = Tagger(network, settings, len(data["measuring"]), loss)
    with _quiet():
        trainer = _make_trainer(settings, folder, device, processes, say, tagger, len(data["training"]))
        loaders = {
            name: make_loader(
                images, settings.batch_size, name == "training", workers, process, processes, settings.seed
            )
            for name, images in data.items()
        }
        try:
            trainer.fit(tagger, loaders["training"], loaders["measuring"], ckpt_path=checkpoint, weights_only=True)
        # Lightning and PyTorch raise any of these for parts of a checkpoint that were not checked.
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            if checkpoint is None or tagger.stepped or isinstance(error, CheckpointError):
                raise
            raise ValueError(
                f"cannot resume from {printable(checkpoint)}: {summarise(error)}; start again with --overwrite"
            ) from error
    if process == 0:
        if training.partial:
            _write_prior(tagger, training.names, folder.work / PRIOR)
        tagged = _summarise(tagger, model_args, pretrained_cfg, data, training, measuring, command)
        write_tagger(tagged, folder.output, tagger.network, folder.overwrite)
        for line in _describe_result(tagger, data, folder.output):
            say(line)
    return folder.output


def hold_out(annotations: Annotations, share: float, seed: int) -> tuple[Annotations, Annotations]:
    """Hold out a random share of the images, at least one; return the training and the held-out images.

    Raises:
        ValueError: if there are too few images.
    """
    count = max(1, round(share * len(annotations.examples)))
    if len(annotations.examples) <= count:
        raise ValueError(
            f"{annotations.display_name} has {len(annotations.examples)} images, too few to hold {count} of them out; "
            "give validation images with --val"
        )
    order = torch.randperm(len(annotations.examples), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out, kept = sorted(order[:count]), sorted(order[count:])
    first, second = (
        dataclasses.replace(annotations, examples=tuple(annotations.examples[index] for index in indices))
        for indices in (kept, held_out)
    )
    return first, second


def _check_runs(network: nn.Module, pretrained_cfg: dict[str, Any]) -> None:
    """Refuse an image size that the network cannot take, before the data is read."""
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(1, *pretrained_cfg["input_size"]))
    except (RuntimeError, ValueError) as error:
        size = pretrained_cfg["input_size"][-1]
        raise ValueError(f"the network cannot be run on images of {size}x{size} pixels: {summarise(error)}") from error
    network.train()


def _make_data_sets(
    training: Annotations, measuring: Annotations, settings: TrainingSettings, pretrained_cfg: dict[str, Any]
) -> dict[str, LabelledImages]:
    size = pretrained_cfg["input_size"][-1]
    augmenting: Callable[[Any], torch.Tensor]
    if isinstance(settings, Settings):
        augmenting = make_transform(
            size, pretrained_cfg["mean"], pretrained_cfg["std"], settings.cutout, settings.randaugment
        )
    else:
        augmenting = make_class_transform(pretrained_cfg, cast(ClassSettings, settings))
    # The preprocessing of `timm-tresnet classify`, so that the thresholds fit its inputs
    plain = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=pretrained_cfg))
    names = training.names
    return {
        "training": LabelledImages(training.examples, names, augmenting, size, settings.seed),
        "measuring": LabelledImages(measuring.examples, names, plain, size),
    }


def _check_positives(images: LabelledImages) -> None:
    present, absent = images.count_labels(), images.count_absent()
    if not ((present > 0) & ((absent > 0) | (present == len(images)))).any():  # as `find_measurable` has it
        raise ValueError(
            "validation needs a label that some images have and, unless it is known for all images, that some lack; "
            "got none; hold out more images, or give others with --val"
        )


def _describe_known(images: LabelledImages, training: Annotations, settings: Settings) -> str:
    known = int(images.count_labels().sum() + images.count_absent().sum())
    share = known / (len(images) * len(training.names))
    return (
        f"{training.display_name}: {share:.1%} of all labels of all images are known, others --unknown "
        f"{settings.unknown}"
    )


def _make_loss(settings: Settings, images: LabelledImages, names: Sequence[str]) -> LabelLoss:
    weights = settings.pos_weight
    if isinstance(weights, str):
        pos_weight: Tensor | None = weigh_positives(images.count_labels(), images.count_absent())
    else:
        pos_weight = order_numbers(weights, names)
    return LabelLoss(settings, pos_weight, order_numbers(settings.prior, names))


def _write_prior(tagger: Tagger, names: Sequence[str], path: Path) -> None:
    prior = (tagger.predicted_sum / max(tagger.predicted_count, 1)).tolist()
    with atomic_write(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["label", "prior"])
        rows.writerows(zip(names, prior, strict=True))


def _fingerprint(data: dict[str, LabelledImages]) -> dict[str, str]:
    return {f"{name} images": images.fingerprint() for name, images in data.items()}


def _prepare_folder(folder: TrainingFolder, run: dict[str, Any]) -> None:
    """Make the folder of checkpoints; when resuming, check that it belongs to the same training."""
    note = folder.work / _RUN
    before = read_json(note) if note.exists() else None
    if before is not None and folder.resume:
        differing = _find_differences(before, run)
        if differing:
            raise ValueError(
                f"{printable(folder.work)} has a training with other {shorten_names(differing)}; resume it with the "
                "settings and data that it was started with, or start again with --overwrite"
            )
        return
    if folder.work.exists() and any(folder.work.iterdir()):
        if not folder.overwrite:
            raise FileExistsError(
                f"{printable(folder.work)} has an earlier training; resume it with --resume, or start again with "
                "--overwrite"
            )
        shutil.rmtree(folder.work)
    folder.work.mkdir(parents=True, exist_ok=True)
    with atomic_write(note) as unfinished:
        unfinished.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def _find_differences(before: Any, now: dict[str, Any]) -> list[str]:
    """Return the names of differing settings with both values, and of differing data sets."""
    now = json.loads(json.dumps(now))  # tuples become lists
    before = before if isinstance(before, dict) else {}
    settings = before.get("settings") if isinstance(before.get("settings"), dict) else {}
    pairs = {name: (settings.get(name), value) for name, value in now["settings"].items()}
    pairs |= {name: (before.get(name), value) for name, value in now.items() if name != "settings"}
    return [
        name if name.endswith(" images") else f"{name} ({format_value(old)}, now {format_value(new)})"
        for name, (old, new) in pairs.items()
        if old != new
    ]


class _EpochReporter(Callback):
    """Prints a line after each epoch and, after an interrupt, how to resume."""

    def __init__(self, epochs: int, say: Callable[[str], None]) -> None:
        self._epochs = epochs
        self._say = say

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        row, figure = pl_module.history[-1], pl_module.task.figures[0]
        if not math.isfinite(row["loss"]):
            raise ValueError(
                f"the loss is not finite in epoch {row['epoch']}; use a lower --lr, or --precision 32-true"
            )
        self._say(
            f"epoch {row['epoch']}/{self._epochs}: loss {row['loss']:.3f}, {figure} {row['network'][figure]:.2f}, "
            f"moving average {row['average'][figure]:.2f}"
        )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self._say("interrupted; continue after the last finished epoch with --resume")


def _make_trainer(
    settings: TrainingSettings,
    folder: TrainingFolder,
    device: str,
    processes: int,
    say: Callable[[str], None],
    tagger: Tagger,
    images: int,
) -> pl.Trainer:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    bar = is_first_process() and sys.stderr.isatty()

    def find_resuming_fault(checkpoint: Mapping[str, Any]) -> str | None:
        loops = {
            f"{name}_loop": getattr(trainer, f"{name}_loop").state_dict()
            for name in ("fit", "validate", "test", "predict")
        }
        return find_checkpoint_fault(checkpoint, tagger, loops, images)

    precision: Any = choose_precision(settings, choose_device(device))  # one of the names that Lightning lists
    make = functools.partial(
        pl.Trainer,
        accelerator=device,
        devices=local,
        num_nodes=processes // local,
        strategy="ddp" if processes > 1 else "auto",
        precision=precision,
        max_epochs=settings.epochs,
        accumulate_grad_batches=settings.accumulate,
        sync_batchnorm=settings.sync_bn,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        enable_model_summary=False,
        enable_progress_bar=bar,
        plugins=[AtomicCheckpoints(find_resuming_fault)],
        logger=CSVLogger(folder.work, name="", version=None),
        callbacks=[
            _EpochReporter(settings.epochs, say),
            ModelCheckpoint(
                folder.work,
                filename=folder.checkpoint.stem,
                save_top_k=1,
                save_on_train_epoch_end=True,
                enable_version_counter=False,
            ),
            *([ProgressBar()] if bar else []),
        ],
        default_root_dir=folder.work,
    )
    try:
        trainer = make()
        return trainer
    except MisconfigurationException as error:
        raise ValueError(f"this machine cannot train with these settings: {error}") from error


_ADVICE = (  # Lightning's warnings that do not apply here
    "The '.*_dataloader' does not have many workers",
    "The number of training batches",
    "Checkpoint directory .* exists and is not empty",
    "(GPU|MPS) available but not used",
    ".*LeafSpec.* is deprecated",  # Lightning uses PyTorch's old name
)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's information and the warnings in `_ADVICE`."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _ADVICE:
                warnings.filterwarnings("ignore", message=f".*{message}")
            yield
    finally:
        logger.setLevel(before)


def _summarise(
    tagger: Tagger,
    model_args: dict[str, Any],
    pretrained_cfg: dict[str, Any],
    data: dict[str, LabelledImages],
    training: Annotations,
    measuring: Annotations,
    command: str,
) -> TrainedNetwork:
    best: Any = tagger.best  # not None after an epoch
    trained: Any = {
        "labels": training.names,
        "scores": best["scores"],
        "label_counts": data["training"].count_labels().tolist(),
        "images": (len(data["training"]), len(data["measuring"])),
        "data": (training.display_name, measuring.display_name),
        "settings": tagger.settings,
        "head": model_args.get("head", "linear"),
        "epoch": best["epoch"],
        "averaged": best["name"] == "average",
        "command": command,
    }
    if isinstance(tagger.settings, ClassSettings):
        trained = ClassTraining(accuracies=best["accuracies"], pretrained_cfg=pretrained_cfg, **trained)
    else:
        trained = Training(
            thresholds=best["thresholds"],
            average_precisions=best["average_precisions"],
            image_size=pretrained_cfg["input_size"][-1],
            **trained,
        )
    return TrainedNetwork(
        architecture=tagger.network.pretrained_cfg["architecture"],
        model_args=model_args,
        pretrained_cfg=pretrained_cfg,
        weights=best["weights"],
        training=trained,
    )


def _holds_result(output: Path) -> bool:
    return (output / "config.json").exists() and (output / "model.safetensors").exists()


def _describe_result(tagger: Tagger, data: dict[str, LabelledImages], output: Path) -> Iterator[str]:
    best: Any = tagger.best  # not None after an epoch
    kind = "the moving average" if best["name"] == "average" else "the weights"
    scores = ", ".join(f"{name} {value:.2f}" for name, value in best["scores"].items())
    yield f"{printable(output)}: {kind} of epoch {best['epoch']}; on the held-out images: {scores}"
    if tagger.unreadable:
        shown = shorten_names(printable(data["training"].paths[index]) for index in sorted(tagger.unreadable))
        yield f"skipped {len(tagger.unreadable)} unreadable training images: {shown}"
    if tagger.history[-1]["unreadable"]:
        shown = shorten_names(printable(data["measuring"].paths[index]) for index in sorted(tagger.unmeasured))
        named = f": {shown}" if shown else ""  # not known if the resumed training had no epoch left
        yield f"skipped {tagger.history[-1]['unreadable']} unreadable validation images{named}"

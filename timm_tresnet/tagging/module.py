"""The LightningModule: a network, its loss, its moving average, and validation after each epoch."""

from typing import Any

import lightning.pytorch as pl
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from timm_tresnet.tagging.data import mix_seed
from timm_tresnet.tagging.settings import ClassSettings, Settings, TrainingSettings
from timm_tresnet.tagging.tasks import make_task

NETWORKS = ("network", "average")  # both are validated: the trained weights and their moving average
_LEAST_CYCLE = 10  # steps; PyTorch divides by zero if a fifth of a cycle is one step


class Tagger(pl.LightningModule):
    """A network in training.

    After each epoch, the network and its moving average are validated on the held-out images. The better one is stored
    if it is the best so far, as in official training (`validate_multi` in train.py of ASL and ML_Decoder). The best
    weights are part of the checkpoint, so one file has everything.

    Args:
        network: returns logits (N, labels).
        settings: the training settings.
        held_out: number of held-out images.
        loss: loss of logits and targets, summed over images; None for the loss of the settings.
    """

    network: Any  # has timm's attributes, such as num_classes
    average: ModelEmaV3
    loss: nn.Module

    def __init__(
        self, network: nn.Module, settings: TrainingSettings, held_out: int, loss: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.settings = settings
        self.held_out = held_out
        self.task = make_task(settings)
        self.loss = loss or self.task.make_loss()
        # Not a submodule: DistributedDataParallel and Lightning must not see the average.
        self._warms_up = isinstance(settings, ClassSettings)  # taggers' official training has no warmup of the average
        self.__dict__["average"] = ModelEmaV3(network, decay=settings.ema_decay, use_warmup=self._warms_up)
        self.best: dict[str, Any] | None = None
        self.history: list[dict[str, Any]] = []
        self.unreadable: set[int] = set()  # indices of training images
        self.unmeasured: list[int] = []  # indices of held-out images that were unreadable in the last epoch
        self.stepped = False  # whether this process has made a step, which shows that the resumed state fits
        self._averaged_steps = 0
        self._loss_sum, self._loss_count = torch.zeros(()), 0
        # Mean predicted probability of each label in training: the prior estimate of arXiv:2110.10955.
        self.predicted_sum, self.predicted_count = torch.zeros(int(network.num_classes)), 0  # type: ignore[arg-type]
        self._predicted = torch.zeros_like(self.predicted_sum)
        self._measured: list[dict[str, Tensor]] = []

    def configure_optimizers(self) -> Any:
        settings = self.settings
        # Adam without weight decay of biases and norms; official: `add_weight_decay`, timm: `filter_bias_and_bn`
        optimizer = create_optimizer_v2(
            self.network, opt=settings.opt, lr=settings.lr, weight_decay=settings.weight_decay, filter_bias_and_bn=True
        )
        steps = int(self.trainer.estimated_stepping_batches)
        if settings.sched == "onecycle":  # timm has no such schedule
            scheduler: Any = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=settings.lr, total_steps=max(steps, _LEAST_CYCLE), pct_start=0.2
            )
        else:
            scheduler, _ = create_scheduler_v2(
                optimizer,
                sched=settings.sched,
                num_epochs=settings.epochs,
                min_lr=settings.min_lr if isinstance(settings, ClassSettings) else 0,
                warmup_epochs=settings.warmup_epochs,
                step_on_epochs=False,
                updates_per_epoch=-(-steps // settings.epochs),
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
            scheduler.step()
        else:
            scheduler.step_update(self.global_step)

    def on_fit_start(self) -> None:
        self.average.module.to(self.device)

    def on_train_epoch_start(self) -> None:
        self._loss_sum, self._loss_count = torch.zeros((), device=self.device), 0
        self._predicted = torch.zeros(self.predicted_sum.shape, device=self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout then depends on the step alone, so a resumed run draws the same masks.
        torch.manual_seed(mix_seed(self.settings.seed, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        readable = batch["readable"]
        logits = self.network(batch["image"]).float()  # out of autocast, as in official training
        loss = self.loss(logits[readable], batch["target"][readable])
        if not readable.all():
            self.unreadable.update(batch["index"][~readable].tolist())
        self._loss_sum += loss.detach()
        if isinstance(self.settings, Settings):
            self._predicted += logits[readable].detach().sigmoid().sum(0)
        count = int(readable.sum())
        self._loss_count += count
        return loss / max(1, count) if self.task.averages_loss else loss

    @property
    def mean_loss(self) -> float:
        """Mean loss of an image in this epoch so far."""
        return (self._loss_sum / max(1, self._loss_count)).item()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.stepped = True
        if self.global_step > self._averaged_steps:  # not while gradients accumulate
            self._averaged_steps = self.global_step
            self.average.update(self.network, self.global_step if self._warms_up else None)

    def on_validation_start(self) -> None:
        if self.trainer.world_size > 1:  # running statistics differ between processes; use those of the first
            for network in (self.network, self.average.module):
                for buffer in network.buffers():
                    torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        measured = {name: batch[name] for name in ("index", "readable", "target")}
        for name, network in zip(NETWORKS, (self.network, self.average.module), strict=True):
            measured[name] = self.task.compute_outputs(network(batch["image"]).float())
        self._measured.append(measured)

    def on_validation_epoch_end(self) -> None:
        measured = {
            name: self._gather(torch.cat([part[name] for part in self._measured])) for name in self._measured[0]
        }
        self._measured.clear()
        loss = self._gather(torch.stack([self._loss_sum, torch.full_like(self._loss_sum, self._loss_count)])[None]).sum(
            0
        )
        self.predicted_sum = self.predicted_sum + self._gather(self._predicted[None]).sum(0)
        self.predicted_count += int(loss[1])
        if not loss[1]:
            raise ValueError("none of the training images can be read")
        row: dict[str, Any] = {"epoch": self.current_epoch + 1, "loss": (loss[0] / loss[1]).item()}
        first = torch.zeros(self.held_out, dtype=torch.bool)  # some images are validated by two processes; use one
        positions = torch.empty(self.held_out, dtype=torch.long)
        positions[measured["index"]] = torch.arange(len(measured["index"]))
        first[measured["index"]] = True
        kept = positions[first]
        readable = measured["readable"][kept]
        self.unmeasured = measured["index"][kept[~readable]].tolist()
        kept = kept[readable]
        row["unreadable"] = len(self.unmeasured)
        targets = measured["target"][kept]
        for name in NETWORKS:
            row[name] = self.task.score(measured[name][kept], targets)
        self._store_best(row, {name: measured[name][kept] for name in NETWORKS}, targets)
        self.history.append(row)
        self.log_dict(
            {"loss": row["loss"], **{f"{name}_{key}": row[name][key] for name in NETWORKS for key in row[name]}}
        )

    def _gather(self, values: Tensor) -> Tensor:
        """Gather the rows of all processes, on the CPU."""
        gathered: Any = self.all_gather(values)
        return (gathered.flatten(0, 1) if gathered.dim() > values.dim() else gathered).cpu()

    def _store_best(self, row: dict[str, Any], outputs: dict[str, Tensor], targets: Tensor) -> None:
        figure = self.task.figures[0]
        name = max(NETWORKS, key=lambda each: row[each][figure])
        if self.best is not None and not row[name][figure] > self.best[figure]:
            return
        network = self.network if name == "network" else self.average.module
        self.best = {
            "epoch": row["epoch"],
            "name": name,
            figure: row[name][figure],
            **self.task.summarise(outputs[name], targets),
            "weights": {key: value.detach().cpu().clone() for key, value in network.state_dict().items()},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tagging"] = {
            "average": self.average.module.state_dict(),
            "averaged_steps": self._averaged_steps,
            "best": self.best,
            "history": self.history,
            "unreadable": sorted(self.unreadable),
            "predicted": (self.predicted_sum, self.predicted_count),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint["tagging"]
        self.average.module.load_state_dict(kept["average"])
        self._averaged_steps = kept["averaged_steps"]
        self.best, self.history, self.unreadable = kept["best"], kept["history"], set(kept["unreadable"])
        self.predicted_sum, self.predicted_count = kept["predicted"]

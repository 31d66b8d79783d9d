"""What Lightning trains: a network, its loss, its moving average, and what is measured after each epoch."""

from typing import Any

import lightning.pytorch as pl
import torch
from timm.loss import AsymmetricLossMultiLabel
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from timm_tresnet.tagging.data import mix_seed
from timm_tresnet.tagging.scores import average_precisions, choose_thresholds, score
from timm_tresnet.tagging.settings import Settings

NETWORKS = ("network", "average")  # what is measured: as it is trained, and its moving average
_LEAST_CYCLE = 10  # steps; PyTorch divides by zero where a fifth of a cycle is one step
_THRESHOLD = 0.5  # of CF1 and OF1 during training, as in arXiv:1904.03582


def make_loss(settings: Settings) -> nn.Module:
    """The loss of logits (N, labels) and targets of 0 or 1, summed over both, as official training sums it."""
    if settings.loss == "bce":
        return nn.BCEWithLogitsLoss(reduction="sum")
    return AsymmetricLossMultiLabel(
        gamma_neg=settings.gamma_neg,
        gamma_pos=settings.gamma_pos,
        clip=settings.clip,
        disable_torch_grad_focal_loss=True,  # train.py of ASL and ML_Decoder
        reduction="sum",  # AsymmetricLoss there
    )


class Tagger(pl.LightningModule):
    """A network in training.

    After each epoch, the network and its moving average tag the held-out images, and the better of the two is kept if
    it is the best so far, as in official training (`validate_multi` in train.py of ASL and ML_Decoder). What is kept is
    in the checkpoint, so that one file has all.

    Args:
        network: gives logits (N, labels).
        settings: of the training.
        held_out: number of held-out images.
    """

    average: ModelEmaV3
    loss: nn.Module

    def __init__(self, network: nn.Module, settings: Settings, held_out: int) -> None:
        super().__init__()
        self.network = network
        self.settings = settings
        self.held_out = held_out
        self.loss = make_loss(settings)
        # Not a submodule: neither DistributedDataParallel nor Lightning's modes and devices are to see it.
        self.__dict__["average"] = ModelEmaV3(network, decay=settings.ema_decay)
        self.best: dict[str, Any] | None = None
        self.history: list[dict[str, Any]] = []
        self.unreadable: set[int] = set()  # indices of training images
        self._averaged_steps = 0
        self._loss_sum, self._loss_count = torch.zeros(()), 0
        self._measured: list[dict[str, Tensor]] = []

    def configure_optimizers(self) -> Any:
        settings = self.settings
        # Adam, and no decay of biases and norms: `add_weight_decay` there, `filter_bias_and_bn` here
        optimizer = create_optimizer_v2(
            self.network, opt=settings.opt, lr=settings.lr, weight_decay=settings.weight_decay, filter_bias_and_bn=True
        )
        steps = int(self.trainer.estimated_stepping_batches)
        if settings.sched == "onecycle":  # timm has none
            scheduler: Any = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=settings.lr, total_steps=max(steps, _LEAST_CYCLE), pct_start=0.2
            )
        else:
            scheduler, _ = create_scheduler_v2(
                optimizer,
                sched=settings.sched,
                num_epochs=settings.epochs,
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

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout then depends on the step alone, in a run that is resumed too.
        torch.manual_seed(mix_seed(self.settings.seed, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        readable = batch["readable"]
        logits = self.network(batch["image"]).float()  # out of autocast, as in official training
        loss = self.loss(logits[readable], batch["target"][readable])
        if not readable.all():
            self.unreadable.update(batch["index"][~readable].tolist())
        self._loss_sum += loss.detach()
        self._loss_count += int(readable.sum())
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step > self._averaged_steps:  # not while gradients accumulate
            self._averaged_steps = self.global_step
            self.average.update(self.network)

    def on_validation_start(self) -> None:
        if self.trainer.world_size > 1:  # running statistics are each process's own; those of the first are kept
            for network in (self.network, self.average.module):
                for buffer in network.buffers():
                    torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        measured = {name: batch[name] for name in ("index", "readable", "target")}
        for name, network in zip(NETWORKS, (self.network, self.average.module), strict=True):
            measured[name] = network(batch["image"]).float().sigmoid()
        self._measured.append(measured)

    def on_validation_epoch_end(self) -> None:
        measured = {
            name: self._gather(torch.cat([part[name] for part in self._measured])) for name in self._measured[0]
        }
        self._measured.clear()
        loss = self._gather(torch.stack([self._loss_sum, torch.full_like(self._loss_sum, self._loss_count)])[None]).sum(
            0
        )
        if not loss[1]:
            raise ValueError("none of the images to train on can be read")
        row: dict[str, Any] = {"epoch": self.current_epoch + 1, "loss": (loss[0] / loss[1]).item()}
        first = torch.zeros(self.held_out, dtype=torch.bool)  # of each image; some are measured by two processes
        positions = torch.empty(self.held_out, dtype=torch.long)
        positions[measured["index"]] = torch.arange(len(measured["index"]))
        first[measured["index"]] = True
        kept = positions[first]
        kept = kept[measured["readable"][kept]]
        row["unreadable"] = self.held_out - len(kept)
        targets = measured["target"][kept]
        for name in NETWORKS:
            row[name] = score(measured[name][kept], targets, _THRESHOLD)
        self._keep_best(row, {name: measured[name][kept] for name in NETWORKS}, targets)
        self.history.append(row)
        self.log_dict(
            {"loss": row["loss"], **{f"{name}_{key}": row[name][key] for name in NETWORKS for key in row[name]}}
        )

    def _gather(self, values: Tensor) -> Tensor:
        """Rows of all processes, on the CPU."""
        gathered: Any = self.all_gather(values)
        return (gathered.flatten(0, 1) if gathered.dim() > values.dim() else gathered).cpu()

    def _keep_best(self, row: dict[str, Any], probabilities: dict[str, Tensor], targets: Tensor) -> None:
        name = max(NETWORKS, key=lambda each: row[each]["mAP"])
        if self.best is not None and not row[name]["mAP"] > self.best["mAP"]:
            return
        network = self.network if name == "network" else self.average.module
        thresholds = choose_thresholds(probabilities[name], targets)
        self.best = {
            "epoch": row["epoch"],
            "name": name,
            "mAP": row[name]["mAP"],
            "scores": score(probabilities[name], targets, torch.tensor(thresholds)),
            "thresholds": thresholds,
            "average_precisions": average_precisions(probabilities[name], targets).tolist(),
            "weights": {key: value.detach().cpu().clone() for key, value in network.state_dict().items()},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tagging"] = {
            "average": self.average.module.state_dict(),
            "averaged_steps": self._averaged_steps,
            "best": self.best,
            "history": self.history,
            "unreadable": sorted(self.unreadable),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint["tagging"]
        self.average.module.load_state_dict(kept["average"])
        self._averaged_steps = kept["averaged_steps"]
        self.best, self.history, self.unreadable = kept["best"], kept["history"], set(kept["unreadable"])

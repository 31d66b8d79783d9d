"""The two tasks, tagging and classification: each has its loss and its metrics."""

from typing import Any, Protocol, cast

import torch
from timm.utils import accuracy
from torch import Tensor, nn

from timm_tresnet.tagging.losses import LabelLoss
from timm_tresnet.tagging.scores import average_precisions, choose_thresholds, score
from timm_tresnet.tagging.settings import ClassSettings, Settings, TrainingSettings

_THRESHOLD = 0.5  # for CF1 and OF1 during training, as in arXiv:1904.03582


class Task(Protocol):
    """A kind of prediction, with its loss and metrics.

    Attributes:
        figures: names of the metrics, in percent; the first one chooses the best epoch.
        averages_loss: whether the loss of a batch is the mean over its images, not the sum.
    """

    figures: tuple[str, ...]
    averages_loss: bool

    def make_loss(self) -> nn.Module:
        """Make the loss: logits (N, labels) and targets (N, labels) -> (), summed over images."""
        ...

    def compute_outputs(self, logits: Tensor) -> Tensor:
        """Turn logits (N, labels) into the outputs (N, labels) that the metrics are computed from."""
        ...

    def score(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Compute the metrics of outputs (N, labels) and targets (N, labels)."""
        ...

    def summarise(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """Return what is stored with the best weights: "scores", and thresholds or accuracies."""
        ...


class Tagging:
    """Any number of labels an image, each with a sigmoid and a threshold of its own."""

    figures: tuple[str, ...] = ("mAP", "CF1", "OF1")
    averages_loss = False  # as in official training

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def make_loss(self) -> nn.Module:
        return LabelLoss(self._settings)

    def compute_outputs(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def score(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return score(outputs, targets, _THRESHOLD)

    def summarise(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        thresholds = choose_thresholds(outputs, targets)
        return {
            "scores": score(outputs, targets, torch.tensor(thresholds)),
            "thresholds": thresholds,
            "average_precisions": average_precisions(outputs, targets).tolist(),
        }


class Classification:
    """One class an image, by a softmax."""

    figures: tuple[str, ...] = ("top-1", "top-5")
    averages_loss = True  # as in timm's train.py

    def __init__(self, settings: ClassSettings) -> None:
        self._settings = settings

    def make_loss(self) -> nn.Module:
        return nn.CrossEntropyLoss(label_smoothing=self._settings.smoothing, reduction="sum")

    def compute_outputs(self, logits: Tensor) -> Tensor:
        return logits  # a softmax could round different values to equal ones

    def score(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        if not len(outputs):
            return dict.fromkeys(self.figures, float("nan"))
        top1, top5 = accuracy(outputs, targets.argmax(1), topk=(1, 5))
        return {"top-1": top1.item(), "top-5": top5.item()}

    def summarise(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        right = (outputs.argmax(1) == targets.argmax(1))[:, None] * targets
        accuracies = right.sum(0) / targets.sum(0)  # nan where no image has the class
        return {"scores": self.score(outputs, targets), "accuracies": accuracies.tolist()}


def make_task(settings: TrainingSettings) -> Task:
    """Make the task for the settings' class."""
    return Classification(settings) if isinstance(settings, ClassSettings) else Tagging(cast(Settings, settings))

"""What differs between images with any number of labels and images of one class: the loss, and what is measured."""

from typing import Any, Protocol, cast

import torch
from timm.utils import accuracy
from torch import Tensor, nn

from timm_tresnet.tagging.losses import LabelLoss
from timm_tresnet.tagging.scores import average_precisions, choose_thresholds, score
from timm_tresnet.tagging.settings import ClassSettings, Settings, TrainingSettings

_THRESHOLD = 0.5  # of CF1 and OF1 during training, as in arXiv:1904.03582


class Task(Protocol):
    """What an image is to be told.

    Attributes:
        figures: names of what is measured, in percent; by the first, the best epoch is chosen.
        averages: whether a step's loss is the mean of its images', not their sum.
    """

    figures: tuple[str, ...]
    averages: bool

    def make_loss(self) -> nn.Module:
        """The loss of logits and targets, each (N, labels), summed over images."""
        ...

    def read(self, logits: Tensor) -> Tensor:
        """What is measured, (N, labels), of logits."""
        ...

    def score(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """The figures of what was read and its targets."""
        ...

    def conclude(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """What the best epoch says: its "scores", and more that goes with its weights."""
        ...


class Tagging:
    """Any number of labels an image, each with a sigmoid and a threshold of its own."""

    figures: tuple[str, ...] = ("mAP", "CF1", "OF1")
    averages = False  # as in official training

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def make_loss(self) -> nn.Module:
        return LabelLoss(self._settings)

    def read(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def score(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return score(outputs, targets, _THRESHOLD)

    def conclude(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        thresholds = choose_thresholds(outputs, targets)
        return {
            "scores": score(outputs, targets, torch.tensor(thresholds)),
            "thresholds": thresholds,
            "average_precisions": average_precisions(outputs, targets).tolist(),
        }


class Classification:
    """One class an image, by a softmax."""

    figures: tuple[str, ...] = ("top-1", "top-5")
    averages = True  # as in timm's train.py

    def __init__(self, settings: ClassSettings) -> None:
        self._settings = settings

    def make_loss(self) -> nn.Module:
        return nn.CrossEntropyLoss(label_smoothing=self._settings.smoothing, reduction="sum")

    def read(self, logits: Tensor) -> Tensor:
        return logits  # a softmax would make equal what is not

    def score(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        if not len(outputs):
            return dict.fromkeys(self.figures, float("nan"))
        top1, top5 = accuracy(outputs, targets.argmax(1), topk=(1, 5))
        return {"top-1": top1.item(), "top-5": top5.item()}

    def conclude(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        right = (outputs.argmax(1) == targets.argmax(1))[:, None] * targets
        accuracies = right.sum(0) / targets.sum(0)  # nan where no image has the class
        return {"scores": self.score(outputs, targets), "accuracies": accuracies.tolist()}


def make_task(settings: TrainingSettings) -> Task:
    """The task that settings are of."""
    return Classification(settings) if isinstance(settings, ClassSettings) else Tagging(cast(Settings, settings))

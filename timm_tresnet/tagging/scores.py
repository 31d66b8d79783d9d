"""How good the tags of images are, and from which probability on a label is one."""

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_precision_recall_curve,
    multilabel_average_precision,
    multilabel_f1_score,
    multilabel_precision,
    multilabel_recall,
)


def average_precisions(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Average precision of each label, from 0 to 1; NaN for a label that no image has.

    Args:
        probabilities: (N, labels).
        targets: 0 or 1, (N, labels).
    """
    present = targets.any(0)
    values = torch.full((targets.shape[1],), torch.nan)
    if present.any():
        probabilities, truth = _at_least_two(probabilities[:, present]), _at_least_two(targets[:, present].long())
        found = multilabel_average_precision(probabilities, truth, num_labels=truth.shape[1], average=None)
        values[present] = found[: int(present.sum())]
    return values


def score(probabilities: Tensor, targets: Tensor, thresholds: Tensor | float) -> dict[str, float]:
    """mAP, CF1 and OF1, as papers on multi-label images have them (arXiv:1904.03582, "Evaluation Metrics").

    mAP is the mean of the labels' average precisions. CF1 is the harmonic mean of the labels' mean precision and their
    mean recall, which is not the mean of their F1. OF1 is the F1 of all decisions together. A label that no image has
    counts in none of them.

    Args:
        probabilities: (N, labels).
        targets: 0 or 1, (N, labels).
        thresholds: from which probability on an image has a label, one for each label or one for all; for CF1 and OF1.

    Returns:
        "mAP", "CF1" and "OF1" in percent; NaN if no image has a label.
    """
    present = targets.any(0)
    if not present.any():
        return dict.fromkeys(("mAP", "CF1", "OF1"), float("nan"))
    chosen = _at_least_two((probabilities >= thresholds).long()[:, present])
    truth = _at_least_two(targets.long()[:, present])
    precision, recall = (
        metric(chosen, truth, num_labels=truth.shape[1], average="macro").item()
        for metric in (multilabel_precision, multilabel_recall)
    )
    return {
        "mAP": 100 * average_precisions(probabilities, targets)[present].mean().item(),
        "CF1": 100 * 2 * precision * recall / max(precision + recall, 1e-12),
        "OF1": 100 * multilabel_f1_score(chosen, truth, num_labels=truth.shape[1], average="micro").item(),
    }


def _at_least_two(columns: Tensor) -> Tensor:
    """The columns, a single one twice: torchmetrics takes two labels or more, and means stay what they are."""
    return columns.expand(-1, 2) if columns.shape[1] == 1 else columns


def choose_thresholds(probabilities: Tensor, targets: Tensor) -> list[float]:
    """For each label the probability from which on saying it gives the best F1 on these images.

    It lies halfway between the least probability that is taken and the greatest that is not, so that an engine that
    rounds differently decides alike. A label that no image has gets the threshold that is best for all together.

    Args:
        probabilities: (N, labels).
        targets: 0 or 1, (N, labels), not all 0.

    Returns:
        A threshold for each label.
    """
    together = _choose_threshold(probabilities.flatten(), targets.flatten())
    return [
        _choose_threshold(probabilities[:, label], targets[:, label]) if targets[:, label].any() else together
        for label in range(targets.shape[1])
    ]


def _choose_threshold(probabilities: Tensor, targets: Tensor) -> float:
    precision, recall, ascending = binary_precision_recall_curve(probabilities, targets.long())
    precision, recall = precision[:-1].double(), recall[:-1].double()  # the last belongs to no threshold
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    best = int(f1.argmax())
    below = ascending[best - 1].item() if best else 0.0
    return (ascending[best].item() + below) / 2

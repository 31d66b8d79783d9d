"""Metrics of multi-label predictions, and the choice of thresholds.

Targets are 1 for a present label, 0 for an absent one and -1 for an unknown one; unknown labels are never counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

UNKNOWN = -1


@dataclass(frozen=True)
class Ranking:
    """Decisions about one or more labels, ranked by probability, with one step for each distinct probability.

    Args:
        thresholds: the distinct probabilities, descending, (steps,).
        hits: number of positives with at least this probability, (steps,), float64.
        chosen: number of decisions with at least this probability, (steps,), float64.
        positives: number of all positives.
    """

    thresholds: Tensor
    hits: Tensor
    chosen: Tensor
    positives: int

    @property
    def precision(self) -> Tensor:
        return self.hits / self.chosen

    @property
    def recall(self) -> Tensor:
        return self.hits / self.positives

    def average_precision(self) -> float:
        """Return the sum over steps of precision x gain in recall, as in scikit-learn; NaN without positives."""
        if not self.positives:
            return float("nan")
        gain = torch.diff(self.recall, prepend=torch.zeros(1, dtype=torch.float64))
        return (self.precision * gain).sum().item()


def rank(probabilities: Tensor, targets: Tensor) -> Ranking:
    """Rank the known decisions by probability.

    Args:
        probabilities: any shape.
        targets: 1, 0 or -1, the same shape.
    """
    known = targets != UNKNOWN
    descending, order = probabilities[known].sort(descending=True)
    hits = (targets[known][order] == 1).cumsum(0)
    last = torch.ones_like(descending, dtype=torch.bool)  # of equal probabilities, which are decided together
    last[:-1] = descending[1:] != descending[:-1]
    chosen = torch.arange(1, len(descending) + 1)
    return Ranking(descending[last], hits[last].double(), chosen[last].double(), int(hits[-1]) if len(hits) else 0)


def find_measurable(targets: Tensor) -> Tensor:
    """Return which labels can be measured, bool, (labels,).

    A label needs an image that has it and, unless it is known for all images, one that lacks it. If only presence is
    annotated, every network would have an average precision of 1. `AP_partial` of Alibaba-MIIL/PartialLabelingCSL
    leaves out the same labels.
    """
    return (targets == 1).any(0) & ((targets == 0).any(0) | (targets != UNKNOWN).all(0))


def average_precisions(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the average precision of each label, (labels,), float64, from 0 to 1; NaN if it cannot be measured.

    Args:
        probabilities: (N, labels).
        targets: 1, 0 or -1, (N, labels).
    """
    values = torch.full((targets.shape[1],), torch.nan, dtype=torch.float64)
    for label in find_measurable(targets).nonzero().flatten().tolist():
        values[label] = rank(probabilities[:, label], targets[:, label]).average_precision()
    return values


@dataclass(frozen=True)
class Decisions:
    """Counts of decisions about each measurable label; all (labels,), float64.

    Args:
        hits: number of images that have the label and for which it was chosen.
        chosen: number of images for which it was chosen, among those where it is known.
        positives: number of images that have it.
    """

    hits: Tensor
    chosen: Tensor
    positives: Tensor

    @property
    def precision(self) -> Tensor:
        return self.hits / self.chosen.clamp(min=1)

    @property
    def recall(self) -> Tensor:
        return self.hits / self.positives.clamp(min=1)

    @property
    def f1(self) -> Tensor:
        return 2 * self.hits / (self.chosen + self.positives).clamp(min=1)

    def score(self) -> dict[str, float]:
        """Return precision, recall and F1 per class and overall, in percent (arXiv:1904.03582, "Evaluation Metrics").

        CF1 is the harmonic mean of mean precision and mean recall over labels; it is not the mean of the labels' F1.
        OF1 is the F1 of all decisions together.
        """
        if not len(self.hits):
            return dict.fromkeys(("CP", "CR", "CF1", "OP", "OR", "OF1"), float("nan"))
        by_class = self.precision.mean().item(), self.recall.mean().item()
        sums = [each.sum().item() for each in (self.hits, self.chosen, self.positives)]
        overall = sums[0] / max(sums[1], 1), sums[0] / max(sums[2], 1)
        return {
            f"{kind}{name}": 100 * value
            for kind, (precision, recall) in (("C", by_class), ("O", overall))
            for name, value in (
                ("P", precision),
                ("R", recall),
                ("F1", 2 * precision * recall / max(precision + recall, 1e-12)),
            )
        }


def decide(chosen: Tensor, targets: Tensor) -> Decisions:
    """Count decisions about the measurable labels.

    Args:
        chosen: which labels were chosen for each image, bool, (N, labels).
        targets: 1, 0 or -1, (N, labels).
    """
    measurable = find_measurable(targets)
    positive, known = targets == 1, targets != UNKNOWN
    counts = [(part.sum(0)[measurable]).double() for part in (chosen & positive, chosen & known, positive)]
    return Decisions(*counts)


def choose_top(probabilities: Tensor, count: int) -> Tensor:
    """Return a mask of the count most probable labels of each image, bool, (N, labels)."""
    top = probabilities.topk(min(count, probabilities.shape[1]), dim=1).indices
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, top, True)


def score(probabilities: Tensor, targets: Tensor, thresholds: Tensor | float) -> dict[str, float]:
    """Return mAP, CF1 and OF1 of the measurable labels, in percent.

    Args:
        probabilities: (N, labels).
        targets: 1, 0 or -1, (N, labels).
        thresholds: the least probability of a chosen label, (labels,) or one number for all; used for CF1 and OF1.

    Returns:
        "mAP" (the mean of the labels' average precisions), "CF1" and "OF1"; NaN if no label is measurable.
    """
    by_decision = decide(probabilities >= thresholds, targets).score()
    mean = average_precisions(probabilities, targets).nanmean().item()
    return {"mAP": 100 * mean, **{name: by_decision[name] for name in ("CF1", "OF1")}}


def score_ranking(probabilities: Tensor, targets: Tensor) -> dict[str, float]:
    """Return three means of average precision over the measurable labels, in percent; NaN if there are none.

    Args:
        probabilities: (N, labels).
        targets: 1, 0 or -1, (N, labels).

    Returns:
        "mAP", the mean over labels (macro); "weighted mAP", weighted by the number of images with each label, which
        Alibaba-MIIL/PartialLabelingCSL calls `map_macro`; "micro AP", the average precision of all decisions together.
    """
    found = average_precisions(probabilities, targets)
    measurable = ~found.isnan()
    if not measurable.any():
        return dict.fromkeys(("mAP", "weighted mAP", "micro AP"), float("nan"))
    weights = (targets == 1).sum(0)[measurable].double()
    together = rank(probabilities[:, measurable], targets[:, measurable]).average_precision()
    return {
        "mAP": 100 * found[measurable].mean().item(),
        "weighted mAP": 100 * ((found[measurable] * weights).sum() / weights.sum()).item(),
        "micro AP": 100 * together,
    }


def score_top(logits: Tensor, targets: Tensor, counts: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Return top-k accuracy in percent: the share of images with a target among the k most probable labels.

    Args:
        logits: logits or probabilities, (N, labels).
        targets: 1 or 0, (N, labels); one of several targets is enough (arXiv:2006.07159, "ReaL").
        counts: values of k.

    Returns:
        "top-1" and so on, without those whose k exceeds the number of labels.
    """
    order = logits.topk(min(max(counts), logits.shape[1]), dim=1).indices
    right = targets.gather(1, order) == 1
    return {
        f"top-{count}": 100 * right[:, :count].any(1).double().mean().item()
        for count in counts
        if count == 1 or count <= logits.shape[1]
    }


def choose_thresholds(probabilities: Tensor, targets: Tensor) -> list[float]:
    """Choose each label's threshold for the best F1 on these images.

    The threshold is halfway between the least chosen probability and the next lower one, so that engines that round
    differently make the same decisions. A label that is not measurable gets the best threshold for all labels together.

    Args:
        probabilities: (N, labels).
        targets: 1, 0 or -1, (N, labels); at least one is 1.

    Returns:
        A threshold for each label.
    """
    together = _choose_threshold(rank(probabilities, targets))
    measurable = find_measurable(targets).tolist()
    return [
        _choose_threshold(rank(probabilities[:, label], targets[:, label])) if measurable[label] else together
        for label in range(targets.shape[1])
    ]


def _choose_threshold(ranking: Ranking) -> float:
    f1 = 2 * ranking.hits / (ranking.chosen + ranking.positives)
    best = len(f1) - 1 - int(f1.flip(0).argmax())  # the lowest of equally good ones
    below = ranking.thresholds[best + 1].item() if best + 1 < len(f1) else 0.0
    return (ranking.thresholds[best].item() + below) / 2

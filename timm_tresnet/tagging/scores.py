"""How good the tags of images are, and from which probability on a label is one.

Targets are 1 for a label that the image has, 0 for one that it lacks, and -1 where nobody knows, which counts nowhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

UNKNOWN = -1


@dataclass(frozen=True)
class Ranking:
    """Decisions about one label, or several together, from the most probable on; a step for each distinct probability.

    Args:
        thresholds: the probabilities, descending.
        hits: how many of those at least so probable are right.
        chosen: how many are at least so probable.
        positives: how many are right in all.
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
        """Sum of precision x gain in recall over the steps, as scikit-learn's; NaN if nothing is right."""
        if not self.positives:
            return float("nan")
        gain = torch.diff(self.recall, prepend=torch.zeros(1, dtype=torch.float64))
        return (self.precision * gain).sum().item()


def rank(probabilities: Tensor, targets: Tensor) -> Ranking:
    """Rank the decisions that are known, in float64.

    Args:
        probabilities: any shape.
        targets: 0, 1 or -1, the same shape.
    """
    known = targets != UNKNOWN
    descending, order = probabilities[known].sort(descending=True)
    hits = (targets[known][order] == 1).cumsum(0)
    last = torch.ones_like(descending, dtype=torch.bool)  # of those equally probable, which are decided together
    last[:-1] = descending[1:] != descending[:-1]
    chosen = torch.arange(1, len(descending) + 1)
    return Ranking(descending[last], hits[last].double(), chosen[last].double(), int(hits[-1]) if len(hits) else 0)


def find_measurable(targets: Tensor) -> Tensor:
    """Which labels can be measured: some image has it and, unless all images were checked for it, some lacks it.

    Of labels that people only said yes to, every network would have an average precision of 1. They are left out as
    in `AP_partial` of Alibaba-MIIL/PartialLabelingCSL.
    """
    return (targets == 1).any(0) & ((targets == 0).any(0) | (targets != UNKNOWN).all(0))


def average_precisions(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Average precision of each label, from 0 to 1, in float64; NaN for a label that cannot be measured.

    Args:
        probabilities: (N, labels).
        targets: 0, 1 or -1, (N, labels).
    """
    values = torch.full((targets.shape[1],), torch.nan, dtype=torch.float64)
    for label in find_measurable(targets).nonzero().flatten().tolist():
        values[label] = rank(probabilities[:, label], targets[:, label]).average_precision()
    return values


@dataclass(frozen=True)
class Decisions:
    """Right and wrong decisions about each label that can be measured; all (labels,), float64.

    Args:
        hits: images that have the label and got it.
        chosen: images that got it, among those of which it is known.
        positives: images that have it.
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
        """Precision, recall and F1 by class and overall, in percent (arXiv:1904.03582, "Evaluation Metrics").

        CF1 is the harmonic mean of the labels' mean precision and their mean recall, which is not the mean of their F1.
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
    """Count decisions about the labels that can be measured.

    Args:
        chosen: which labels an image is said to have, bool, (N, labels).
        targets: 0, 1 or -1, (N, labels).
    """
    measurable = find_measurable(targets)
    positive, known = targets == 1, targets != UNKNOWN
    counts = [(part.sum(0)[measurable]).double() for part in (chosen & positive, chosen & known, positive)]
    return Decisions(*counts)


def choose_top(probabilities: Tensor, count: int) -> Tensor:
    """The most probable labels of each image, bool, (N, labels)."""
    top = probabilities.topk(min(count, probabilities.shape[1]), dim=1).indices
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, top, True)


def score(probabilities: Tensor, targets: Tensor, thresholds: Tensor | float) -> dict[str, float]:
    """mAP, CF1 and OF1 of labels that can be measured.

    Args:
        probabilities: (N, labels).
        targets: 0, 1 or -1, (N, labels).
        thresholds: from which probability on an image has a label, one for each label or one for all; for CF1 and OF1.

    Returns:
        "mAP", the mean of the labels' average precisions, "CF1" and "OF1" in percent; NaN if nothing can be measured.
    """
    by_decision = decide(probabilities >= thresholds, targets).score()
    mean = average_precisions(probabilities, targets).nanmean().item()
    return {"mAP": 100 * mean, **{name: by_decision[name] for name in ("CF1", "OF1")}}


def score_ranking(probabilities: Tensor, targets: Tensor) -> dict[str, float]:
    """The three means of average precision, in percent, of labels that can be measured; NaN if there are none.

    Args:
        probabilities: (N, labels).
        targets: 0, 1 or -1, (N, labels).

    Returns:
        "mAP", the mean over labels (macro); "weighted mAP", each label with the number of images that have it, which
        Alibaba-MIIL/PartialLabelingCSL calls `map_macro`; "micro AP", of all decisions together.
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
    """In how many images a label is among the most probable ones, in percent.

    Args:
        logits: or probabilities, (N, labels).
        targets: 0 or 1, (N, labels); of several labels, one of them is enough (as in arXiv:2006.07159, "ReaL").
        counts: how many labels are the most probable ones.

    Returns:
        "top-1" and so on, but for those that are more than there are labels.
    """
    order = logits.topk(min(max(counts), logits.shape[1]), dim=1).indices
    right = targets.gather(1, order) == 1
    return {
        f"top-{count}": 100 * right[:, :count].any(1).double().mean().item()
        for count in counts
        if count == 1 or count <= logits.shape[1]
    }


def choose_thresholds(probabilities: Tensor, targets: Tensor) -> list[float]:
    """For each label the probability from which on saying it gives the best F1 on these images.

    It lies halfway between the least probability that is taken and the greatest that is not, so that an engine that
    rounds differently decides alike. A label that cannot be measured gets the threshold that is best for all together.

    Args:
        probabilities: (N, labels).
        targets: 0, 1 or -1, (N, labels), with a 1.

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
    best = len(f1) - 1 - int(f1.flip(0).argmax())  # of equally good ones the lowest
    below = ranking.thresholds[best + 1].item() if best + 1 < len(f1) else 0.0
    return (ranking.thresholds[best].item() + below) / 2

"""Losses for labels that are present, absent or unknown."""

from collections.abc import Mapping, Sequence

import torch
from timm.loss import AsymmetricLossMultiLabel
from torch import Tensor, nn

from timm_tresnet.tagging.scores import UNKNOWN
from timm_tresnet.tagging.settings import Settings


class LabelLoss(nn.Module):
    """Multi-label loss, summed over images and labels as in official training.

    `settings.unknown`, one of `settings.UNKNOWNS`, says how unknown labels are treated. "selective" is the
    "Class-aware Selective Loss" (arXiv:2110.10955): unknown labels count as absent, with a focusing of their own. Those
    with a high prior and the most probable ones of the batch are ignored.

    Args:
        settings: the training settings.
        pos_weight: weight of each label where it is present, (labels,); None for 1.
        prior: estimated frequency of each label, (labels,), from 0 to 1; None if unknown.

    Shape:
        - logits: (N, labels)
        - targets: (N, labels), 1, 0 or -1 (unknown)
        - output: ()
    """

    pos_weight: Tensor | None
    common: Tensor | None

    def __init__(self, settings: Settings, pos_weight: Tensor | None = None, prior: Tensor | None = None) -> None:
        super().__init__()
        self.unknown = settings.unknown
        self.top_k = settings.unknown_top_k
        self.known_loss = _make_loss(settings, settings.gamma_neg)
        self.unknown_loss = _make_loss(settings, settings.gamma_unknown)
        # Not persistent: settings are in run.json, a checkpoint holds only what is trained.
        self.register_buffer("pos_weight", pos_weight, persistent=False)
        common = None if prior is None else prior > settings.prior_threshold
        self.register_buffer("common", common, persistent=False)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        unknown = targets == UNKNOWN
        loss = self.known_loss(logits, targets.clamp(min=0))
        if self.pos_weight is not None:
            loss = torch.where(targets == 1, loss * self.pos_weight, loss)
        if self.unknown == "ignore":
            loss = loss.masked_fill(unknown, 0)
        elif self.unknown == "selective":
            loss = torch.where(unknown, self.unknown_loss(logits, torch.zeros_like(targets)), loss)
            loss = loss.masked_fill(self._find_probable(logits, unknown), 0)
        return loss.sum()

    def _find_probable(self, logits: Tensor, unknown: Tensor) -> Tensor:
        """Return a mask of the unknown labels with a high prior, and of the most probable ones in the whole batch."""
        count = min(self.top_k * len(logits), int(unknown.sum()))
        likelihood = logits.detach().masked_fill(~unknown, -torch.inf).flatten()
        probable = torch.zeros_like(likelihood, dtype=torch.bool)
        probable[likelihood.topk(count).indices] = True
        probable = probable.view_as(unknown)
        return probable if self.common is None else probable | (unknown & self.common)


def _make_loss(settings: Settings, gamma_neg: float) -> nn.Module:
    """Make the loss function without reduction."""
    if settings.loss == "bce":
        return nn.BCEWithLogitsLoss(reduction="none")
    return AsymmetricLossMultiLabel(
        gamma_neg=gamma_neg,
        gamma_pos=settings.gamma_pos,
        clip=settings.clip,
        disable_torch_grad_focal_loss=True,  # train.py of ASL and ML_Decoder
        reduction="none",
    )


def weigh_positives(counts: Tensor, absent: Tensor) -> Tensor:
    """Return weights that balance presence and absence of each label: absent / counts.

    Args:
        counts: number of images with each label, (labels,).
        absent: number of images without it, (labels,).

    Returns:
        (labels,); 1 for a label that no image or every image has.
    """
    weights = absent / counts
    return torch.where((counts > 0) & (absent > 0), weights, torch.ones_like(weights))


def order_numbers(numbers: Mapping[str, float] | None, names: Sequence[str]) -> Tensor | None:
    """Return numbers by name as a tensor, (labels,), in the order of names; None for None."""
    return None if numbers is None else torch.tensor([numbers[name] for name in names])

"""Losses of labels that are there, absent, or known to nobody."""

from collections.abc import Mapping, Sequence

import torch
from timm.loss import AsymmetricLossMultiLabel
from torch import Tensor, nn

from timm_tresnet.tagging.scores import UNKNOWN
from timm_tresnet.tagging.settings import Settings


class LabelLoss(nn.Module):
    """A loss of logits, summed over images and labels, as official training sums it.

    What becomes of labels of which nobody knows whether they are there is one of `settings.UNKNOWNS`. "selective" is
    that of "Class-aware Selective Loss" (arXiv:2110.10955): they count as absent, with a focusing of their own, but for
    those that are often there and are probably there, which do not count.

    Args:
        settings: of the training.
        pos_weight: how much each label counts where it is there, (labels,); None for 1.
        prior: how often each label is there, by a network's opinion, (labels,); None if nobody says.

    Shape:
        - logits: (N, labels)
        - targets: (N, labels), 1, 0 or -1
        - output: a number
    """

    pos_weight: Tensor | None
    common: Tensor | None

    def __init__(self, settings: Settings, pos_weight: Tensor | None = None, prior: Tensor | None = None) -> None:
        super().__init__()
        self.unknown = settings.unknown
        self.top_k = settings.unknown_top_k
        self.known_loss = _make_loss(settings, settings.gamma_neg)
        self.unknown_loss = _make_loss(settings, settings.gamma_unknown)
        # Not persistent: a checkpoint holds what is trained, settings are in its run.json.
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
        """Unknown labels that are common, and the most probable ones of all images of the batch together."""
        count = min(self.top_k * len(logits), int(unknown.sum()))
        likelihood = logits.detach().masked_fill(~unknown, -torch.inf).flatten()
        probable = torch.zeros_like(likelihood, dtype=torch.bool)
        probable[likelihood.topk(count).indices] = True
        probable = probable.view_as(unknown)
        return probable if self.common is None else probable | (unknown & self.common)


def _make_loss(settings: Settings, gamma_neg: float) -> nn.Module:
    """The loss of each logit."""
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
    """Weights with which a label counts as much where it is there as where it is absent.

    Args:
        counts: images that have each label.
        absent: images that lack it.

    Returns:
        (labels,); 1 for a label that no image has, or all have.
    """
    weights = absent / counts
    return torch.where((counts > 0) & (absent > 0), weights, torch.ones_like(weights))


def order_numbers(numbers: Mapping[str, float] | None, names: Sequence[str]) -> Tensor | None:
    """Numbers by name as a tensor in the order of names; None for None."""
    return None if numbers is None else torch.tensor([numbers[name] for name in names])

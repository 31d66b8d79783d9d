import math

import pytest
import torch

pytest.importorskip("timm", minversion="1.0.31")  # as the extra "tagging" has it

from timm_tresnet.tagging.losses import LabelLoss, order_numbers, weigh_positives
from timm_tresnet.tagging.settings import Settings


def official_loss(logits, targets, gamma_neg=4, gamma_pos=0, clip=0.05):
    """The asymmetric loss term by term (arXiv:2009.14119, "Asymmetric Loss"); its focusing weights have no gradient."""
    total = torch.zeros((), dtype=logits.dtype)
    for logit, target in zip(logits.flatten(), targets.flatten(), strict=True):
        probability = logit.sigmoid()
        if target == 1:
            total = total - (1 - probability).detach() ** gamma_pos * probability.log()
        else:
            shifted = (probability - clip).clamp(min=0)
            total = total - shifted.detach() ** gamma_neg * (1 - shifted).log()
    return total


def test_the_loss_is_the_official_one_with_its_gradient():
    logits = (torch.randn(6, 5, dtype=torch.float64) * 3).requires_grad_()
    targets = (torch.rand(6, 5) < 0.3).double()
    expected = torch.autograd.grad(official_loss(logits, targets), logits)[0]
    loss = LabelLoss(Settings())
    found = torch.autograd.grad(loss(logits, targets), logits)[0]
    torch.testing.assert_close(loss(logits, targets).double(), official_loss(logits, targets), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_plain_cross_entropy_is_summed_too():
    logits, targets = torch.randn(6, 5), torch.randint(2, (6, 5)).float()
    expected = official_loss(logits, targets, gamma_neg=0, clip=0)
    torch.testing.assert_close(LabelLoss(Settings(loss="bce"))(logits, targets), expected)


def official_selective_loss(logits, targets, gammas=(0, 1, 4), clip=0.0, top_k=0, common=()):
    """`PartialSelectiveLoss` of Alibaba-MIIL/PartialLabelingCSL (src/loss_functions), one logit after the other."""
    unknown = [(logit.item(), cell) for cell, logit in enumerate(logits.flatten()) if targets.flatten()[cell] == -1]
    probable = {cell for _, cell in sorted(unknown, reverse=True)[: top_k * len(logits)]}
    total = torch.zeros((), dtype=logits.dtype)
    for cell, (logit, target) in enumerate(zip(logits.flatten(), targets.flatten(), strict=True)):
        if target == -1 and (cell in probable or cell % targets.shape[1] in common):
            continue
        probability = logit.sigmoid()
        if target == 1:
            total = total - (1 - probability.detach()) ** gammas[0] * probability.log()
        else:
            absent = (1 - probability + clip).clamp(max=1)
            total = total - (1 - absent.detach()) ** gammas[1 if target == 0 else 2] * absent.log()
    return total


def make_case():
    """Logits and targets that no random number generator decides, a third of them unknown."""
    logits = torch.tensor([3 * math.sin(7 * cell) for cell in range(60)], dtype=torch.float64).view(6, 10)
    targets = torch.tensor(
        [int(50 * math.sin(13 * cell) + 50) % 3 - 1 for cell in range(60)], dtype=torch.float64
    ).view(6, 10)
    return logits.requires_grad_(), targets


CASES = {  # words -> settings, arguments of the reference, what the official code gave on a CPU at commit 534f3ce
    "ignore": ({"unknown": "ignore"}, {"top_k": 99}, 35.59360879633855),
    "negative": ({"unknown": "negative", "gamma_neg": 4}, {"gammas": (0, 4, 4)}, 54.497433623804184),
    "likelihood": ({"unknown": "selective", "unknown_top_k": 2}, {"top_k": 2}, 36.51357870752269),
    "prior": ({"unknown": "selective", "unknown_top_k": 1}, {"top_k": 1, "common": (1, 8)}, 42.713327292970924),
    "clip": ({"unknown": "selective", "unknown_top_k": 1, "clip": 0.05}, {"top_k": 1, "clip": 0.05}, 38.63539983265354),
}


@pytest.mark.parametrize("case", CASES)
def test_partial_labels_cost_what_they_cost_in_the_official_loss(case):
    words, arguments, recorded = CASES[case]
    settings = Settings(**({"gamma_neg": 1, "gamma_unknown": 4, "clip": 0} | words))
    prior = torch.zeros(10)
    prior[[1, 8]] = 0.6
    loss = LabelLoss(settings, prior=prior if "common" in arguments else None)
    logits, targets = make_case()
    expected = official_selective_loss(logits, targets, **arguments)
    gradient = torch.autograd.grad(expected, logits)[0]
    assert expected.item() == pytest.approx(recorded, rel=1e-6)
    found = loss(logits, targets)
    assert found.item() == pytest.approx(recorded, rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found, logits)[0], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["asl", "bce"])
def test_what_nobody_knows_has_no_gradient_where_it_is_ignored(loss):
    logits, targets = make_case()
    LabelLoss(Settings(loss=loss))(logits, targets).backward()
    assert not logits.grad[targets == -1].any()
    assert logits.grad[targets == 1].all()


@pytest.mark.parametrize("loss", ["asl", "bce"])
def test_without_anything_unknown_all_modes_are_the_same(loss):
    logits, targets = make_case()
    targets = targets.clamp(min=0)
    ignore, negative, selective = (
        LabelLoss(Settings(loss=loss, unknown=unknown))(logits, targets)
        for unknown in ("ignore", "negative", "selective")
    )
    assert ignore == negative == selective


def test_positive_weights_are_those_of_pytorch():
    logits, targets = make_case()
    targets = targets.clamp(min=0)
    weights = weigh_positives((targets == 1).sum(0), (targets == 0).sum(0))
    expected = torch.nn.BCEWithLogitsLoss(reduction="sum", pos_weight=weights)(logits, targets)
    torch.testing.assert_close(LabelLoss(Settings(loss="bce"), weights)(logits, targets), expected)
    assert weigh_positives(torch.tensor([2, 0, 5]), torch.tensor([6, 9, 0])).tolist() == [3, 1, 1]
    assert order_numbers({"b": 2, "a": 1, "c": 3}, ("a", "b")).tolist() == [1, 2]
    assert order_numbers(None, ("a",)) is None


def test_a_loss_adds_nothing_to_a_checkpoint():
    assert not LabelLoss(Settings(), torch.ones(3), torch.ones(3)).state_dict()

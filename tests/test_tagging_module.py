import math
from types import SimpleNamespace

import pytest
import timm
import torch
from tagged import SMALL
from torch import nn

pytest.importorskip("lightning.pytorch", reason="install lightning, of the extra tagging")

from timm_tresnet.tagging.module import Tagger
from timm_tresnet.tagging.scores import score
from timm_tresnet.tagging.settings import ClassSettings, Settings
from timm_tresnet.tagging.tasks import make_task


def test_the_loss_of_classes_is_that_of_timm_with_smoothing():
    from timm.loss import LabelSmoothingCrossEntropy

    logits, classes = torch.randn(6, 5), torch.randint(5, (6,))
    targets = nn.functional.one_hot(classes, 5).float()
    task = make_task(ClassSettings(smoothing=0.2))
    expected = LabelSmoothingCrossEntropy(0.2)(logits, classes)
    torch.testing.assert_close(task.make_loss()(logits, targets) / 6, expected)


def test_figures_of_classes_are_those_of_timm_and_of_counting():
    from timm.utils import accuracy

    logits, classes = torch.randn(40, 9), torch.randint(8, (40,))  # no image has the last class
    targets = nn.functional.one_hot(classes, 9).float()
    task = make_task(ClassSettings())
    found = task.summarise(task.compute_outputs(logits), targets)
    assert list(found["scores"].values()) == [each.item() for each in accuracy(logits, classes, (1, 5))]
    for label in range(8):
        mine = classes == label
        assert found["accuracies"][label] == pytest.approx((logits[mine].argmax(1) == label).float().mean().item())
    assert math.isnan(found["accuracies"][8])


class Trainer:
    """As much of Lightning's as configuring asks for."""

    estimated_stepping_batches = 100


def make_tagger(monkeypatch, **settings):
    network = timm.create_model("test_tresnet", num_classes=3, **SMALL)
    tagger = Tagger(network, Settings(**settings), held_out=4)
    monkeypatch.setattr(Tagger, "trainer", Trainer())
    return tagger


def test_norms_and_biases_do_not_decay(monkeypatch):
    tagger = make_tagger(monkeypatch)
    optimizer = tagger.configure_optimizers()["optimizer"]
    assert type(optimizer).__name__ == "Adam"
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for module in tagger.network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            plain = isinstance(module, nn.BatchNorm2d) or name == "bias"
            assert decay[id(parameter)] == (0 if plain else 1e-4)


def test_one_cycle_rises_for_a_fifth_and_ends_near_zero(monkeypatch):
    tagger = make_tagger(monkeypatch)
    configured = tagger.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        tagger.lr_scheduler_step(scheduler, None)
    assert rates.index(max(rates)) == 19
    assert max(rates) == pytest.approx(1e-4)
    assert rates[-1] < 1e-7


def test_schedules_of_timm_go_by_steps(monkeypatch):
    tagger = make_tagger(monkeypatch, sched="cosine", epochs=10, warmup_epochs=1)
    configured = tagger.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for step in range(1, 100):
        monkeypatch.setattr(Tagger, "global_step", step)
        tagger.lr_scheduler_step(scheduler, None)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[4] < rates[9] == max(rates)
    assert rates[-1] < 1e-6 < rates[50]


def test_the_average_is_no_part_of_what_is_trained(monkeypatch):
    tagger = make_tagger(monkeypatch)
    assert len(list(tagger.parameters())) == len(list(tagger.network.parameters()))
    assert not any(name.startswith("average") for name in tagger.state_dict())


def test_images_that_cannot_be_read_have_no_part_in_the_loss(monkeypatch):
    tagger = make_tagger(monkeypatch).train()
    batch = {
        "image": torch.rand(3, 3, 32, 32),
        "target": torch.randint(2, (3, 3)).float(),
        "index": torch.tensor([5, 6, 7]),
        "readable": torch.tensor([True, False, True]),
    }
    loss = tagger.training_step(batch, 0)
    logits = tagger.network(batch["image"])
    torch.testing.assert_close(loss, tagger.loss(logits[[0, 2]], batch["target"][[0, 2]]))
    assert tagger.unreadable == {6}
    batch["readable"][:] = False
    tagger.training_step(batch, 0).backward()  # zero, with a gradient
    assert not any(parameter.grad.any() for parameter in tagger.network.parameters())


def test_images_that_two_processes_measured_count_once(monkeypatch):
    tagger = make_tagger(monkeypatch)
    tagger._loss_sum, tagger._loss_count = torch.tensor(6.0), 3
    monkeypatch.setattr(tagger, "_gather", lambda values: values)
    monkeypatch.setattr(tagger, "log_dict", lambda values: None)
    monkeypatch.setattr(Tagger, "current_epoch", 4)
    probabilities, targets = torch.rand(4, 3), torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]).float()
    measured = []
    for order in ([2, 0, 3], [1, 2, 0]):  # of each process; 0 and 2 come twice, and 3 cannot be read
        part = {"index": torch.tensor(order), "readable": torch.tensor([index != 3 for index in order])}
        part |= {"target": targets[order], "network": probabilities[order], "average": probabilities[order].flip(1)}
        measured.append(part)
    tagger._measured = measured
    tagger.on_validation_epoch_end()
    (row,) = tagger.history
    assert (row["epoch"], row["loss"], row["unreadable"]) == (5, 2.0, 1)
    assert row["network"] == score(probabilities[:3], targets[:3], 0.5)
    assert row["average"] == score(probabilities[:3].flip(1), targets[:3], 0.5)
    better = max(("network", "average"), key=lambda name: row[name]["mAP"])
    assert (tagger.best["name"], tagger.best["epoch"]) == (better, 5)


def test_nothing_that_can_be_read_is_an_error(monkeypatch):
    tagger = make_tagger(monkeypatch)
    tagger._loss_sum, tagger._loss_count = torch.tensor(0.0), 0
    monkeypatch.setattr(tagger, "_gather", lambda values: values)
    part = {"index": torch.tensor([0]), "readable": torch.tensor([True]), "target": torch.ones(1, 3)}
    tagger._measured = [part | {"network": torch.rand(1, 3), "average": torch.rand(1, 3)}]
    with pytest.raises(ValueError, match="none of the training images can be read"):
        tagger.on_validation_epoch_end()


def test_the_bar_shows_the_mean_loss_of_the_epoch_so_far(monkeypatch):
    from timm_tresnet.tagging.progress import ProgressBar

    tagger = make_tagger(monkeypatch)
    tagger._loss_sum, tagger._loss_count = torch.tensor(6.0), 4
    trainer = SimpleNamespace(loggers=[SimpleNamespace(version="")], progress_bar_metrics={})
    assert ProgressBar().get_metrics(trainer, tagger) == {"loss": "1.500"}


def test_classes_have_the_mean_loss_of_a_batch_and_an_average_that_warms_up(monkeypatch):
    network = timm.create_model("test_tresnet", num_classes=3, **SMALL)
    tagger = Tagger(network, ClassSettings(), held_out=4).train()
    targets = nn.functional.one_hot(torch.tensor([0, 2, 1]), 3).float()
    batch = {"image": torch.rand(3, 3, 32, 32), "target": targets, "index": torch.arange(3)}
    batch["readable"] = torch.tensor([True, False, True])
    loss = tagger.training_step(batch, 0)
    logits = tagger.network(batch["image"])[[0, 2]]
    expected = nn.functional.cross_entropy(logits, torch.tensor([0, 1]), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    assert tagger.mean_loss == pytest.approx(expected.item(), rel=1e-5)
    assert tagger.average.get_decay(100) < 0.995
    assert Tagger(network, Settings(), held_out=4).average.get_decay(100) == 0.9997

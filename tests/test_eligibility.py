import logging

import pytest
import torch
from comparing import images, make_model, train_step
from torch import nn
from torch.nn.utils import parametrizations

from timm_tresnet.recompute import eligibility
from timm_tresnet.recompute.eligibility import find_obstacle, is_user_defined

SMALL = {"layers": (1, 1, 1, 1)}


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        (lambda: torch.autograd.graph.save_on_cpu(), "hooks on all saved tensors"),
        (lambda: torch.autograd.graph.disable_saved_tensors_hooks("no"), "disabled"),
        (lambda: torch.autograd.forward_ad.dual_level(), "forward-mode"),
        (lambda: torch.overrides.TorchFunctionMode(), "function mode"),
        (lambda: torch.utils._python_dispatch.TorchDispatchMode(), "dispatch mode"),
    ],
    ids=["saved", "disabled", "forward_mode", "function_mode", "dispatch_mode"],
)
def test_obstacle_is_named(context, reason):
    assert find_obstacle() is None
    with context():
        assert reason in find_obstacle()
    assert find_obstacle() is None


def test_replaced_forward_of_a_class_is_named(monkeypatch):
    monkeypatch.setattr(nn.LeakyReLU, "forward", lambda self, x: x)
    assert find_obstacle() == "LeakyReLU.forward is replaced"


def test_parametrizations_of_pytorch_are_not_user_defined():
    conv = parametrizations.weight_norm(nn.Conv2d(2, 2, 1))
    assert not is_user_defined(conv)
    assert is_user_defined(conv, adapters=False)
    nn.utils.parametrize.register_parametrization(conv, "bias", type("Mine", (nn.Identity,), {})())
    assert is_user_defined(conv)


@pytest.fixture
def lines(caplog):
    eligibility.log_once.cache_clear()
    caplog.set_level(logging.INFO, "timm_tresnet")
    return caplog


@pytest.mark.parametrize("what", ["global", "block"])
def test_first_forward_that_steps_aside_logs_one_line(what, lines):
    model = make_model("activations", **SMALL)
    if what == "global":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    else:
        handle = model.body.layer3[0].register_forward_hook(lambda *_: None)
    for _ in range(2):
        train_step(model, images())
    handle.remove()
    assert [line.levelname for line in lines.records] == ["INFO"]
    assert ("all modules" if what == "global" else "a forward hook") in lines.records[0].getMessage()


def test_nothing_is_logged_where_all_goes_well_or_nothing_is_asked_for(lines):
    train_step(make_model("activations", **SMALL), images())
    train_step(make_model("none", **SMALL), images())
    with torch.no_grad():
        make_model("activations", **SMALL)(images())
    assert lines.records == []

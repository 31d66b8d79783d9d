"""Activations of PyTorch at each place of the network."""

import functools

import pytest
import torch
from comparing import assert_same, train_step
from torch import nn
from users import MODIFIED, another, build, everywhere, inputs, module_in_stage, same_as_plain, shortcut


@same_as_plain(
    "silu", "hard_swish", "mish", "elu", "gelu", "hard_sigmoid", "sigmoid", "tanh", "celu", "selu", "relu6", "relu"
)
def test_inplace_switched_on(act, model):
    model = another(model, act_layer=act)
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = True
    return train_step(model, inputs())


@same_as_plain("silu", "leaky_relu", "elu", "relu6", "prelu", "hard_swish")
def test_inplace_switched_off(act, model):
    model = another(model, act_layer=act)
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return train_step(model, inputs())


def made_of(*makers):
    def make():
        return nn.Sequential(*(maker() for maker in makers))

    make.__name__ = "+".join(maker.__name__ for maker in makers)
    return make


def partial(cls, **kwargs):
    make = functools.partial(cls, **kwargs)
    make.__name__ = ",".join([cls.__name__, *(f"{name}={value}" for name, value in kwargs.items())])
    return make


ACTIVATIONS = [
    nn.RReLU,
    partial(nn.RReLU, inplace=True),
    partial(nn.LeakyReLU, negative_slope=-0.1),
    partial(nn.LeakyReLU, negative_slope=-0.1, inplace=True),  # which PyTorch refuses in backward
    partial(nn.LeakyReLU, negative_slope=0.0, inplace=True),
    partial(nn.Threshold, threshold=0.1, value=0.2, inplace=True),
    partial(nn.Hardtanh, inplace=True),
    partial(nn.GELU, approximate="tanh"),
    partial(nn.CELU, alpha=0.3),
    nn.Sigmoid,
    nn.PReLU,
    nn.Softplus,
    nn.Hardshrink,
    nn.LogSigmoid,
    made_of(nn.LeakyReLU, nn.Dropout),
    made_of(nn.SiLU, nn.RReLU),
    made_of(partial(nn.Dropout, inplace=True), partial(nn.LeakyReLU, inplace=True)),
    made_of(partial(nn.SiLU, inplace=True), partial(nn.Dropout, inplace=True)),
]
PAIRS_IN_PLACE = ACTIVATIONS[-2:]


def is_refused(put, make):
    """Whether it works in place on what another part has saved, or cannot be inverted."""
    return "inplace" in make.__name__ and (put in (module_in_stage, shortcut) or "-0.1" in make.__name__)


PUT = [each for each in everywhere(ACTIVATIONS) if each[0] is not shortcut or each[1] not in PAIRS_IN_PLACE]


@same_as_plain(*PUT, few=len(ACTIVATIONS), in_turn=True, raises=f"{MODIFIED}|negative slope", when=is_refused)
def test_activation_put_in(put, make, model):
    return train_step(put(model, make), inputs())


@pytest.mark.parametrize("setting", ["activations", "expansions"])
@pytest.mark.parametrize("make", PAIRS_IN_PLACE, ids=lambda make: make.__name__)
def test_a_shortcut_that_works_in_place_as_pytorch_refuses_gives_the_gradients_of_a_copy(make, setting):
    """PyTorch has saved the block's input, which is overwritten here; recomputed, it is as it was."""

    def step(setting, copy):
        torch.manual_seed(3)
        model = shortcut(build(setting), make)
        if copy:
            for part in (model.body.layer3[2], model.body.layer3[4].drop_path):
                part.register_forward_pre_hook(lambda module, args: (args[0].clone(),))
        return train_step(model, inputs())

    with pytest.raises(RuntimeError, match=MODIFIED):
        step("none", copy=False)
    assert_same(step(setting, copy=False), step("none", copy=True))

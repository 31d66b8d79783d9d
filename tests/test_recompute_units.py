"""Units with an adapter, a parametrized or a user-defined convolution: the rest of the unit is recomputed."""

import pytest
import torch
from comparing import RECOMPUTING, images, make_model, saved_bytes, train_step
from torch import nn
from torch.nn.utils import parametrizations, prune
from users import assert_same, inputs, same_as_plain


def convolutions(model):
    return [module for module in model.modules() if type(module) is nn.Conv2d]


def add_lora(model, part=""):
    peft = pytest.importorskip("peft", reason="peft is not installed; the extra `lora` has it")
    names = [name for name, module in model.named_modules() if type(module) is nn.Conv2d and part in name]
    torch.manual_seed(5)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))


@pytest.mark.parametrize("setting", RECOMPUTING)
@pytest.mark.parametrize("part", ["", "conv3"])
def test_lora_gives_the_same_numbers_and_stores_half(part, setting):
    assert_same(*(train_step(add_lora(make_model(each), part), images()) for each in (setting, "none")))
    kept, whole = (saved_bytes(add_lora(make_model(each), part), images()) for each in (setting, "none"))
    assert kept <= (0.6 if part == "" else 0.9) * whole


class Scaled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 1.5


def weight_norm(model):
    for conv in convolutions(model):
        parametrizations.weight_norm(conv)


def spectral_norm(model):
    for conv in convolutions(model):
        parametrizations.spectral_norm(conv)


def old_weight_norm(model):
    for conv in convolutions(model):
        nn.utils.weight_norm(conv)


def pruning(model):
    for conv in convolutions(model):
        prune.l1_unstructured(conv, "weight", 0.3)


def subclass(model):
    for conv in convolutions(model):
        conv.__class__ = Scaled


def hook(model):
    for conv in convolutions(model):
        conv.register_forward_hook(lambda module, args, y: None)


CHANGES = [weight_norm, spectral_norm, old_weight_norm, pruning, subclass, hook]


@same_as_plain(*CHANGES, few=len(CHANGES))
def test_every_convolution_changed(change, model):
    change(model)
    return train_step(model, inputs())


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
def test_less_is_stored_behind_changed_convolutions(change):
    models = [make_model(setting) for setting in ("activations", "none")]
    for model in models:
        change(model)
    kept, whole = (saved_bytes(model, images(2, 128)) for model in models)
    assert kept <= 0.85 * whole


@pytest.mark.parametrize("setting", RECOMPUTING)
def test_eval_mode_with_gradients_stores_half_and_gives_the_same_numbers(setting):
    assert_same(*(train_step(make_model(each).eval(), images()) for each in (setting, "none")))
    kept, whole = (saved_bytes(make_model(each).eval(), images()) for each in (setting, "none"))
    assert kept <= 0.52 * whole

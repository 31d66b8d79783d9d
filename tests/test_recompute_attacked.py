"""What an attack on the block program found: user code where modules are expected, and modes that it leaves open."""

import contextlib

import pytest
import torch
from torch import nn
from users import build, inputs, same_as_plain, step_after

from timm_tresnet.models.layers import ConvNormAct


def step(model):
    return step_after(model, lambda y: None)


def open_hooks(model):
    """Leave hooks on all saved tensors active from the convolution of a unit to the end of the forward."""
    stack = contextlib.ExitStack()

    def enter(*_):
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor))

    model.body.layer2[0].conv1.conv.register_forward_hook(enter)
    y = model(inputs())
    stack.close()
    loss = y.square().mean()
    loss.backward()
    return {"loss": loss.detach(), **{name: each.grad for name, each in model.named_parameters()}}


@same_as_plain()
def test_mode_that_a_hook_leaves_open_before_an_activation_that_is_not_in_place(model):
    for module in model.modules():
        if isinstance(module, ConvNormAct) and isinstance(module.bn.act, nn.LeakyReLU):
            module.bn.act.inplace = False
    return open_hooks(model)


def put_function_in_aa(model):
    model.body.layer3[0].conv1.aa = lambda x: x * 2


def put_function_in_se(model):
    model.body.layer4[0].se = torch.sin


def put_function_in_shortcut(model):
    model.body.layer1[0].downsample = torch.sin


def put_function_in_activation(model):
    norm = model.body.layer2[0].conv1.bn
    del norm.act
    norm.act = torch.tanh


def patch_sum(model):
    model.body.layer2[0].add = lambda x, shortcut: torch.tanh(x + shortcut)


def patch_gate(model):
    model.body.layer2[0].se._make_gate = lambda x: torch.tanh(x.mean((2, 3), keepdim=True))


@same_as_plain(
    put_function_in_aa,
    put_function_in_se,
    put_function_in_shortcut,
    put_function_in_activation,
    patch_sum,
    patch_gate,
    few=6,
)
def test_functions_in_the_place_of_modules_and_methods(put, model):
    plain = {name: each.detach().clone() for name, each in step(model).items() if name == "loss"}
    model.zero_grad()
    put(model)
    result = step(model)
    assert not torch.equal(result["loss"], plain["loss"])  # they do something
    return result


@pytest.mark.parametrize("fused", [False, True])
def test_step_between_backwards_of_a_block_under_torch_checkpoint_is_an_error(fused):
    model = build("checkpointing")
    for unit in model.modules():
        if isinstance(unit, ConvNormAct):
            nn.utils.parametrizations.weight_norm(unit.conv)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    loss = model(inputs()).square().mean()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        loss.backward()

"""Attacks on the block program: user code in place of modules, and modes that it leaves open."""

import contextlib
import sys
import threading
import weakref

import pytest
import torch
from torch import nn
from users import build, inputs, same_as_plain, step_after

from timm_tresnet.models.blocks import BasicBlock, ResidualBlock
from timm_tresnet.models.layers import ConvNormAct, SqueezeExcite
from timm_tresnet.recompute.checkpoint import _KeepRunningStatistics
from timm_tresnet.recompute.run import Call
from timm_tresnet.recompute.saved import Recomputed
from timm_tresnet.recompute.stage import Stage


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


class Unusual(nn.Module):
    """A convolution whose output is neither contiguous nor channels-last."""

    def __init__(self, conv, change):
        super().__init__()
        self.conv, self.change = conv, change

    def forward(self, x):
        return self.change(self.conv(x))


def transpose(y):
    return y.transpose(2, 3).contiguous().transpose(2, 3)


def cut(y):
    return torch.cat([y, y], 1)[:, : y.shape[1]]


@same_as_plain(transpose, cut, torch.clone)
def test_outputs_of_convolutions_in_other_layouts(change, model):
    for unit in [module for module in model.modules() if isinstance(module, ConvNormAct)]:
        unit.conv = Unusual(unit.conv, change)
    return step(model)


@same_as_plain(nn.SiLU, nn.GELU, nn.ELU, nn.Mish)
def test_forward_of_an_activation_replaced_in_its_class(kind, model):
    for unit in [module for module in model.modules() if isinstance(module, ConvNormAct)]:
        if isinstance(unit.bn.act, nn.LeakyReLU):
            unit.bn.act = kind()
    original = kind.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", lambda self, x: original(self, x) * 1.5)
        return step(model)


@same_as_plain((SqueezeExcite, "_make_gate"), (BasicBlock, "add"), (ResidualBlock, "add"), (Stage, "forward"))
def test_method_replaced_in_a_class(kind, name, model):
    original = getattr(kind, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, name, lambda self, *args: torch.tanh(original(self, *args)))
        return step(model)


def weight_norm(unit):
    nn.utils.parametrizations.weight_norm(unit.conv)


def softmax(unit):
    unit.bn.act = nn.Softmax2d() if not isinstance(unit.bn.act, nn.Identity) else unit.bn.act


def random_slope(unit):
    unit.bn.act = nn.RReLU(inplace=True) if not isinstance(unit.bn.act, nn.Identity) else unit.bn.act


@pytest.mark.parametrize("change", [weight_norm, softmax, random_slope])
def test_inputs_of_called_modules_and_the_graph_are_let_go(change):
    model = build("activations")
    for unit in [module for module in model.modules() if isinstance(module, ConvNormAct)]:
        change(unit)
    seen = []
    call = Call.run

    def run(self, x, source, run):
        if isinstance(source, Recomputed) and not isinstance(self.module, nn.Sequential):
            seen.append(weakref.ref(x))
        return call(self, x, source, run)

    x = inputs().requires_grad_() * 1
    held = torch.zeros(())
    x.register_hook(lambda grad, held=held: grad + held)  # alive as long as the graph
    held = weakref.ref(held)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Call, "run", run)
        loss = model(x).square().mean()
    del x
    assert seen
    if change is weight_norm:  # the input of an activation is what autograd has saved for the norm
        assert not any(each() is not None for each in seen)
    assert held() is not None
    del loss
    assert held() is None


def test_running_statistics_that_cannot_be_copied_stay_and_other_threads_go_on(monkeypatch):
    """As with too little memory for the second of them."""
    norm = nn.BatchNorm2d(2)
    keep, before, clone = _KeepRunningStatistics(norm), dict(norm.named_buffers()), torch.Tensor.clone
    copied = []

    def clone_once(tensor):
        if copied:
            raise MemoryError
        copied.append(tensor)
        return clone(tensor)

    monkeypatch.setattr(torch.Tensor, "clone", clone_once)
    with pytest.raises(MemoryError), keep:
        raise AssertionError("it has begun all the same")
    assert copied
    assert all(buffer is before[name] for name, buffer in norm.named_buffers())
    free = []

    def try_lock():
        free.append(keep._lock.acquire(blocking=False))
        if free[0]:
            keep._lock.release()

    thread = threading.Thread(target=try_lock)
    thread.start()
    thread.join()
    assert free == [True]


def test_threads_that_run_blocks_again_leave_running_statistics():
    model = build("checkpointing")
    for unit in [module for module in model.modules() if isinstance(module, ConvNormAct)]:
        weight_norm(unit)
    losses = [model(inputs()).square().mean() for _ in range(4)]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=loss.backward) for loss in losses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())

"""Bytes that are alive in forward, in backward and after it, beside those of plain PyTorch."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from users import (
    FREEZES,
    SETTINGS,
    build,
    inputs,
)


class Live(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are still alive, and the most there were."""

    def __init__(self, *models):
        super().__init__()
        self.now = self.peak = 0
        self.own = [t.untyped_storage() for m in models for p in (*m.parameters(), *m.buffers())
                    for t in (p, p.grad) if t is not None]  # fmt: skip
        self.seen = {storage._cdata for storage in self.own}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.seen.discard(key)
        self.now -= size


BIG = {"layers": (2, 2, 6, 1), "width_factor": 0.25}


def measure(setting, edit=lambda m: None, after=lambda m, y: None, x=None, **kwargs):
    """Live bytes after forward, most in backward and after it with the loss alive, without gradients."""
    model = build(setting, **{**BIG, **kwargs})
    edit(model)
    x = inputs(8) if x is None else x
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    gc.collect()
    gc.disable()
    try:
        with Live(model) as live:
            loss = model(x).square().mean()
            most_forward, kept = live.peak, live.now
            live.peak = 0
            if loss.requires_grad:
                after(model, loss)
                loss.backward()
            return {"forward": most_forward, "kept": kept, "backward": live.peak, "after": live.now}
    finally:
        gc.enable()


SLACK = 60_000


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("what", ["forward", "kept", "backward", "after"])
@pytest.mark.parametrize("freeze", [lambda m: None, *FREEZES], ids=lambda f: f.__name__)
def test_memory_of_frozen_parts(freeze, what, setting):
    plain, here = measure("none", freeze)[what], measure(setting, freeze)[what]
    assert here <= plain * 1.02 + SLACK, f"{here} > {plain}"


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kwargs", [{}, {"act_layer": "silu"}, {"drop_path_rate": 0.2}, {"v2": True},
                                    {"norm_layer": "groupnorm1"}, {"aa_layer": False}], ids=str)  # fmt: skip
def test_memory_once_backward_is_over_and_the_loss_is_alive(kwargs, setting):
    plain, here = (measure(s, **kwargs)["after"] for s in ("none", setting))
    assert here <= plain + SLACK, f"{here} > {plain}"


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kwargs", [{}, {"act_layer": "silu"}, {"drop_path_rate": 0.2}, {"v2": True}], ids=str)
def test_memory_retained_after_backward_is_what_forward_kept(kwargs, setting):
    def run(each):
        model = build(each, **kwargs)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        gc.collect()
        gc.disable()
        try:
            with Live(model) as live:
                loss = model(inputs(8)).square().mean()
                kept = live.now
                loss.backward(retain_graph=True)
                return live.now - kept
        finally:
            gc.enable()

    assert run(setting) <= run("none") + SLACK


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kwargs", [{}, {"act_layer": "silu"}, {"drop_path_rate": 0.2}, {"v2": True}], ids=str)
def test_memory_at_the_end_of_backward_is_all_given_back(kwargs, setting):
    """When the stem's gradient is there, nothing of the later stages should be."""

    def run(each):
        level = []

        def edit(model):
            model.body.conv1.conv.weight.register_hook(lambda g: level.append(live_now()))

        current = []

        def live_now():
            return current[0].now

        model = build(each, **kwargs)
        edit(model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        with Live(model) as live:
            current.append(live)
            model(inputs(8)).square().mean().backward()
        return level[0]

    assert run(setting) <= run("none") * 1.02 + SLACK


@pytest.mark.parametrize("setting", SETTINGS)
def test_failed_backward_gives_all_back(setting):
    def run(each):
        model = build(each)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        handle = model.body.layer2[0].conv2.conv.weight.register_hook(lambda g: 1 / 0)
        gc.collect()
        gc.disable()
        try:
            with Live(model) as live:
                loss = model(inputs(8)).square().mean()
                with contextlib.suppress(ZeroDivisionError):
                    loss.backward()
                failed = live.now
                handle.remove()
                del loss
                return failed, live.now
        finally:
            gc.enable()

    (failed, gone), (plain_failed, plain_gone) = run(setting), run("none")
    assert failed <= plain_failed + SLACK
    assert gone <= plain_gone + SLACK


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("how", ["unused", "partial", "hook_error", "features"])
def test_nothing_leaks_without_the_collector(how, setting):
    def run(each):
        model = build(each)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        x = inputs(8)
        gc.collect()
        gc.disable()
        try:
            with Live(model) as live:
                if how == "unused":
                    model(x)
                elif how == "partial":
                    y = model(x)
                    torch.autograd.grad(y.sum(), [model.body.layer3[3].conv1.conv.weight])
                    del y
                elif how == "features":
                    y, f = model.forward_intermediates(x)
                    f[2].sum().backward()
                    del y, f
                else:
                    model.body.layer3[2].register_forward_hook(lambda *_: 1 / 0)
                    with contextlib.suppress(ZeroDivisionError):
                        model(x)
                return live.now
        finally:
            gc.enable()

    assert run(setting) <= run("none") + SLACK

"""Bytes that are alive in forward, in backward and after it: never more than plain PyTorch's."""

import contextlib
import functools
import gc
import weakref

import pytest
import torch
from comparing import RECOMPUTING, each_setting
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from users import FREEZES, build, freeze_nothing, inputs

from timm_tresnet.recompute import run, stage

SLACK = 40_000  # bytes: statistics, gates and what Python frees a little later
each_network = pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({}, id="default"),
        pytest.param({"drop_path_rate": 0.2}, id="drop_path"),
        pytest.param({"act_layer": "silu"}, id="silu", marks=pytest.mark.thorough),
        pytest.param({"v2": True}, id="v2", marks=pytest.mark.thorough),
        pytest.param({"norm_layer": "groupnorm1"}, id="other_norm", marks=pytest.mark.thorough),
        pytest.param({"aa_layer": False}, id="strided", marks=pytest.mark.thorough),
    ],
)


class Live(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are still alive, and the most there were."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        self._own = [tensor.untyped_storage() for tensor in tensors]
        self._seen = {storage._cdata for storage in self._own}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size):
        self._seen.discard(key)
        self.now -= size


@contextlib.contextmanager
def counting(model):
    """Count live bytes without Python's garbage collector, which could hide that a cycle keeps a graph alive."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch, Live(model) as live:
            for module in (run, stage):  # which step aside for a mode, as this is
                patch.setattr(module, "find_obstacle", lambda: None)
            yield live
    finally:
        gc.enable()


@functools.cache
def measure(setting, freeze=freeze_nothing, retain=False, **kwargs):
    """Live bytes: peak in forward, after it, peak in backward, at its end, and after it with the loss alive."""
    model = build(setting, **kwargs)
    freeze(model)
    x = inputs(8)
    at_end = []
    with counting(model) as live:
        loss = model(x).square().mean()
        result = {"forward": live.peak, "kept": live.now}
        live.peak = 0
        if model.body.conv1.conv.weight.requires_grad:
            model.body.conv1.conv.weight.register_hook(lambda grad: at_end.append(live.now))
        if loss.requires_grad:
            loss.backward(retain_graph=retain)
        return {**result, "backward": live.peak, "end": sum(at_end), "after": live.now}


def assert_no_more(actual, expected):
    more = {name: (actual[name], most) for name, most in expected.items() if actual[name] > 1.02 * most + SLACK}
    assert not more


@pytest.mark.parametrize("setting", RECOMPUTING)
def test_counted_bytes_show_that_tensors_are_recomputed(setting):
    assert measure(setting)["kept"] < 0.7 * measure("none")["kept"]


@each_setting
@each_network
def test_no_more_is_alive_at_any_time(kwargs, setting):
    assert_no_more(measure(setting, **kwargs), measure("none", **kwargs))


@each_setting
@pytest.mark.parametrize("freeze", FREEZES)
def test_no_more_is_alive_where_parts_are_frozen(freeze, setting):
    assert_no_more(measure(setting, freeze), measure("none", freeze))


@each_setting
@each_network
def test_backward_that_retains_the_graph_adds_nothing_to_it(kwargs, setting):
    measured = measure(setting, retain=True, **kwargs)
    plain = measure("none", retain=True, **kwargs)
    assert measured["after"] - measured["kept"] <= plain["after"] - plain["kept"] + SLACK


@each_setting
def test_backward_that_fails_gives_all_back(setting):
    def run(each):
        model = build(each)
        handle = model.body.layer2[0].conv2.conv.weight.register_hook(lambda grad: 1 / 0)
        with counting(model) as live:
            loss = model(inputs(8)).square().mean()
            with contextlib.suppress(ZeroDivisionError):
                loss.backward()
            failed = live.now
            handle.remove()
            del loss
            return {"failed": failed, "gone": live.now}

    assert_no_more(run(setting), run("none"))


def unused(model):
    model(inputs(8))


def gradient_of_a_part(model):
    y = model(inputs(8))
    torch.autograd.grad(y.sum(), [model.body.layer3[3].conv1.conv.weight])


def gradient_of_a_feature(model):
    _, features = model.forward_intermediates(inputs(8))
    features[2].sum().backward()


def forward_that_fails(model):
    model.body.layer3[2].register_forward_hook(lambda *_: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        model(inputs(8))


@each_setting
@pytest.mark.parametrize("use", [unused, gradient_of_a_part, gradient_of_a_feature, forward_that_fails])
def test_graph_that_is_let_go_is_freed_at_once(use, setting):
    def run(each):
        model = build(each)
        with counting(model) as live:
            use(model)
            return {"freed": live.now}

    assert_no_more(run(setting), run("none"))

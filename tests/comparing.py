"""A small network and a training step, with its results and stored bytes, for comparisons with plain PyTorch."""

import pytest
import torch
from torch import nn

from timm_tresnet import TResNet
from timm_tresnet.recompute.policy import RECOMPUTED
from timm_tresnet.recompute.program import read_program
from timm_tresnet.recompute.run import Run, run_program

SMALL = {"layers": (2, 2, 6, 1), "num_classes": 10, "width_factor": 0.25}
RECOMPUTING = ["activations", "expansions", "checkpointing"]
each_setting = pytest.mark.parametrize(
    "setting", ["activations", pytest.param("expansions", marks=pytest.mark.thorough), "checkpointing"]
)


def make_model(setting="none", seed=0, **kwargs):
    """Make a small network with positive, negative and zero batch norm weights."""
    torch.manual_seed(seed)
    model = TResNet(**{**SMALL, **kwargs}, recompute="activations" if setting == "checkpointing" else setting)
    if setting == "checkpointing":
        model.set_grad_checkpointing()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight, std=0.5)
            module.weight.data[::8] = 0
            nn.init.normal_(module.bias, std=0.2)
    return model


def images(batch=2, size=64, **kwargs):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1), **kwargs)


def run_alone(layer, x, setting="activations"):
    """Run a layer as a program of its own or, with "none", as plain PyTorch."""
    return layer(x) if setting == "none" else run_program(read_program(layer), x, Run(RECOMPUTED[setting]))


def collect(model, loss):
    """Loss, gradients and running statistics, by name, after backward."""
    result = {"loss": loss.detach().clone()}
    for name, parameter in model.named_parameters():
        result[f"grad of {name}"] = None if parameter.grad is None else parameter.grad.clone()
    return {**result, **{name: buffer.clone() for name, buffer in model.named_buffers()}}


def train_step(model, x):
    loss = model(x).square().mean()
    loss.backward()
    return collect(model, loss)


def assert_same(actual, expected):
    """Equal loss and statistics; gradients as close as rounding in their own precision."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
        elif name.startswith("grad"):
            tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(value.dtype, 1e-2)
            assert (actual[name] - value).norm() <= tolerance * value.norm() + 1e-30, name
        else:
            assert torch.equal(actual[name], value), name


def assert_close(actual, expected, tolerance=1e-10):
    """As `assert_same`, where loss and statistics are rounded too."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None or not value.is_floating_point():
            assert actual[name] is value or torch.equal(actual[name], value), name
        else:
            assert (actual[name] - value).norm() <= tolerance * value.norm() + 1e-30, name


def compare(run, setting, **kwargs):
    """Assert that run, from a model to what `collect` returns, gives the same with and with plain PyTorch."""
    results = []
    for each in (setting, "none"):
        torch.manual_seed(2)
        results.append(run(make_model(each, **kwargs)))
    assert_same(*results)


SHOWS_SAVED = hasattr(torch._C._autograd.SavedTensor, "data")
HIDES_SAVED = "this PyTorch does not show what hooks have kept"


def saved_bytes(model, x):
    """Bytes kept for backward: unique storages reachable from the graph, without the model's own."""
    if not SHOWS_SAVED:
        pytest.skip(HIDES_SAVED)
    nodes, seen, storages = [model(x).sum().grad_fn], set(), {}

    def visit(saved):
        for source in getattr(saved, "inputs", ()):
            visit(source)
        tensor = getattr(saved, "tensor", saved)
        if isinstance(tensor, torch.Tensor):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()

    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                raw = getattr(node, name)
                for each in raw if isinstance(raw, tuple | list) else [raw]:
                    try:
                        visit(each.data)
                    except RuntimeError:  # saved outside of a tape
                        visit(getattr(node, name.removeprefix("_raw")))
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    return sum(size for storage, size in storages.items() if storage not in own)

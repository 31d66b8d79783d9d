"""A network that FSDP2 shards, in a group of this one process: what two compute, `test_distributed.py` tests."""

import pytest
import torch
from comparing import HIDES_SAVED, RECOMPUTING, SHOWS_SAVED, collect, images, make_model, saved_bytes
from torch import nn
from users import assert_same

fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = pytest.mark.skipif(
    not hasattr(fsdp, "fully_shard"), reason="this PyTorch has no torch.distributed.fsdp.fully_shard"
)
WRAPPED = ["blocks", "convolutions", "norms", "stages", "network"]  # what is gathered at a time


@pytest.fixture(scope="module")
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def shard(model, wrapped, mesh, **options):
    stages = [module for module in model.body if isinstance(module, nn.Sequential)]
    inner = {
        "blocks": [block for stage in stages for block in stage],
        "convolutions": [module for module in model.body.modules() if type(module) is nn.Conv2d],
        "norms": [module for module in model.body.modules() if isinstance(module, nn.BatchNorm2d)],
        "stages": stages,
        "network": [],
    }[wrapped]
    for module in [*inner, model]:
        fsdp.fully_shard(module, mesh=mesh, **options)
    return model


def step(model, x):
    loss = model(x).square().mean()
    loss.backward()
    found = collect(model, loss)
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in found.items()}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_sharded_network_gives_the_numbers_of_a_plain_one(wrapped, mesh):
    kwargs = {"layers": (1, 1, 3, 1)}
    expected = step(make_model("none", **kwargs), images(2, 32))
    for setting in RECOMPUTING:
        assert_same(step(shard(make_model(setting, **kwargs), wrapped, mesh), images(2, 32)), expected)


@pytest.mark.skipif(not SHOWS_SAVED, reason=HIDES_SAVED)
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_sharded_network_stores_less(wrapped, mesh):
    kept = {
        setting: saved_bytes(shard(make_model(setting, layers=(1, 1, 3, 1)), wrapped, mesh), images())
        for setting in ("none", *RECOMPUTING)
    }
    assert kept["activations"] <= 0.75 * kept["none"]  # each sharded convolution or norm stores its output
    assert kept["expansions"] <= kept["activations"]
    assert kept["checkpointing"] <= 0.5 * kept["none"]


def test_a_hook_that_raises_leaves_nothing_behind(mesh):
    model = shard(make_model("activations", layers=(1, 1, 2, 1)), "blocks", mesh)
    block = model.body.layer3[1]
    before = set(vars(block))
    handle = block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images(2, 32))
    handle.remove()
    assert set(vars(block)) == before

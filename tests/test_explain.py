import pytest
import torch
from comparing import images, make_model, saved_bytes
from torch import nn

SMALL = {"layers": (1, 2, 1, 1)}


def test_table_has_the_memory_of_each_block_and_why_one_stores_all(capsys):
    model = make_model("activations", **SMALL)
    model.body.layer2[1].register_forward_hook(lambda *_: None)
    parts = {part.name: part for part in model.explain_recompute(images())}
    assert parts["body.layer1.0"].reason is None
    assert parts["body.layer1.0"].stored_mb < parts["body.layer1.0"].plain_mb
    assert parts["body.layer2.1"].reason == "a forward hook"
    assert parts["body.layer2.1"].stored_mb == parts["body.layer2.1"].plain_mb
    blocks = parts["body.layer2.0"], parts["body.layer2.1"]
    assert parts["body.layer2"].stored_mb == pytest.approx(sum(part.stored_mb for part in blocks))
    assert "| body.layer2.1 | no: a forward hook |" in capsys.readouterr().out


@pytest.mark.parametrize("setting", ["activations", "expansions"])
def test_bytes_are_those_that_are_reachable_from_the_graph(setting):
    def total(model, column):
        parts = [
            part for part in model.explain_recompute(images()) if "layer" not in part.name or part.name.count(".") > 1
        ]
        return sum(part[column] for part in parts) * 2e6

    model = make_model(setting, **SMALL)
    assert total(model, 2) == pytest.approx(saved_bytes(model, images()), rel=0.02)
    assert total(model, 3) == pytest.approx(saved_bytes(make_model("none", **SMALL), images()), rel=0.02)


@pytest.mark.parametrize("setting", ["activations", "checkpointing"])
def test_network_and_random_numbers_stay_as_they_were(setting):
    model = make_model(setting, drop_path_rate=0.5, **SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(4)
    random = torch.get_rng_state()
    model.explain_recompute(images())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.recompute == model.body.recompute == "activations"
    assert model.body.layer1.grad_checkpointing == (setting == "checkpointing")


def test_obstacle_to_all_is_named_at_each_block():
    model = make_model("activations", **SMALL)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        parts = model.explain_recompute(images())
    finally:
        handle.remove()
    reasons = {part.reason for part in parts}
    assert reasons == {"hooks on all modules are registered", "none of its blocks is recomputed"}

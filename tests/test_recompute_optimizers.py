"""Steps of optimizers between a forward and its backward."""

import pytest
import torch
from comparing import collect, make_model
from users import MODIFIED, inputs

SMALL = {"layers": (1, 1, 2, 1), "width_factor": 0.125}
FUSED = [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad]


def step_between(setting, optimizer, compiled=False, **kwargs):
    model = make_model(setting, **SMALL)
    network = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    loss = network(inputs()).square().mean()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer(model.parameters(), lr=0.1, **kwargs).step()
    loss.backward()
    return collect(model, loss)


@pytest.mark.parametrize("optimizer", FUSED)
@pytest.mark.parametrize("setting", ["expansions", "checkpointing"])
def test_fused_step_before_convolutions_run_again_is_an_error(setting, optimizer):
    with pytest.raises(RuntimeError, match=MODIFIED):
        step_between(setting, optimizer, fused=True)


@pytest.mark.parametrize("optimizer", FUSED)
def test_fused_step_changes_with_activations_what_it_changes_in_plain_pytorch(optimizer):
    plain, ours = (step_between(setting, optimizer, fused=True) for setting in ("none", "activations"))
    assert all(value is ours[name] is None or torch.equal(ours[name], value) for name, value in plain.items())


@pytest.mark.parametrize("setting", ["activations", pytest.param("expansions", marks=pytest.mark.thorough)])
def test_fused_step_before_backward_of_a_compiled_network_is_an_error(setting):
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match=MODIFIED):
        step_between(setting, torch.optim.SGD, compiled=True, fused=True)


def test_weights_of_other_networks_keep_their_versions():
    make_model("expansions", **SMALL)(inputs())
    other = torch.nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    before = other.weight._version
    torch.optim.SGD(other.parameters(), lr=0.1, fused=True).step()
    assert other.weight._version == before

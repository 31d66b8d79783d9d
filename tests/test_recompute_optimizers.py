"""Steps of optimizers between a forward and its backward."""

import pytest
import torch
from comparing import make_model
from users import MODIFIED, inputs, step_between

FUSED = [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad]


@pytest.mark.parametrize("optimizer", FUSED)
@pytest.mark.parametrize("setting", ["expansions", "checkpointing"])
def test_fused_step_before_convolutions_run_again_is_an_error(setting, optimizer):
    with pytest.raises(RuntimeError, match=MODIFIED):
        step_between(setting, optimizer, fused=True)


@pytest.mark.parametrize("optimizer", FUSED)
def test_fused_step_changes_with_activations_what_it_changes_in_plain_pytorch(optimizer):
    plain, ours = (step_between(setting, optimizer, fused=True) for setting in ("none", "activations"))
    assert all(value is ours[name] is None or torch.equal(ours[name], value) for name, value in plain.items())


def test_weights_of_other_networks_keep_their_versions():
    make_model("expansions", layers=(1, 1, 2, 1), width_factor=0.125)(inputs())
    other = torch.nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    before = other.weight._version
    torch.optim.SGD(other.parameters(), lr=0.1, fused=True).step()
    assert other.weight._version == before

import pytest
import torch

from timm_tresnet.models.layers import ReLU


@pytest.mark.parametrize("in_region", [False, True])
def test_relu_works_in_place_where_the_compiler_does_not_run_it_again(in_region, monkeypatch):
    monkeypatch.setattr("timm_tresnet.models.layers.relu.is_in_region", lambda: in_region)
    x = torch.tensor([-1.0, 2.0])
    y = ReLU()(x)
    assert torch.equal(y, torch.tensor([0.0, 2.0]))
    assert torch.equal(x, torch.tensor([-1.0, 2.0]) if in_region else y)


def test_relu_is_pytorchs_to_whoever_looks_for_that():
    assert isinstance(ReLU(), torch.nn.ReLU)
    assert repr(ReLU()) == "ReLU(inplace=True)"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # PyTorch announces its end
def test_relu_scripts():
    assert torch.equal(torch.jit.script(ReLU())(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))

import pytest
import timm.layers
import torch

from timm_tresnet.models.layers import DropPath
from timm_tresnet.recompute import compiled


def images():
    return torch.randn(64, 3, 2, 2, generator=torch.Generator().manual_seed(1))


def run(layer, x):
    torch.manual_seed(2)
    return layer(x)


@pytest.mark.parametrize("in_region", [False, True])
@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("drop_prob", [0.0, 0.4, 1.0])
def test_drop_path_draws_what_timm_draws(drop_prob, scale_by_keep, in_region, monkeypatch):
    monkeypatch.setattr("timm_tresnet.models.layers.drop_path.is_in_region", lambda: in_region)
    expected = run(timm.layers.DropPath(drop_prob, scale_by_keep), images())
    assert torch.equal(run(DropPath(drop_prob, scale_by_keep), images()), expected)


def test_drop_path_does_nothing_in_eval_mode(monkeypatch):
    monkeypatch.setattr("timm_tresnet.models.layers.drop_path.is_in_region", lambda: True)
    assert torch.equal(DropPath(0.4).eval()(images()), images())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # PyTorch announces its end
def test_drop_path_scripts():
    assert torch.equal(run(torch.jit.script(DropPath(0.4)), images()), run(DropPath(0.4), images()))


def test_nothing_but_the_compiler_is_in_a_region():
    assert not compiled.is_in_region()

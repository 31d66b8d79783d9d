import copy
import warnings

import pytest
import torch
from comparing import run_alone
from timm.layers import BatchNormAct2d
from torch import nn

from timm_tresnet.models.layers import ActivatedBatchNorm2d
from timm_tresnet.recompute.policy import SETTINGS


def make_pair(num_features=3, **kwargs):
    """Ours and timm's layer, with the same weights of both signs."""
    theirs = BatchNormAct2d(num_features, act_layer=nn.LeakyReLU, **kwargs)
    for tensor in (theirs.weight, theirs.bias, theirs.running_mean):
        if tensor is not None:
            nn.init.normal_(tensor)
    ours = ActivatedBatchNorm2d(num_features, act_layer=nn.LeakyReLU, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def run(layer, x, setting):
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    y = run_alone(layer, x, setting)
    y.square().sum().backward()
    return {
        "output": y.detach(),
        "grad_x": x.grad,
        **{f"grad_{name}": parameter.grad for name, parameter in layer.named_parameters()},
        **dict(layer.named_buffers()),
    }


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"apply_act": False}],
    ids=["default", "cumulative", "no_statistics", "not_affine", "no_activation"],
)
def test_layer_does_what_timms_does(kwargs, train, setting):
    ours, theirs = make_pair(**kwargs)
    x = torch.randn(4, 3, 5, 6)
    actual, expected = run(ours.train(train), x, setting), run(theirs.train(train), x, "none")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_output_is_the_activated_affine_map_of_the_normalised_input():
    layer, _ = make_pair(dtype=torch.float64)
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    x_hat = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    z = x_hat * layer.weight[:, None, None] + layer.bias[:, None, None]
    for setting in ("none", "activations"):
        torch.testing.assert_close(run_alone(layer, x, setting), torch.where(z > 0, z, 0.01 * z))


def test_single_value_per_channel_is_refused_in_training():
    layer, _ = make_pair()
    x = torch.randn(1, 3, 1, 1)
    with pytest.raises(ValueError, match="more than one value per channel"):
        run_alone(layer, x)


def test_layer_scripts_and_shows_itself_as_timms_does():
    ours, theirs = make_pair()
    x = torch.randn(2, 3, 4, 4)
    with warnings.catch_warnings():  # PyTorch announces the end of TorchScript
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
        scripted = torch.jit.script(ours)
    torch.testing.assert_close(scripted(x), theirs(x), rtol=0, atol=0)
    assert repr(ours).replace("ActivatedBatchNorm2d", "BatchNormAct2d") == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())

import pytest
import timm.layers
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from timm_tresnet import rebuild
from timm_tresnet.layers import DropPath


def run(layer, setting="none"):
    """Input, output and gradient, with the same random numbers every time."""
    x = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.manual_seed(2)
    with rebuild.recording(setting):
        y = layer(x)
        loss = y.square().sum()
    loss.backward()
    return x.detach(), y.detach(), x.grad


@pytest.mark.parametrize("setting", rebuild.SETTINGS)
@pytest.mark.parametrize("scale_by_keep", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_layer_drops_the_images_that_timms_drops(train, scale_by_keep, setting):
    ours, theirs = (each(0.5, scale_by_keep).train(train) for each in (DropPath, timm.layers.DropPath))
    torch.testing.assert_close(run(ours, setting), run(theirs), rtol=0, atol=0)


def test_images_are_dropped_whole_and_the_others_scaled_up():
    x, y, _ = run(DropPath(0.5))
    dropped = (y == 0).all((1, 2, 3), keepdim=True)
    assert 0 < dropped.sum() < len(x)
    torch.testing.assert_close(y, torch.where(dropped, 0, 2 * x))


@pytest.mark.parametrize("setting", rebuild.SETTINGS)
def test_output_is_not_kept_for_backward_where_it_can_be_rebuilt(setting):
    x = torch.randn(8, 3, 2, 2, requires_grad=True)
    with rebuild.recording(setting):
        y = DropPath(0.5)(x)
        loss = y.square().sum()
    output = StorageWeakRef(y.untyped_storage())
    del y
    assert output.expired() == (setting != "none")
    loss.backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch announces the end of TorchScript
def test_layer_scripts_compiles_and_shows_itself_as_timms_does():
    layer, x = DropPath(0.25), torch.randn(8, 3, 2, 2)
    for make in (torch.jit.script, lambda layer: torch.compile(layer, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(2)
        expected = layer(x)
        torch.manual_seed(2)
        assert torch.equal(make(layer)(x), expected)
    assert repr(layer) == repr(timm.layers.DropPath(0.25))

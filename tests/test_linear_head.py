import pytest
import torch
from timm.layers import ClassifierHead

from timm_tresnet.models.layers import LinearHead


@pytest.mark.parametrize("pool_type", ["avg", "fast", "catavgmax"])
@pytest.mark.parametrize("pre_logits", [False, True])
def test_with_pooling_it_is_timms_head(pool_type, pre_logits):
    ours, theirs = LinearHead(6, 3, pool_type), ClassifierHead(6, 3, pool_type)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(ours(x, pre_logits), theirs(x, pre_logits), rtol=0, atol=0)


def test_without_pooling_every_pixel_is_classified():
    head = LinearHead(6, 3, "").eval()
    x = torch.randn(2, 6, 5, 4)
    expected = torch.einsum("nchw,kc->nkhw", x, head.fc.weight) + head.fc.bias[:, None, None]
    torch.testing.assert_close(head(x), expected)
    torch.testing.assert_close(head(x, pre_logits=True), x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch announces the end of TorchScript
@pytest.mark.parametrize("pool_type", ["avg", ""])
def test_it_can_be_scripted(pool_type):
    head = LinearHead(6, 3, pool_type).eval()
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(torch.jit.script(head)(x), head(x))

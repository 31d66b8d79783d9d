import pytest
import torch
from torch import nn

from timm_tresnet import BasicBlock, Bottleneck
from timm_tresnet.models.layers import BlurPool2d

BLOCKS = pytest.mark.parametrize("block", [BasicBlock, Bottleneck])


@BLOCKS
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("anti_alias", [True, False])
def test_block_widens_by_its_expansion_and_divides_the_resolution_by_its_stride(block, stride, anti_alias):
    layer = block(6, 8, stride=stride, anti_alias=anti_alias)
    output = layer(torch.randn(2, 6, 9, 8))
    assert output.shape == (2, 8 * block.expansion, -(-9 // stride), 8 // stride)
    blurs = [module for module in layer.modules() if isinstance(module, BlurPool2d)]
    assert len(blurs) == (stride == 2 and anti_alias)


@BLOCKS
def test_block_is_the_rectified_sum_of_shortcut_and_main_path(block):
    layer = block(8, 8 // block.expansion)
    last = layer.conv2 if block is BasicBlock else layer.conv3
    nn.init.zeros_(last.bn.weight)
    nn.init.zeros_(layer.se.fc2.weight if block is BasicBlock else last.bn.bias)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(layer(x), x.relu())  # with a zero last norm, the main path is silent


@BLOCKS
def test_block_has_at_least_64_reduced_channels_in_its_squeeze_and_excitation(block):
    assert block(16, 16).se.fc1.out_channels == 64
    assert block(16, 512).se.fc1.out_channels == 512 * block.expansion // (4 if block is BasicBlock else 8)
    assert block(16, 16, use_se=False).se is None


@BLOCKS
def test_block_drops_whole_images_from_its_main_path(block):
    layer = block(8, 8 // block.expansion, drop_path_rate=0.5)
    x = torch.randn(64, 8, 4, 4)
    dropped = (layer(x) == x.relu()).flatten(1).all(1).float().mean()
    assert 0.3 < dropped < 0.7


@BLOCKS
def test_block_leaves_its_input_alone(block):
    x = torch.randn(2, 8, 5, 5)
    before = x.clone()
    block(8, 8 // block.expansion)(x)
    assert torch.equal(x, before)

import pytest
import reference
import torch

from timm_tresnet.models.layers import SpaceToDepth


@pytest.mark.parametrize("block_size", [2, 4])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_space_to_depth_orders_channels_by_row_column_and_image_channel(channels, block_size):
    x = torch.randn(2, channels, 8, 12)
    torch.testing.assert_close(SpaceToDepth(block_size)(x), reference.space_to_depth(x, block_size), rtol=0, atol=0)


def test_space_to_depth_takes_channels_last_and_empty_batches():
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(SpaceToDepth()(x), reference.space_to_depth(x), rtol=0, atol=0)
    assert SpaceToDepth()(x[:0]).shape == (0, 48, 2, 2)


@pytest.mark.parametrize("size", [(6, 8), (8, 7), (16, 20)], ids=["height", "width", "too_small"])
def test_space_to_depth_says_which_sizes_work(size):
    with pytest.raises(ValueError, match=f"multiples of 4, at least 20, got {size[0]}x{size[1]}"):
        SpaceToDepth(min_size=20)(torch.zeros(1, 3, *size))


def test_space_to_depth_shows_its_sizes():
    assert repr(SpaceToDepth(min_size=20)) == "SpaceToDepth(block_size=4, min_size=20)"

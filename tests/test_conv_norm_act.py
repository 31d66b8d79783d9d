import functools

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import nn

from timm_tresnet.layers import BlurPool2d, ConvNormAct


def test_conv_norm_act_is_convolution_then_batch_norm_then_activation_then_blur():
    layer = ConvNormAct(
        3,
        4,
        3,
        act_layer=functools.partial(nn.LeakyReLU, negative_slope=0.1),
        aa=BlurPool2d(4, dtype=torch.float64),
        dtype=torch.float64,
    )
    nn.init.normal_(layer.bn.weight)  # negative ones too
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = F.conv2d(x, layer.conv.weight, padding=1)
    expected = (expected - expected.mean((0, 2, 3), keepdim=True)) / (
        expected.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5
    ).sqrt()
    expected = F.leaky_relu(expected * layer.bn.weight[:, None, None] + layer.bn.bias[:, None, None], 0.1)
    torch.testing.assert_close(layer(x), layer.aa(expected))


def test_conv_norm_act_without_activation_is_affine_in_eval():
    layer = ConvNormAct(3, 4, 1).eval()
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(layer(2 * x) - layer(x), layer(3 * x) - layer(2 * x))


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_conv_norm_act_keeps_the_resolution_at_stride_1(kernel_size, dilation):
    assert ConvNormAct(3, 4, kernel_size, dilation=dilation)(torch.randn(2, 3, 9, 8)).shape == (2, 4, 9, 8)


def test_conv_norm_act_is_found_by_what_timm_does_to_batch_norms():
    layer = ConvNormAct(3, 4, 1, act_layer=nn.ReLU)
    assert isinstance(layer.bn, timm.layers.BatchNormAct2d)
    assert isinstance(timm.layers.convert_splitbn_model(layer, 2).bn, timm.layers.SplitBatchNorm2d)


@pytest.mark.parametrize(
    "convert",
    [timm.layers.convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm],
    ids=["timm", "torch"],
)
def test_conversion_to_synchronized_batch_norm_keeps_the_activation_and_the_parameters(convert):
    layer = ConvNormAct(3, 4, 1, act_layer=nn.ReLU)
    norm = layer.bn
    assert convert(layer, "a group").bn is norm
    assert norm.synchronized
    assert norm.process_group == "a group"
    assert "synchronized" in repr(norm)
    assert layer(torch.randn(2, 3, 2, 2)).min() >= 0  # one process: as before


def test_conv_norm_act_takes_another_norm():
    layer = ConvNormAct(3, 32, 1, act_layer=nn.ReLU, norm_layer="groupnorm1")
    assert isinstance(layer.bn, nn.GroupNorm)
    assert layer(torch.randn(1, 3, 2, 2)).min() >= 0

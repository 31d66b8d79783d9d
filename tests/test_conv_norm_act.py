import functools

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import nn

from timm_tresnet.models.layers import ActivatedBatchNorm2d, BlurPool2d, ConvNormAct


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


@pytest.mark.parametrize(
    ("name", "norm"), [("batchnorm2d", ActivatedBatchNorm2d), ("frozenbatchnorm2d", timm.layers.FrozenBatchNormAct2d)]
)
def test_norms_that_timm_has_no_name_for_go_by_name_and_class(name, norm):
    for norm_layer in (name, norm):
        layer = ConvNormAct(3, 8, 1, act_layer=nn.LeakyReLU, norm_layer=norm_layer)
        assert type(layer.bn) is norm
        assert type(layer.bn.act) is nn.LeakyReLU


def test_conv_norm_act_takes_timms_frozen_norm_by_name():
    layer = ConvNormAct(3, 8, 1, act_layer=nn.ReLU, norm_layer="frozenbatchnorm2d", dtype=torch.float64).train()
    assert [name for name, _ in layer.named_parameters()] == ["conv.weight"]
    for name in ("weight", "bias", "running_mean"):
        getattr(layer.bn, name).normal_()
    layer.bn.running_var.uniform_(0.5, 2)
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    norm = {name: getattr(layer.bn, name) for name in ("running_mean", "running_var", "weight", "bias")}
    expected = F.batch_norm(F.conv2d(x, layer.conv.weight), **norm, training=False).relu()
    torch.testing.assert_close(layer(x), expected)


def test_frozen_norms_can_be_unfrozen():
    layer = make_trained(norm_layer="frozenbatchnorm2d")
    x = torch.randn(2, 3, 4, 4)
    expected = layer(x)
    unfrozen = timm.layers.unfreeze_batch_norm_2d(layer)
    assert "bn.weight" in dict(unfrozen.named_parameters())
    torch.testing.assert_close(unfrozen.eval()(x), expected)


def test_conv_norm_act_takes_a_norm_that_knows_neither_device_nor_dtype():
    def make_norm(num_features, apply_act):
        return nn.BatchNorm2d(num_features) if apply_act else nn.InstanceNorm2d(num_features)

    assert type(ConvNormAct(3, 4, 1, norm_layer=make_norm).bn) is nn.InstanceNorm2d


def make_trained(**kwargs):
    """A layer whose batch norm has weights of both signs and statistics of a trained network, in eval mode."""
    layer = ConvNormAct(3, 8, 3, act_layer=functools.partial(nn.LeakyReLU, negative_slope=0.1), **kwargs)
    with torch.no_grad():
        layer.bn.weight.normal_()
        layer.bn.bias.normal_()
        layer.bn.running_mean.normal_()
        layer.bn.running_var.uniform_(0.5, 2)
    return layer.eval()


@pytest.mark.parametrize(
    "convert",
    [
        lambda layer: layer,
        timm.layers.convert_sync_batchnorm,
        pytest.param(
            timm.layers.convert_splitbn_model,
            marks=pytest.mark.skipif(
                Version(timm.__version__) < Version("1.0.31"),
                reason="split batch norm of timm before 1.0.31 leaves the activation out",
            ),
        ),
        timm.layers.freeze_batch_norm_2d,
    ],
    ids=["batch_norm", "synchronised", "split", "frozen"],
)
def test_folded_layer_computes_the_layer_in_eval(convert):
    layer = convert(make_trained(aa=BlurPool2d(8), stride=1, dilation=2)).eval()
    x = torch.randn(2, 3, 9, 10)
    state_dict = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    folded = layer.fuse()
    assert [name for name, _ in folded.named_parameters()] == ["conv.weight", "conv.bias"]
    torch.testing.assert_close(folded(x), layer(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.state_dict(), state_dict, rtol=0, atol=0)


def test_folding_is_done_in_double_precision():
    layer = make_trained().double()
    layer.bn.running_var.fill_(1e-9)
    layer.bn.eps = 1e-12
    folded, in_single = layer.fuse(), layer.float().fuse()
    torch.testing.assert_close(in_single.conv.weight, folded.conv.weight.float(), rtol=2e-7, atol=0)


def test_batch_norm_without_weight_and_convolution_with_bias_fold():
    layer = make_trained()
    layer.bn.register_parameter("weight", None)
    layer.bn.register_parameter("bias", None)
    layer.conv.bias = nn.Parameter(torch.randn(8))
    x = torch.randn(2, 3, 9, 10)
    torch.testing.assert_close(layer.fuse()(x), layer(x), rtol=1e-5, atol=1e-5)


def test_folding_twice_changes_nothing():
    folded = make_trained().fuse()
    assert folded.fuse() is folded


def test_folded_layer_refuses_to_run_in_training_mode():
    folded = make_trained().train().fuse()
    with pytest.raises(ValueError, match="call eval()"):
        folded(torch.randn(2, 3, 9, 10))


@pytest.mark.parametrize("norm_layer", ["groupnorm", "batchnorm2d_without_statistics", "subclass"])
def test_layer_whose_norm_cannot_be_folded_stays(norm_layer):
    layer = ConvNormAct(3, 32, 3, norm_layer="groupnorm" if norm_layer == "groupnorm" else "batchnorm2d")
    if norm_layer == "batchnorm2d_without_statistics":
        layer.bn = nn.BatchNorm2d(32, track_running_stats=False)
    elif norm_layer == "subclass":
        layer.bn = type("OddNorm", (nn.BatchNorm2d,), {})(32)
    assert layer.fuse() is layer


def test_layer_whose_weight_is_computed_stays():
    layer = make_trained()
    nn.utils.parametrizations.weight_norm(layer.conv)
    assert layer.fuse() is layer

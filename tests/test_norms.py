import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode

from timm_tresnet.models.layers.norm_arithmetic import (
    make_affine,
    make_inference_normalization,
    make_normalization,
    scale_and_shift,
)


def make_values(dtype=torch.float32):
    x, weight, bias = torch.randn(3, 4, 5, 6, dtype=dtype), torch.randn(4, dtype=dtype), torch.randn(4, dtype=dtype)
    mean, rstd = x.mean((0, 2, 3)), 1 / (x.var((0, 2, 3), correction=0) + 1e-5).sqrt()
    return x, mean, rstd, weight, bias


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scale_and_shift_do_what_batch_norm_does(dtype, affine):
    x, mean, rstd, weight, bias = make_values(dtype)
    weight, bias = (weight, bias) if affine else (None, None)
    scale, shift = make_affine(mean, rstd, weight, bias)
    assert scale.dtype == shift.dtype == dtype
    expected = (x - mean[:, None, None]) * rstd[:, None, None]
    if affine:
        expected = expected * weight[:, None, None] + bias[:, None, None]
    torch.testing.assert_close(scale_and_shift(x, scale, shift), expected)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("dtype", "of_weights"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float16, torch.float16),  # few values show it, near zero, if the kernel's roundings are missed
    ],
    ids=str,
)
def test_normalization_is_batch_norms_to_the_last_bit(dtype, of_weights, memory_format, affine):
    if of_weights is torch.float16 and Version(torch.__version__) < Version("2.11"):
        pytest.skip("PyTorch 2.5's kernel for float16 weights rounds otherwise")
    for channels in (1, 5, 16, 130):
        x = (3 * torch.randn(2, channels, 33, 17) + 1).to(dtype, memory_format=memory_format)
        weight, bias = (torch.randn(channels).to(of_weights) for _ in range(2)) if affine else (None, None)
        running = torch.zeros(channels, dtype=of_weights), torch.ones(channels, dtype=of_weights)
        y, mean, rstd, *_ = torch._batch_norm_impl_index(x, weight, bias, *running, True, 0.1, 1e-5, True)
        assert torch.equal(y, F.batch_norm(x, *map(torch.clone, running), weight, bias, True, 0.1, 1e-5))
        y = F.leaky_relu(y, 0.2)
        normalize = make_normalization(x, mean, rstd, weight, bias, 0.2)
        for tensor in (weight, bias):
            if tensor is not None:
                tensor.data.mul_(2)
        assert torch.equal(normalize(x), y)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_normalization_by_running_statistics_is_batch_norms_to_the_last_bit(dtype, memory_format, affine):
    values = torch.float32 if dtype == torch.bfloat16 else dtype
    for channels in (1, 5, 16, 37):
        x = torch.randn(2, channels, 3, 5).to(dtype, memory_format=memory_format)
        weight, bias = (torch.randn(channels, dtype=values) for _ in range(2)) if affine else (None, None)
        mean, var = torch.randn(channels, dtype=values), 3 * torch.rand(channels, dtype=values)
        y = F.leaky_relu(F.batch_norm(x, mean, var, weight, bias, eps=1e-4), 0.2)
        normalize = make_inference_normalization(x, mean, var, 1e-4, weight, bias, 0.2)
        for tensor in (mean, var, weight, bias):
            if tensor is not None:
                tensor.data.mul_(2)
        assert torch.equal(normalize(x), y)


def test_half_precision_is_computed_in_single():
    x, mean, rstd, weight, bias = (tensor.bfloat16() for tensor in make_values())
    scale, shift = make_affine(mean, rstd, weight, bias)
    assert scale.dtype == shift.dtype == torch.float32
    assert scale_and_shift(x, scale, shift).dtype == torch.bfloat16


def test_empty_batch_stays_empty():
    assert scale_and_shift(torch.ones(0, 4, 2, 2), torch.ones(4), torch.ones(4)).shape == (0, 4, 2, 2)


def test_statistics_of_fake_tensors_are_not_cached_for_real_ones():
    with FakeTensorMode():
        scale_and_shift(torch.ones(2, 7, 3, 3), torch.ones(7), torch.ones(7))
    assert torch.equal(
        scale_and_shift(torch.ones(2, 7, 3, 3), torch.ones(7), torch.ones(7)), 2 * torch.ones(2, 7, 3, 3)
    )

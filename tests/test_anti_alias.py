import pytest
import reference
import torch
from comparing import run_alone
from torch import nn

from timm_tresnet.models.layers import BlurPool2d, StrideOneAvgPool2d, anti_alias, make_shortcut_pool
from timm_tresnet.models.layers.anti_alias import ShapeOnly


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (3, 4)], ids=["even", "odd", "small"])
def test_blur_pool_is_the_binomial_blur_with_reflected_borders(size, stride, dilation):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    layer = BlurPool2d(3, stride=stride, dilation=dilation, dtype=torch.float64)
    torch.testing.assert_close(layer(x), reference.blur_pool(x, stride, dilation))


def test_blur_pool_gradient_is_that_of_its_output():
    layer = BlurPool2d(2, dtype=torch.float64)
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("channels", [5, 8])
@pytest.mark.parametrize("run", ["eager", "recorded", "scripted"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch announces the end of TorchScript
def test_blur_pool_blurs_however_many_channels_pruning_left(channels, run):
    layer = BlurPool2d(8, dtype=torch.float64)
    x = torch.randn(2, channels, 6, 7, dtype=torch.float64, requires_grad=True)
    if run == "scripted":
        layer = torch.jit.script(layer)
    y = run_alone(layer, x, "activations" if run == "recorded" else "none")
    expected = reference.blur_pool(x)
    torch.testing.assert_close(y, expected)
    grad_y = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad_y), torch.autograd.grad(expected, x, grad_y))


@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (2, 4)], ids=["even", "odd", "small"])
def test_ways_for_channels_last_on_cuda_compute_the_same(size, stride, recorded, monkeypatch):
    def run(layer):
        x = torch.randn(2, 8, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        y = run_alone(layer, x, "activations" if recorded else "none")
        assert y.is_contiguous(memory_format=torch.channels_last)
        grad_y = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).to(memory_format=torch.channels_last)
        (grad_x,) = torch.autograd.grad(y, x, grad_y, create_graph=layer is pool)
        return y, grad_x

    blur, pool = BlurPool2d(8, stride=stride, dtype=torch.float64), make_shortcut_pool()
    expected = [run(blur), run(pool)]
    monkeypatch.setattr(
        anti_alias, "_is_channels_last_on_cuda", lambda x: x.is_contiguous(memory_format=torch.channels_last)
    )
    torch.testing.assert_close([run(blur), run(pool)], expected, rtol=1e-14, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own, in its rules
def test_pool_for_channels_last_on_cuda_has_derivatives_of_every_kind():
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(anti_alias._EvenPool.apply, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(anti_alias._EvenPool.apply, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_blur_pool_kernel_is_exact_in_half_precision(dtype):
    assert torch.equal(BlurPool2d(1, dtype=dtype).kernel.double(), BlurPool2d(1, dtype=torch.float64).kernel)


def test_blur_pool_keeps_its_kernel_out_of_the_state_dict_and_refills_it_after_the_meta_device():
    layer = BlurPool2d(4, device="meta")
    assert not layer.state_dict()
    layer = layer.to_empty(device="cpu")
    layer.init_non_persistent_buffers()
    torch.testing.assert_close(layer.kernel.sum((1, 2, 3)), torch.ones(4))


def test_blur_pool_refuses_what_it_cannot_reflect():
    with pytest.raises(ValueError, match="at least 2, got 1x4"):
        BlurPool2d(3)(torch.zeros(1, 3, 1, 4))


@pytest.mark.parametrize("dilation", [1, 2])
def test_stride_one_average_pool_leaves_out_taps_beyond_the_border(dilation):
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(
        StrideOneAvgPool2d(dilation)(x)[:, :, :-dilation, :-dilation],
        reference.average_pool(x, stride=1, dilation=dilation)[:, :, :-dilation, :-dilation],
    )


def test_stride_one_average_pool_agrees_with_the_strided_one_where_that_keeps_a_pixel():
    x = torch.randn(2, 3, 7, 8)
    strided = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(StrideOneAvgPool2d()(x)[:, :, ::2, ::2], strided(x))


def test_layers_show_their_settings():
    assert repr(BlurPool2d(3)) == "BlurPool2d(3, stride=2, dilation=1)"
    assert repr(StrideOneAvgPool2d(2)) == "StrideOneAvgPool2d(dilation=2)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_blur_computes_in_the_dtype_of_its_input(dtype):
    # FSDP's mixed precision casts weights and inputs, but no buffers.
    x = torch.randn(2, 3, 8, 6).to(dtype)
    assert torch.equal(BlurPool2d(3)(x), BlurPool2d(3, dtype=dtype)(x))


@pytest.mark.parametrize("on_cuda", [False, True], ids=["autograd", "as_on_cuda"])
def test_gradients_of_the_recorded_blur_are_those_of_its_output(on_cuda, monkeypatch):
    monkeypatch.setattr(anti_alias, "_is_channels_last_on_cuda", lambda x: on_cuda)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    for stride, dilation in ((2, 1), (1, 1), (1, 2)):
        layer = BlurPool2d(3, stride, dilation, dtype=torch.float64)

        def run(x, layer=layer):
            return run_alone(layer, x * x)  # of which there is a second derivative

        assert torch.autograd.gradcheck(run, x)
        assert torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("on_cuda", [False, True], ids=["autograd", "as_on_cuda"])
def test_recorded_blur_keeps_nothing_of_the_size_of_its_input(on_cuda, autocast, monkeypatch):
    monkeypatch.setattr(anti_alias, "_is_channels_last_on_cuda", lambda x: on_cuda)
    x = torch.randn(2, 3, 4, 6, requires_grad=True) * 1
    with torch.autocast("cpu", enabled=autocast):
        y = run_alone(BlurPool2d(3), x)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    convolution = y.grad_fn
    blank = convolution._saved_input
    assert (blank.shape, blank.dtype) == ((2, 3, 6, 8), y.dtype)
    padding = convolution.next_functions[0][0]
    while padding.name() != ("_ReflectOnCudaBackward" if on_cuda else "ReflectionPad2DBackward0"):
        padding = padding.next_functions[0][0]
    if not on_cuda:
        assert padding._saved_self.shape == x.shape
        assert padding._saved_self.data_ptr() != x.data_ptr()


def test_gradient_of_the_recorded_blur_reads_no_values(monkeypatch):
    monkeypatch.setattr(ShapeOnly, "materialize", lambda blank: torch.full(blank.shape, torch.nan))
    x, layer = torch.randn(2, 3, 6, 5, requires_grad=True), BlurPool2d(3)
    expected = torch.autograd.grad(layer(x).square().sum(), x)
    y = run_alone(layer, x)
    assert y.grad_fn._saved_input.isnan().all()
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected[0])

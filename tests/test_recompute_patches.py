"""Functions and modules of the network that users change: forwards, paddings, blurs, modes."""

import pytest
import torch
import torch.nn.functional as F
from comparing import collect, train_step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from users import inputs, same_as_plain, units

from timm_tresnet.models.blocks import BasicBlock
from timm_tresnet.models.layers import BlurPool2d


@same_as_plain("circular", "reflect", "replicate")
def test_padding_mode(mode, model):
    for u in units(model):
        if u.conv.kernel_size != (1, 1):
            u.conv.padding_mode = mode
            u.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    return train_step(model, inputs())


@same_as_plain()
def test_conv_forward_patched(model):
    for u in units(model):
        u.conv._conv_forward = lambda x, w, b, c=u.conv: F.conv2d(x, w * 1.5, b, c.stride, c.padding, c.dilation) + 0.1
    return train_step(model, inputs())


@same_as_plain()
def test_conv_forward_patched_edits_data(model):
    def patch(conv):
        original = conv._conv_forward

        def forward(x, w, b):
            x.data.mul_(1.5)
            return original(x, w, b)

        conv._conv_forward = forward

    for u in units(model.body.layer3):
        patch(u.conv)
    return train_step(model, inputs())


@same_as_plain("conv", "act", "block", "unit", "norm", "stage", "class", "se")
def test_forward_patched(what, model):
    block = model.body.layer3[2]
    target = {
        "conv": block.conv3.conv,
        "act": block.act,
        "block": block,
        "unit": block.conv3,
        "norm": block.conv1.bn,
        "stage": model.body.layer3,
        "class": block,
        "se": block.se,
    }[what]
    original = target.forward

    def forward(x):
        y = original(x)
        y.data.mul_(1.1)
        return y * 1.1

    if what == "class":
        with pytest.MonkeyPatch.context() as patch:
            plain = nn.LeakyReLU.forward
            patch.setattr(nn.LeakyReLU, "forward", lambda self, x: plain(self, x) * 1.1 + 0.1)
            return train_step(model, inputs())
    target.forward = forward
    return train_step(model, inputs())


@same_as_plain("class_block", "class_conv", "class_relu")
def test_class_patched_editing_data(what, model):
    cls = {"class_block": BasicBlock, "class_conv": nn.Conv2d, "class_relu": nn.ReLU}[what]
    plain = cls.forward

    def forward(self, x):
        y = plain(self, x)
        y.data.mul_(1.1)
        return y + 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "forward", forward)
        return train_step(model, inputs())


@same_as_plain()
def test_blur_trained(model):
    for m in list(model.modules()):
        if isinstance(m, BlurPool2d):
            kernel = m.kernel
            del m.kernel
            m.kernel = nn.Parameter(kernel)
    return train_step(model, inputs())


@same_as_plain()
def test_blur_buffer_that_requires_grad(model):
    kernels = [m.kernel.requires_grad_() for m in model.modules() if isinstance(m, BlurPool2d)]
    return {**train_step(model, inputs()), **{str(i): k.grad for i, k in enumerate(kernels)}}


@same_as_plain("function", "dispatch")
def test_changed_functions(kind, model):
    from torch.overrides import TorchFunctionMode

    class Steeper(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if function in (F.leaky_relu, F.leaky_relu_, torch.nn.functional.leaky_relu_):
                return function(args[0], 0.3, **{k: v for k, v in kwargs.items() if k != "negative_slope"})
            return function(*args, **kwargs)

    class SteeperBelow(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.leaky_relu_.default:
                return function(args[0], 0.3)
            return function(*args, **(kwargs or {}))

    with Steeper() if kind == "function" else SteeperBelow():
        y = model(inputs())
    loss = y.square().mean()
    loss.backward()
    return collect(model, loss)


@same_as_plain()
def test_dispatch_mode(model):
    with FlopCounterMode(display=False):
        return train_step(model, inputs())


CLASSES = (nn.Identity, nn.LeakyReLU, nn.Conv2d, BasicBlock)


def replace(patch, kind):
    original = kind.forward
    patch.setattr(kind, "forward", lambda *args, **kwargs: original(*args, **kwargs) * 1.5)


@same_as_plain(*CLASSES)
def test_forward_of_a_class_patched(kind, model):
    with pytest.MonkeyPatch.context() as patch:
        replace(patch, kind)
        return train_step(model, inputs())


@same_as_plain(*CLASSES)
def test_forward_of_a_class_patched_by_a_hook(kind, model):
    with pytest.MonkeyPatch.context() as patch:
        model.body.layer2[0].register_forward_hook(lambda *_: replace(patch, kind))
        return train_step(model, inputs())

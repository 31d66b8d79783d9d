"""Weights, statistics and images that users replace: of other classes and layouts, missing, out of range."""

import numpy as np
import pytest
import torch
from comparing import RECOMPUTING, saved_bytes, train_step
from torch import nn
from torchvision import tv_tensors
from users import BEFORE_2_11, build, inputs, same_as_plain, step_after

from timm_tresnet.models.layers import ActivatedBatchNorm2d, BlurPool2d


class Image(torch.Tensor):
    """A tensor class that operations preserve, like those of fastai and MONAI."""


class Weight(nn.Parameter):
    """One that they do not."""


def norms(model):
    return [module for module in model.modules() if isinstance(module, ActivatedBatchNorm2d)]


def every_other(tensor):
    """The same values in a layout with gaps."""
    return torch.stack([tensor.detach(), torch.zeros_like(tensor)], -1)[..., 0]


def no_bias(norm):
    norm.bias = None


def no_weight(norm):
    norm.weight = None


def no_bias_in_eval_mode(norm):
    norm.eval().bias = None


def no_weight_in_eval_mode(norm):
    norm.eval().weight = None


def zero_eps(norm):
    norm.eps = 0.0


def negative_eps_in_eval_mode(norm):
    norm.eval().eps = -1e-3


def whole_eps(norm):
    norm.eps = 1


def weight_with_gaps(norm):
    norm.weight = nn.Parameter(every_other(norm.weight))


def bias_with_gaps(norm):
    norm.bias = nn.Parameter(every_other(norm.bias))


def mean_with_gaps(norm):
    norm.running_mean = every_other(norm.running_mean)


def var_with_gaps_in_eval_mode(norm):
    norm.eval().running_var = every_other(norm.running_var)


def weight_of_a_class(norm):
    norm.weight = Weight(norm.weight.detach())


def mean_of_a_class(norm):
    norm.running_mean = norm.running_mean.as_subclass(Image)


def count_of_a_class(norm):
    norm.num_batches_tracked = norm.num_batches_tracked.as_subclass(Image)


NORMS = (no_weight_in_eval_mode, no_bias, weight_with_gaps, mean_of_a_class, zero_eps, negative_eps_in_eval_mode)
NORMS += (no_weight, no_bias_in_eval_mode, whole_eps, bias_with_gaps, mean_with_gaps, var_with_gaps_in_eval_mode)
NORMS += (weight_of_a_class, count_of_a_class)


@same_as_plain(
    *NORMS,
    few=6,
    raises=None if BEFORE_2_11 else "batch_norm eps must be",
    when=lambda edit: edit in (zero_eps, negative_eps_in_eval_mode),
)
def test_norms(edit, model):
    for norm in norms(model):
        edit(norm)
    return train_step(model, inputs())


@same_as_plain()
def test_eps_that_is_edited_between_forward_and_backward(model):
    for norm in norms(model):
        norm.eval().eps = torch.tensor(1e-3)
    return step_after(model, lambda _: [norm.eps.mul_(3) for norm in norms(model)])


@same_as_plain()
def test_images_of_a_class(model):
    return train_step(model, inputs().as_subclass(Image))


@same_as_plain("conv1.conv", "conv3", "se", "", few=4)
def test_output_of_a_hook_of_a_class(name, model):
    module = model.body.layer3[2].get_submodule(name)
    module.register_forward_hook(lambda module, args, y: y.as_subclass(Image))
    return train_step(model, inputs())


@same_as_plain()
def test_output_of_the_stem_of_a_class(model):
    model.body.conv1.register_forward_hook(lambda module, args, y: y.as_subclass(Image))
    return train_step(model, inputs())


@same_as_plain()
def test_blur_of_a_class(model):
    for module in model.modules():
        if isinstance(module, BlurPool2d):
            module.kernel = module.kernel.as_subclass(Image)
    return train_step(model, inputs())


@same_as_plain()
def test_convolutions_of_a_class(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = Weight(module.weight.detach())
    return train_step(model, inputs())


@same_as_plain()
def test_tensor_in_place_of_a_parameter(model):
    block = model.body.layer3[1]
    block.conv1.conv.__dict__["weight"] = torch.ones_like(block.conv1.conv.weight)
    block.conv2.bn.__dict__["bias"] = torch.ones_like(block.conv2.bn.bias)
    return train_step(model, inputs())


@same_as_plain(raises="running_mean should contain")
def test_stage_that_gets_a_single_image(model):
    model.body.layer1.register_forward_pre_hook(lambda stage, args: args[0][0])
    return train_step(model, inputs())


@pytest.mark.parametrize("setting", RECOMPUTING)
def test_what_changes_nothing_costs_no_memory(setting):
    expected = saved_bytes(build(setting), inputs())
    assert saved_bytes(build(setting), tv_tensors.Image(inputs())) <= expected
    model = build(setting)
    for norm in norms(model):
        norm.eps = np.float64(1e-5)
    assert saved_bytes(model, inputs()) == expected
    for norm in norms(model):
        norm.eps = 1
    assert saved_bytes(model, inputs()) == expected

"""Programs that blocks are read into, and reasons why some are not."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from timm_tresnet.models.blocks import Bottleneck
from timm_tresnet.models.layers import ActivatedBatchNorm2d
from timm_tresnet.models.layers.activated_batch_norm import Norm
from timm_tresnet.models.layers.anti_alias import Blur
from timm_tresnet.models.layers.readers import Convolution, DropPath, Map
from timm_tresnet.models.layers.squeeze_excite import Gate
from timm_tresnet.recompute.policy import EXPANSION
from timm_tresnet.recompute.program import Unreadable, read_program
from timm_tresnet.recompute.run import Call
from timm_tresnet.recompute.stage import Stage


def make_block(stride=2, **kwargs):
    """A block with everything that one can have."""
    return Bottleneck(8, 4, stride, **{"act_layer": nn.LeakyReLU, **kwargs}).train()


def kinds(operations):
    return [type(operation) for operation in operations]


def test_block_is_read_into_its_operations_in_their_order():
    program = read_program(make_block(drop_path_rate=0.1))
    unit = [Convolution, Norm]
    assert kinds(program.operations) == [*unit, *unit, Blur, Gate, *unit, DropPath]
    assert kinds(program.shortcut) == [Map, *unit]
    assert [each.kind for each in program.operations if type(each) is Convolution][2] == EXPANSION
    assert program.is_repeatable()
    assert not program.exposes_input()


@pytest.mark.parametrize("name", ["tresnet_m", "tresnet_v2_l", "tresnet_d"])
def test_every_block_of_the_papers_networks_is_a_program_without_calls(name):
    model = timm.create_model(name, width_factor=0.125).train()
    for stage in model.body:
        for block in stage if isinstance(stage, Stage) else ():
            program = read_program(block)
            assert Call not in kinds([*program.operations, *program.shortcut, *(program.behind or [])])


def test_drop_path_is_left_out_where_it_does_nothing():
    assert DropPath not in kinds(read_program(make_block(drop_path_rate=0.1).eval()).operations)


@pytest.mark.parametrize("act", [nn.SiLU, nn.ReLU, nn.GELU, nn.Hardswish, nn.Tanh], ids=lambda act: act.__name__)
def test_activation_other_than_leaky_relu_is_an_operation_of_its_own(act):
    convolution, norm, *_ = read_program(make_block(act_layer=act)).operations
    assert kinds((convolution, norm, norm.act)) == [Convolution, Norm, Map]


def set_attribute(name, value):
    def edit(block):
        *path, last = name.split(".")
        block.get_submodule(".".join(path)).__dict__[last] = value

    return edit


def replace(name, module):
    return lambda block: block.set_submodule(name, module)


class Doubling(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


CALLED = {  # by what is called, and whether user code sees its input
    "subclass": ("conv1.conv", replace("conv1.conv", Doubling(8, 4, 1, bias=False)), True),
    "hook": ("conv2.conv", lambda block: block.conv2.conv.register_forward_hook(lambda *_: None), True),
    "patched": ("conv1.conv", set_attribute("conv1.conv.forward", lambda x: x), True),
    "conv_forward": ("conv1.conv", set_attribute("conv1.conv._conv_forward", lambda *_: None), True),
    "compiled": ("conv1.conv", lambda block: block.conv1.conv.compile(), True),
    "weight_norm": ("conv1.conv", lambda block: parametrizations.weight_norm(block.conv1.conv), False),
    "prune": ("conv3.conv", lambda block: prune.l1_unstructured(block.conv3.conv, "weight", 0.5), False),
    "padding_mode": ("conv1.conv", set_attribute("conv1.conv.padding_mode", "reflect"), False),
    "stride_that_can_be_edited": ("conv2.conv", set_attribute("conv2.conv.stride", [1, 1]), False),
    "eps_that_can_be_edited": ("conv1.bn", set_attribute("conv1.bn.eps", torch.tensor(1e-5)), False),
    "no_statistics": ("conv1.bn", set_attribute("conv1.bn.track_running_stats", False), False),
    "dropout": ("conv1.bn", replace("conv1.bn.drop", nn.Dropout(0.5)), False),
    "other_norm": ("conv1.bn", replace("conv1.bn", nn.BatchNorm2d(4)), False),
    "slope_that_can_be_edited": (
        "conv1.bn.act",
        set_attribute("conv1.bn.act.negative_slope", torch.tensor(0.1)),
        False,
    ),
    "trained_blur": ("conv2.aa", lambda block: block.conv2.aa.kernel.requires_grad_(), False),
}


@pytest.mark.parametrize(("name", "edit", "is_user_defined"), CALLED.values(), ids=CALLED)
def test_part_without_recipe_is_called(name, edit, is_user_defined):
    block = make_block()
    edit(block)
    operations = read_program(block).operations
    parts = [part for each in operations for part in (each, getattr(each, "act", None))]
    calls = [each for each in parts if type(each) is Call]
    assert [(each.module, each.is_user_defined) for each in calls] == [
        (block.get_submodule(name), is_user_defined),
    ]


def test_user_code_at_the_beginning_of_a_block_sees_its_input():
    block = make_block()
    block.conv2.conv.register_forward_hook(lambda *_: None)
    assert not read_program(block).exposes_input()
    block.conv1.conv.register_forward_hook(lambda *_: None)
    assert read_program(block).exposes_input()


class Mine(nn.LeakyReLU):
    pass


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda block: block.register_forward_hook(lambda *_: None), "a forward hook"),
        (lambda block: block.se.register_forward_pre_hook(lambda *_: None), "se: a forward hook"),
        (lambda block: block.act.register_full_backward_hook(lambda *_: None), "activation: a backward hook"),
        (lambda block: block.conv2.bn.compile(), "conv2: it is compiled"),
        (set_attribute("conv3.bn._call_impl", lambda *_: None), "conv3: a replaced _call_impl"),
        (set_attribute("downsample.1.forward", lambda x: x), "downsample: a replaced forward"),
        (replace("conv1.bn.act", Mine()), "conv1: .*Mine"),
        (replace("conv1", nn.Identity()), "conv1: a Identity"),
        (replace("act", nn.SiLU()), "last activation: a SiLU"),
        (lambda block: delattr(block, "se"), "se: it is missing"),
        (replace("se.gate", Mine()), "se: .*Mine"),
    ],
)
def test_block_in_which_user_code_sees_more_is_unreadable(edit, reason):
    block = make_block()
    read_program(block)
    edit(block)
    with pytest.raises(Unreadable, match=reason):
        read_program(block)


def test_subclass_of_a_block_is_unreadable():
    class MyBlock(Bottleneck):
        pass

    with pytest.raises(Unreadable, match="MyBlock"):
        read_program(MyBlock(8, 4, act_layer=nn.LeakyReLU))


def test_absent_parts_are_no_operations():
    block = make_block(1)
    block.se = block.downsample = None
    assert kinds(read_program(block).operations) == [Convolution, Norm] * 3
    assert read_program(block).shortcut == []


def test_norm_in_eval_mode_uses_its_running_statistics():
    norm = ActivatedBatchNorm2d(4, act_layer=nn.LeakyReLU).eval()
    (operation,) = read_program(norm).operations
    count, _, _, _, _, use_batch, *_ = operation.normalize.args
    assert count is None
    assert use_batch is False


PATCHED = """
import torch
{}
from timm_tresnet.models.layers.readers import read_convolution
print(type(read_convolution(torch.nn.Conv2d(1, 1, 1))).__name__)
"""


@pytest.mark.parametrize(
    ("patch", "kind"),
    [
        ("pass", "Convolution"),
        ("torch.nn.Conv2d = type('QuantConv2d', (torch.nn.Conv2d,), {'forward': lambda self, x: x})", "Call"),
    ],
    ids=["none", "class"],
)
def test_class_that_was_patched_before_this_package_came_is_called(patch, kind, run_child):
    assert run_child(PATCHED.format(patch)).strip() == kind

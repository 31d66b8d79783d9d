import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_tresnet.models.layers import ActivatedBatchNorm2d
from timm_tresnet.recompute import rebuild
from timm_tresnet.recompute.saved import Kept, Rebuilt
from timm_tresnet.recompute.tape import _POINTWISE, Tape


def test_norm_and_activation_keep_their_input_and_numbers_a_channel():
    layer = ActivatedBatchNorm2d(4, act_layer=nn.LeakyReLU)
    images = torch.randn(2, 4, 8, 8, requires_grad=True)
    with rebuild.recording("activations"):
        x = nn.functional.conv2d(images, torch.randn(4, 4, 1, 1))
        y = layer(x)
        z = nn.functional.conv2d(y, torch.ones(1, 4, 1, 1, requires_grad=True))
        rebuild.open_tape().add_output(z.relu())
    norm = y.grad_fn.next_functions[0][0]
    assert norm._saved_input.data_ptr() == x.data_ptr()
    assert all(saved.shape == (4,) for saved in (norm._saved_weight, norm._saved_result1, norm._saved_result2))
    for made in (y.grad_fn._saved_result, z.grad_fn._saved_input):
        assert made.data_ptr() != y.data_ptr()
        assert torch.equal(made, y)


def test_names_of_pointwise_nodes_are_those_that_rebuilding_knows():
    x = torch.randn(2, 3, requires_grad=True)
    functions = [F.celu, F.elu, F.gelu, F.hardsigmoid, F.hardswish, F.relu6, F.leaky_relu, F.mish, F.relu, F.silu]
    nodes = [function(x).grad_fn for function in (*functions, F.selu, torch.sigmoid, torch.tanh)]
    nodes.append(F.leaky_relu_(x * 1, 0.1).grad_fn)
    assert {node.name() for node in nodes} == set(_POINTWISE)
    for node in nodes:
        saved, _, constants = _POINTWISE[node.name()]
        assert hasattr(node, f"_raw_saved_{saved}")
        assert all(hasattr(node, f"_saved_{name}") for name in constants)


def make_block(x, last=torch.relu_):
    """A convolution, a norm and the rectified sum with a shortcut, taken up by an open tape."""
    y = F.conv2d(x, torch.randn(4, 4, 1, 1, requires_grad=True))
    z = last(ActivatedBatchNorm2d(4, act_layer=nn.LeakyReLU, apply_act=False)(y) + x)
    return z


def has_let_go(y):
    """Whether the node of a rectified sum makes its result again."""
    return y.grad_fn._saved_result.data_ptr() != y.data_ptr()


@pytest.fixture
def tape():
    with rebuild.recording("activations"):
        yield rebuild.open_tape()


@pytest.fixture
def kept(tape):
    """Output of a block that stays."""
    y = make_block(torch.randn(2, 4, 3, 3, requires_grad=True))
    tape.add_kept(y)
    return y


def test_last_output_is_let_go_when_something_has_been_made_from_it(tape, kept):
    first = make_block(kept)
    tape.add_output(first)
    assert not has_let_go(first)
    second = make_block(first)
    tape.add_output(second)
    assert [has_let_go(y) for y in (kept, first, second)] == [False, True, False]
    assert torch.equal(first.grad_fn._saved_result, first)


def test_nothing_is_made_from_what_others_see(tape, kept):
    tape.show(kept)
    first = make_block(kept)
    tape.add_output(first)
    second = make_block(first)
    tape.add_output(second)
    tape.show(second)
    make_block(second)
    assert [has_let_go(y) for y in (kept, first, second)] == [False, False, False]


def test_edited_output_is_left_to_pytorch(tape, kept):
    first = make_block(kept)
    tape.add_output(first)
    with torch.no_grad():
        first.mul_(2)
    make_block(first)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()


def test_tape_has_what_is_kept_and_what_is_rebuilt_by_the_node_that_made_it():
    x = torch.randn(2, 4, 3, 3, requires_grad=True) * 1
    tape = Tape("activations")
    z = (x + x).relu_()
    tape.add_kept(z)
    kept = tape._find((z.grad_fn, 0))
    assert type(kept) is Kept
    made = tape._find(((z * torch.ones(4, 1, 1, requires_grad=True)).grad_fn, 0))
    assert type(made) is Rebuilt
    assert made.inputs[0] is kept

import threading
import weakref

import pytest
import torch

from timm_tresnet.models.layers.anti_alias import ShapeOnly
from timm_tresnet.recompute.saved import Recomputed, Stored, discard


@pytest.fixture
def made():
    """Functions that were called, in order."""
    return []


def recomputed(made, value, *inputs, **kwargs):
    def function(*inputs):
        made.append(value)
        return torch.full((3,), float(value)) + sum(inputs)

    return Recomputed(function, inputs, **kwargs)


def test_kept_tensor_is_given_out_until_it_is_edited():
    tensor = torch.ones(3)
    kept = Stored(tensor)
    assert kept.materialize().data_ptr() == tensor.data_ptr()
    tensor.view(3)[0].add_(1)
    with pytest.raises(RuntimeError, match=r"shape \(3,\) .* modified by an inplace operation .* modify a clone"):
        kept.materialize()


def test_tensor_is_made_of_what_it_is_made_of(made):
    source = recomputed(made, 1, recomputed(made, 2), Stored(torch.full((3,), 10.0)))
    assert torch.equal(source.materialize(), torch.full((3,), 13.0))
    assert made == [2, 1]


def save(x, source):
    """The square of x; its node requests both factors from the source."""
    y = x * x
    node = y.grad_fn
    discard(node._raw_saved_self, source.pack)
    discard(node._raw_saved_other, source.pack)
    return y


def test_value_is_shared_within_a_pass_and_dropped_after_it(made):
    x = torch.ones(3, requires_grad=True)
    source = recomputed(made, 2, version=x._version)
    y = save(x, source)
    for count in (1, 2):
        y.sum().backward(retain_graph=True)
        assert made == [2] * count
        assert not source._shared
    assert torch.equal(x.grad, torch.full((3,), 8.0))  # what was made, not x


def test_value_for_which_somebody_does_not_ask_is_dropped_too(made):
    x, other = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    source = recomputed(made, 2)
    first, second = x * 1.0, other * 1.0
    y = first * second
    node = y.grad_fn
    discard(node._raw_saved_self, source.pack)
    source.add_consumer()  # somebody who will not ask
    torch.autograd.grad(y.sum(), other, retain_graph=True)
    assert made == [2]
    assert not source._shared


def test_failed_pass_leaves_its_values_to_the_next_one(made):
    x = torch.ones(3, requires_grad=True)
    source = recomputed(made, 2)
    y = save(x, source)
    source.add_consumer()  # somebody who will not ask
    handle = x.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        y.sum().backward(retain_graph=True)
    handle.remove()
    y.sum().backward()
    assert made == [2, 2]
    assert not source._shared


def test_other_version_of_a_tensor_is_kept_as_it_is(made):
    x = torch.ones(3)
    x.add_(1)
    packed = recomputed(made, 5).pack(x)
    assert type(packed) is Stored
    assert torch.equal(packed.materialize(), x)
    assert type(recomputed(made, 5, version=1).pack(x)) is Recomputed
    assert made == []


def test_layout_is_that_of_the_tensor():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    source = Recomputed(lambda: x.detach().contiguous().clone(), ())
    assert source.pack(x) is source
    assert source.materialize().stride() == x.stride()
    assert torch.equal(source.materialize(), x)


def test_blank_has_shape_layout_and_dtype_of_the_tensor_and_not_the_tensor():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    storage = weakref.ref(x.untyped_storage())
    blank = ShapeOnly(x)
    del x
    assert storage() is None
    tensor = blank.materialize()
    assert (tensor.shape, tensor.dtype, tensor.device.type) == ((2, 3, 4, 5), torch.float64, "cpu")
    assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_values_that_backward_does_not_read_are_let_go():
    x = torch.ones(1, 1, 4, 4, requires_grad=True)
    node = (y := torch.nn.functional.conv2d(x, torch.ones(1, 1, 3, 3))).grad_fn
    discard(node._raw_saved_input, ShapeOnly, ShapeOnly.materialize)
    assert node._saved_input.data_ptr() != x.data_ptr()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad[0, 0, 0], torch.tensor([1.0, 2.0, 2.0, 1.0]))


def test_hooks_of_others_are_left_alone(made):
    x = torch.ones(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        node = (x * x).grad_fn
    discard(node._raw_saved_self, recomputed(made, 1).pack)
    discard(node._raw_saved_self, ShapeOnly, ShapeOnly.materialize)
    assert node._saved_self.data_ptr() == x.data_ptr()


def test_what_is_not_saved_is_not_let_go(made):
    node = (torch.ones(3, requires_grad=True) * torch.ones(3)).grad_fn
    discard(node._raw_saved_self, recomputed(made, 1).pack)
    assert node._saved_self is None


def test_autocast_and_grad_mode_of_backward_do_not_reach_what_is_made():
    seen = []

    def function(x):
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return x.clone()

    x = torch.ones(3, requires_grad=True)
    y = save(x, Recomputed(function, (Stored(x),)))
    with torch.autocast("cpu"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    assert seen == [(False, False)]


def test_threads_that_share_a_graph_share_no_values(made):
    x = torch.ones(1000, requires_grad=True)
    source = Recomputed(lambda x: x * 2, (Stored(x),))
    y = save(x, source)
    grads = []

    def work():
        for _ in range(50):
            grads.append(torch.autograd.grad(y.sum(), x, retain_graph=True)[0])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(grads) == 200
    assert all(torch.equal(grad, torch.full((1000,), 4.0)) for grad in grads)
    assert not source._shared


class Refuses:
    """A saved tensor on which hooks cannot be put, for a reason."""

    def __init__(self, reason):
        self.reason = reason

    def register_hooks(self, pack, unpack):
        raise RuntimeError(self.reason)


def test_errors_that_are_no_refusals_of_hooks_are_not_swallowed(made):
    discard(Refuses("Calling register_hooks on a saved tensor whose value is None"), recomputed(made, 1).pack)
    with pytest.raises(RuntimeError, match="worker .* is killed"):  # as DataLoader raises in a signal handler
        discard(Refuses("DataLoader worker (pid 1) is killed by signal"), recomputed(made, 1).pack)

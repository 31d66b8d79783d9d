"""The synchronized norm in one process; `test_distributed.py` has it in two."""

import pytest
import torch
from torch import nn

from timm_tresnet.models.layers.synchronized_norm import SynchronizedNorm, reduce_statistics


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.usefixtures("one_process")
def test_gradients_of_the_synchronized_norm_are_those_of_its_output(affine):
    def normalize(x, weight=None, bias=None):
        mean, var, count = reduce_statistics(x, None)
        return SynchronizedNorm.apply(x, weight, bias, mean, var, count, 1e-5, None)

    x = torch.randn(3, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.tensor([[-0.5, 0.0], [0.3, 1.0]], dtype=torch.float64).requires_grad_().unbind()
    inputs = (x, weight, bias) if affine else (x,)
    assert torch.autograd.gradcheck(normalize, inputs)
    torch.testing.assert_close(
        normalize(*inputs), nn.functional.batch_norm(x, None, None, *(inputs[1:] or (None, None)), True)
    )

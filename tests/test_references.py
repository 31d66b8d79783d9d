"""Whether anything else refers to a tensor or its memory."""

import pytest
import torch

from timm_tresnet.utils.references import is_held


@pytest.mark.parametrize(
    "keep", [lambda x: x, torch.Tensor.detach, lambda x: x.data, lambda x: x[1:], lambda x: x.numpy()]
)
def test_another_name_a_view_and_shared_memory_hold_a_tensor(keep):
    x = torch.ones(3)
    assert not is_held(x)
    other = keep(x)
    assert is_held(x)
    del other
    assert not is_held(x)


def test_the_result_of_an_operation_is_not_held():
    weight = torch.ones(3, requires_grad=True)
    x = weight * 2
    assert not is_held(x)


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="this PyTorch has no set_stance")
def test_an_error_of_the_compiler_changes_nothing():
    """After it every call of a Python function holds one more reference to its arguments."""
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    compiled(torch.ones(2))
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        compiled(torch.ones(2, 2))
    x = torch.ones(3)
    assert not is_held(x)
    other = x[1:]
    assert is_held(x)
    del other

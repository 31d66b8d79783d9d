"""Backward uses the forward's random masks with every setting; exceptions of PyTorch have a test each."""

import pytest
import timm
import torch
import torch._functorch.config
from torch import nn

from timm_tresnet.recompute.policy import SETTINGS


def compare_masks(budget: float) -> list[bool]:
    """Whether backward used the forward's mask, for each of four dropouts in a row that the compiler partitions."""
    weights = [torch.ones(8, 64, requires_grad=True) for _ in range(4)]

    def forward(x):
        outputs = []
        for weight in weights:
            x = nn.functional.dropout(torch.sin(x * weight), 0.5)
            outputs.append(x)
        return outputs

    with torch._functorch.config.patch(activation_memory_budget=budget):
        outputs = torch.compile(forward, backend="aot_eager_decomp_partition")(torch.rand(8, 64) + 0.5)
    sum(output.sum() for output in outputs).backward()
    return [torch.equal(output != 0, weight.grad != 0) for output, weight in zip(outputs, weights, strict=True)]


def test_compiler_keeps_masks_with_its_default_budget():
    assert compare_masks(1.0) == [True] * 4


@pytest.mark.xfail(strict=True, reason="pytorch#190758; once this passes, docs/training.md has to say since when")
def test_compiler_keeps_masks_with_a_smaller_budget():
    assert compare_masks(0.1) == [True] * 4


@pytest.mark.parametrize("setting", [*SETTINGS, "checkpointing"])
def test_settings_of_recomputing_keep_masks(setting):
    kwargs = {"layers": (1, 1, 2, 1), "width_factor": 0.25, "num_classes": 5, "drop_rate": 0.5, "drop_path_rate": 0.5}
    model = timm.create_model("tresnet_m", **kwargs).double().train()
    x = torch.randn(8, 3, 64, 64, dtype=torch.double)
    gradients = []
    for each in ("none", setting):
        model.set_recompute(each if each != "checkpointing" else "activations")
        model.set_grad_checkpointing(each == "checkpointing")
        model.zero_grad()
        torch.manual_seed(1)
        model(x).logsumexp(-1).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)

"""Networks that run faster in PyTorch: batch norms folded into convolutions, and compiled."""

import copy

import torch
from timm.layers import FrozenBatchNormAct2d
from timm.utils import reparameterize_model
from torch import Tensor, nn

from timm_tresnet.models.layers import MLDecoderHead


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Copy of a network whose batch norms are folded into its convolutions: the same logits, fewer passes.

    What an ML-Decoder head computes of its queries alone becomes constant, too.

    Args:
        model: a TResNet in eval mode.

    Returns:
        The folded network, for inference only. Its state dict has `conv.bias` in place of `bn`.

    Raises:
        ValueError: if model is in training mode, or has a norm that cannot be folded.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("fold_batch_norms needs a network in eval mode, got one in training mode; call eval() first")
    return reparameterize_model(model)


def copy_folded(model: nn.Module) -> nn.Module:
    """Copy with constant queries, and with its batch norms folded if that is what its norms are."""
    norms = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNormAct2d)
    if any(isinstance(module, norms) for module in model.modules()):
        return fold_batch_norms(model)
    folded = copy.deepcopy(model)
    if isinstance(getattr(folded, "head", None), MLDecoderHead):
        reparameterize_model(folded.head, inplace=True)
    return folded


def optimize_for_inference(model: nn.Module, dynamic: bool = False, mode: str | None = None) -> nn.Module:
    """Fold, lay out and compile a network for the device that it is on.

    The network is compiled as one graph when it first sees an image, which takes a minute on a CPU with few cores.
    On CUDA with a static shape, the whole network is replayed as a CUDA graph; an output is then overwritten by the
    next call.

    Args:
        model: a TResNet in eval mode, on its device and in its dtype (bfloat16 or float16 for speed, where the device
            has it).
        dynamic: compile once for all batch and image sizes; without it, again for each shape.
        mode: mode of `torch.compile`; None for "reduce-overhead", which has CUDA graphs, on CUDA with a static shape
            and for PyTorch's default elsewhere. "max-autotune" has CUDA graphs too, and first times several kernels
            for each operation, which takes minutes.

    Returns:
        A module that takes and returns what model does, without gradients.

    Raises:
        ValueError: as in `fold_batch_norms`.
    """
    network = copy_folded(model).to(memory_format=torch.channels_last).requires_grad_(False)
    if mode is None and not dynamic and next(network.parameters()).device.type == "cuda":
        mode = "reduce-overhead"
    return _Inference(torch.compile(network, fullgraph=True, dynamic=dynamic, mode=mode))


class _Inference(nn.Module):
    """Runs a network without gradients, on images in channels-last layout."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.network(x.contiguous(memory_format=torch.channels_last))

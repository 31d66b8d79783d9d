"""Faster inference in PyTorch: fold batch norms into convolutions, and compile."""

import copy
import logging
from typing import Any

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from timm_tresnet.models.layers import ConvNormAct
from timm_tresnet.models.layers.observed import is_observed

_logger = logging.getLogger(__name__)


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Return a copy of a network with batch norms folded into convolutions: the same logits, fewer memory passes.

    An ML-Decoder head's queries become constant too, and so do computed weights: pruned weights, and those of
    `weight_norm`, `spectral_norm` and other parametrizations. A unit with user-defined code (hooks, patched methods,
    another class of convolution, LoRA) or another norm than batch norm is not folded; an INFO log line names it.

    Args:
        model: a TResNet in eval mode.

    Returns:
        The folded network, for inference only. Its state dict has `conv.bias` in place of `bn`.

    Raises:
        ValueError: if model or a part of it is in training mode.
    """
    require_eval(model, "fold_batch_norms")
    return copy_folded(model)


def require_eval(model: nn.Module, who: str) -> None:
    """Refuse a network that is in training mode, or has a part in training mode.

    Raises:
        ValueError: names the outermost parts in training mode.
    """
    if model.training:
        raise ValueError(f"{who} needs a network in eval mode, got one in training mode; call model.eval() first")
    # In the order of named_modules a part comes before what is in it.
    outermost: list[str] = []
    for name, module in model.named_modules():
        if module.training and not name.startswith(tuple(f"{each}." for each in outermost)):
            outermost.append(name)
    if outermost:
        more = f" and {len(outermost) - 5} more" if len(outermost) > 5 else ""
        raise ValueError(
            f"{who} needs a network in eval mode, got one with {', '.join(outermost[:5])}{more} in training mode; call "
            "model.eval() again after you add or parametrize modules"
        )


def copy_folded(model: nn.Module) -> nn.Module:
    """Fold as `fold_batch_norms` does, without the check for eval mode."""
    folded = _copy(model)
    _make_weights_constant(folded)
    reparameterize_model(folded, inplace=True)
    left = [name for name, module in folded.named_modules() if isinstance(module, ConvNormAct)]
    if left:
        _logger.info("not folded, because of user-defined code or another norm: %s", ", ".join(left))
    return folded


def _copy(model: nn.Module) -> nn.Module:
    """Copy a network; deepcopy alone refuses a pruned network, whose weights were computed with gradients."""
    computed = (
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    )
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})


@torch.no_grad()
def _make_weights_constant(model: nn.Module) -> None:
    """Replace weights that are computed in each forward by their values in eval mode."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            _remove_parametrizations(module)
        for name in [name.removesuffix("_orig") for name in module._parameters if name.endswith("_orig")]:
            if hasattr(module, f"{name}_mask"):
                prune.remove(module, name)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)


def _remove_parametrizations(module: nn.Module) -> None:
    """Make parametrized weights plain parameters.

    PyTorch's `remove_parametrizations` would also change the class, which this copy shares with the original.
    """
    parametrizations: Any = module.parametrizations  # an nn.ModuleDict
    values = {name: getattr(module, name).detach() for name in parametrizations}
    kind = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    module.__class__ = kind
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def optimize_for_inference(model: nn.Module, dynamic: bool = False, mode: str | None = None) -> nn.Module:
    """Fold a network, set its memory format to channels last, and compile it for its device.

    The first call compiles the network, which takes a minute on a CPU with few cores. It becomes one graph unless it
    has hooks or patched methods. On CUDA with a static shape, the network is replayed as a CUDA graph, and the next
    call overwrites an output.

    Args:
        model: a TResNet in eval mode, on its final device and in its final dtype (bfloat16 or float16 are faster on
            devices that support them).
        dynamic: compile once for all batch and image sizes; False to compile again for each shape.
        mode: mode of `torch.compile`. None for "reduce-overhead", which uses CUDA graphs, on CUDA with a static shape,
            and for PyTorch's default otherwise. "max-autotune" uses CUDA graphs too, and first times several kernels
            for each operation, which takes minutes.

    Returns:
        A module with the input and output of model, without gradients.

    Raises:
        ValueError: as in `fold_batch_norms`.
    """
    network = fold_batch_norms(model).to(memory_format=torch.channels_last).requires_grad_(False)
    if mode is None and not dynamic and next(network.parameters()).device.type == "cuda":
        mode = "reduce-overhead"
    fullgraph = not is_observed(*network.modules())
    compiled: Any = torch.compile(network, fullgraph=fullgraph, dynamic=dynamic, mode=mode)  # a module, as network is
    return _Inference(compiled)


class _Inference(nn.Module):
    """Runs a network without gradients, on images in channels-last layout."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.network(x.contiguous(memory_format=torch.channels_last))

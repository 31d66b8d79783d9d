"""FReLU, an activation with a threshold from the neighbouring pixels."""

import copy
from typing import Any

import torch
from timm.layers import LayerType
from torch import Tensor, nn

from timm_tresnet.models.layers.conv_norm_act import ConvNormAct
from timm_tresnet.recompute.program import read, reads
from timm_tresnet.recompute.run import Operation, Result, Run, run_operations
from timm_tresnet.recompute.saved import Recomputed, Source, discard

_maximum = torch.maximum


class FReLU(nn.Module):
    """max(x, T(x)), where T is a depthwise 3x3 convolution and a norm ("Funnel Activation", arXiv:2007.11824).

    In place of ReLU's zero, each pixel has a threshold computed from its neighbours in the same channel. As in
    7eu7d7/ML-Danbooru, `src_files/models/tresnet/layers/frelu.py`, commit bd0e61e.

    Args:
        num_features: number of channels, C.
        norm_layer: the norm in T, see `ConvNormAct`.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - input: (N, C, H, W)
        - output: (N, C, H, W)
    """

    needs_channels = True  # read by code that makes activations; others need no arguments

    def __init__(
        self,
        num_features: int,
        norm_layer: LayerType = "batchnorm2d",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.funnel: nn.Module = ConvNormAct(
            num_features, num_features, 3, groups=num_features, norm_layer=norm_layer, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, self.funnel(x))

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Return a copy with the batch norm folded into the convolution, see `ConvNormAct.fuse`."""
        folded: Any = copy.deepcopy(self)
        folded.funnel = folded.funnel.fuse()
        return folded


class Funnel(Operation):
    """The maximum of a feature map and its funnel; autograd saves both.

    Args:
        module: the layer.
        operations: operations of the funnel.
    """

    def __init__(self, module: nn.Module, operations: list[Operation]) -> None:
        super().__init__(module)
        self.operations = operations
        self.is_user_defined = any(operation.is_user_defined for operation in operations)  # type: ignore[misc]
        self.is_repeatable = all(operation.is_repeatable for operation in operations)  # type: ignore[misc]

    def run(self, x: Tensor, source: Source, run: Run) -> Result:
        funnel, source_of_funnel = run_operations(self.operations, x, source, run)
        y = torch.maximum(x, funnel)
        node: Any = y.grad_fn
        if run.closed or node is None:
            return y, None
        if self.is_user_defined:  # it may have edited x
            source = None
        if type(source) is Recomputed:
            discard(node._raw_saved_self, source.pack)
        if type(source_of_funnel) is Recomputed:
            discard(node._raw_saved_other, source_of_funnel.pack)
        if source is None or source_of_funnel is None:
            return y, None
        return y, Recomputed(_maximum, (source, source_of_funnel), y._version)


@reads(FReLU)
def _read(act: FReLU) -> list[Operation]:
    return [Funnel(act, read(act.__dict__["_modules"].get("funnel")))]

"""TResNet's basic unit: convolution, batch norm, activation and, where it downsamples, a blur."""

import copy
import functools
from typing import Any

import timm.layers
import torch
from timm.layers import (
    BatchNormAct2d,
    FrozenBatchNormAct2d,
    LayerType,
    SplitBatchNorm2d,
    SyncBatchNormAct,
    get_norm_act_layer,
)
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights

from timm_tresnet.models.layers.activated_batch_norm import ActivatedBatchNorm2d
from timm_tresnet.models.layers.observed import is_observed
from timm_tresnet.models.layers.readers import is_absent, read_convolution
from timm_tresnet.models.layers.regions import RunsInRegion
from timm_tresnet.recompute.eligibility import is_untouched
from timm_tresnet.recompute.policy import CONVOLUTION
from timm_tresnet.recompute.program import Unreadable, call, read, reads
from timm_tresnet.recompute.run import Operation

# Affine in eval mode. Only these classes themselves: a subclass may compute something else.
_FOLDABLE_NORMS = (
    ActivatedBatchNorm2d,
    BatchNormAct2d,
    FrozenBatchNormAct2d,
    SplitBatchNorm2d,
    SyncBatchNormAct,
    nn.BatchNorm2d,
)


class FoldedConvNormAct(nn.Module):
    """Convolution with bias, activation and optional anti-aliasing layer; returned by `ConvNormAct.fuse`.

    Args:
        conv: convolution with bias.
        act: activation.
        aa: anti-aliasing layer, None for none.

    Shape:
        - input: (N, in_channels, H, W)
        - output: (N, out_channels, ceil(H / stride), ceil(W / stride)), before aa

    Raises:
        ValueError: in `forward`, if in training mode.
    """

    def __init__(self, conv: nn.Conv2d, act: nn.Module, aa: nn.Module | None) -> None:
        super().__init__()
        self.conv = conv
        self.act = act
        self.aa = aa

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError(
                "This network's batch norms are folded into its convolutions, so it needs eval mode, got training "
                "mode; call eval() before running it, and train the network that was not folded"
            )
        x = self.act(self.conv(x))
        return x if self.aa is None else self.aa(x)

    def fuse(self) -> nn.Module:
        """Return self: nothing is left to fold."""
        return self


class ConvNormAct(RunsInRegion, timm.layers.ConvNormAct):
    """timm's unit: convolution without bias, normalisation, activation, then an optional anti-aliasing layer.

    The norm and its activation are one module, as in "In-Place Activated BatchNorm" (arXiv:1712.02616). An activation
    with parameters of its own, FReLU, is a module `act` after the norm.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: side of the kernel, odd; padding keeps the resolution at stride 1.
        stride: stride of the convolution.
        dilation: step between the kernel's taps, in pixels.
        groups: groups of channels that the convolution does not mix.
        act_layer: activation after the norm, a name or class for `timm.layers.get_norm_act_layer`, or
            `timm_tresnet.models.layers.FReLU`; None for no activation.
        norm_layer: normalisation, a name or class for `timm.layers.get_norm_act_layer`. "batchnorm2d" is
            ActivatedBatchNorm2d and "frozenbatchnorm2d" is FrozenBatchNormAct2d.
        aa: anti-aliasing layer that downsamples, after the activation; None for none.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - input: (N, in_channels, H, W)
        - output: (N, out_channels, ceil(H / stride), ceil(W / stride)), before aa
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        act_layer: LayerType | None = None,
        norm_layer: LayerType = "batchnorm2d",
        aa: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # timm's constructor would make other parts
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=(kernel_size - 1) // 2 * dilation,
            dilation=dilation,
            groups=groups,
            bias=False,
            **factory_kwargs,
        )
        act: nn.Module | None = None
        if getattr(act_layer, "needs_channels", False):
            make_act: Any = act_layer
            act, act_layer = make_act(out_channels, norm_layer=norm_layer, **factory_kwargs), None
        norm_act: Any
        if norm_layer in ("batchnorm2d", ActivatedBatchNorm2d):
            norm_act = functools.partial(ActivatedBatchNorm2d, act_layer=act_layer)
        elif norm_layer in ("frozenbatchnorm2d", FrozenBatchNormAct2d):  # timm has no name for it
            norm_act = functools.partial(FrozenBatchNormAct2d, act_layer=act_layer)  # type: ignore[arg-type]  # None is no activation
        else:
            norm_act = get_norm_act_layer(norm_layer, act_layer)
        given = {name: value for name, value in factory_kwargs.items() if value is not None}
        self.bn = norm_act(out_channels, apply_act=act_layer is not None, **given)  # some norms have no argument device
        is_frozen = isinstance(self.bn, FrozenBatchNormAct2d)
        if is_frozen:  # timm's freezing sets these attributes, and its unfreezing reads them
            self.bn.num_features, self.bn.affine = out_channels, True
        self.act = act
        self.aa = aa

    @torch.jit.ignore
    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Set a child; given a `SyncBatchNorm` (`convert_sync_batchnorm`), synchronise our own norm instead."""
        norm = self._modules.get(name)
        if isinstance(norm, ActivatedBatchNorm2d) and isinstance(module, nn.SyncBatchNorm):
            norm.synchronize(module.process_group)
        else:
            super().add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        x = x if self.act is None else self.act(x)
        return x if self.aa is None else self.aa(x)

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Fold the batch norm of eval mode into a copy of the convolution, computed in double precision.

        `timm.utils.reparameterize_model` calls this name. timm's scripts do so before eval(), so folding works in
        either mode; the result refuses to run in training mode.

        Returns:
            The folded layer, in the dtype of the convolution's weight. The layer itself if it cannot be folded: its
            norm is not a batch norm with running statistics, its convolution has another class or a computed weight, or
            it has hooks or patched methods.
        """
        if not self._is_foldable():
            return self
        folded: list[Any] = [
            None if tensor is None else tensor.detach().double()
            for tensor in (
                self.bn.running_mean,
                self.bn.running_var,
                self.bn.weight,
                self.bn.bias,
                self.conv.weight,
                self.conv.bias,
            )
        ]
        mean, var, weight, bias, kernel, offset = folded
        kernel, offset = fuse_conv_bn_weights(kernel, offset, mean, var, self.bn.eps, weight, bias)
        conv = copy.deepcopy(self.conv)
        conv.weight = nn.Parameter(kernel.to(conv.weight), requires_grad=conv.weight.requires_grad)
        conv.bias = nn.Parameter(offset.to(conv.weight), requires_grad=conv.weight.requires_grad)
        own: Any = self.act
        act = copy.deepcopy(getattr(self.bn, "act", nn.Identity())) if own is None else own.fuse()
        return FoldedConvNormAct(conv, act, copy.deepcopy(self.aa)).train(self.training)

    @torch.jit.unused
    def _is_foldable(self) -> bool:
        drop = getattr(self.bn, "drop", None) or nn.Identity()
        return (
            type(self) is ConvNormAct
            and type(self.conv) is nn.Conv2d
            and type(self.conv._parameters.get("weight")) is nn.Parameter
            and type(self.bn) in _FOLDABLE_NORMS
            and self.bn.running_mean is not None
            and type(drop) is nn.Identity
            and not is_observed(self, self.conv, self.bn, drop)
        )


@reads(ConvNormAct)
def _read(unit: ConvNormAct, kind: str = CONVOLUTION) -> list[Operation]:
    get = unit.__dict__["_modules"].get
    norm, act, aa = get("bn"), get("act"), get("aa")
    operations = [read_convolution(get("conv"), kind)]
    if isinstance(norm, ActivatedBatchNorm2d):
        operations += read(norm)
    elif norm is None:
        raise Unreadable("it has no norm")
    else:  # without activation, no node saves the output
        operations.append(call(norm, is_saved=not isinstance(getattr(norm, "act", nn.Identity()), nn.Identity)))
    if act is not None or not is_absent(unit, "act"):
        operations += read(act)
    if aa is None and is_absent(unit, "aa"):
        return operations
    if type(aa) is not nn.Identity or not is_untouched(aa):
        operations += read(aa)
    return operations

"""The layers of TResNet, usable on their own."""

from timm_tresnet.layers.anti_alias import BlurPool2d, StrideOneAvgPool2d
from timm_tresnet.layers.conv_norm_act import ConvNormAct
from timm_tresnet.layers.space_to_depth import SpaceToDepth
from timm_tresnet.layers.squeeze_excite import SqueezeExcite

__all__ = ["BlurPool2d", "ConvNormAct", "SpaceToDepth", "SqueezeExcite", "StrideOneAvgPool2d"]

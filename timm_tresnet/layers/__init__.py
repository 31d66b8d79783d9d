"""The layers of TResNet, usable on their own."""

from timm_tresnet.layers.activated_batch_norm import ActivatedBatchNorm2d
from timm_tresnet.layers.anti_alias import BlurPool2d, ShortcutPool2d, StrideOneAvgPool2d
from timm_tresnet.layers.bottleneck_head import BottleneckHead
from timm_tresnet.layers.conv_norm_act import ConvNormAct, FoldedConvNormAct
from timm_tresnet.layers.drop_path import DropPath
from timm_tresnet.layers.linear_head import LinearHead
from timm_tresnet.layers.ml_decoder_head import MLDecoderHead
from timm_tresnet.layers.relu import ReLU
from timm_tresnet.layers.space_to_depth import SpaceToDepth
from timm_tresnet.layers.squeeze_excite import SqueezeExcite

__all__ = [
    "ActivatedBatchNorm2d",
    "BlurPool2d",
    "BottleneckHead",
    "ConvNormAct",
    "DropPath",
    "FoldedConvNormAct",
    "LinearHead",
    "MLDecoderHead",
    "ReLU",
    "ShortcutPool2d",
    "SpaceToDepth",
    "SqueezeExcite",
    "StrideOneAvgPool2d",
]

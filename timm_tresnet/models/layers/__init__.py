"""The layers of TResNet, usable on their own."""

from timm_tresnet.models.layers.activated_batch_norm import ActivatedBatchNorm2d
from timm_tresnet.models.layers.anti_alias import BlurPool2d, StrideOneAvgPool2d, make_shortcut_pool
from timm_tresnet.models.layers.bottleneck_head import BottleneckHead
from timm_tresnet.models.layers.conv_norm_act import ConvNormAct, FoldedConvNormAct
from timm_tresnet.models.layers.frelu import FReLU
from timm_tresnet.models.layers.linear_head import LinearHead
from timm_tresnet.models.layers.ml_decoder_head import MLDecoderHead
from timm_tresnet.models.layers.query2label_head import Query2LabelHead
from timm_tresnet.models.layers.space_to_depth import SpaceToDepth
from timm_tresnet.models.layers.squeeze_excite import SqueezeExcite

__all__ = [
    "ActivatedBatchNorm2d",
    "BlurPool2d",
    "BottleneckHead",
    "ConvNormAct",
    "FReLU",
    "FoldedConvNormAct",
    "LinearHead",
    "MLDecoderHead",
    "Query2LabelHead",
    "SpaceToDepth",
    "SqueezeExcite",
    "StrideOneAvgPool2d",
    "make_shortcut_pool",
]

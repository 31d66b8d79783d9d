import pytest
import timm
import torch
from timm.models import get_pretrained_cfg

from timm_tresnet import TResNet
from timm_tresnet.bench.measuring import count_flops
from timm_tresnet.bench.sizes import count_size
from timm_tresnet.cli.commands.list import describe_weights
from timm_tresnet.variants import ARCHITECTURES

FEW = ("tresnet_m", "tresnet_v2_l", "test_tresnet")  # basic blocks and bottlenecks, bottlenecks alone, the tiny one
NARROW = {"layers": (1, 2, 2, 1), "width_factor": 0.3}


def measure(arguments, image_size, num_classes, in_chans=3):
    """Parameters and multiply-adds as PyTorch counts them in the network."""
    with torch.device("meta"):
        network = TResNet(**arguments, num_classes=num_classes, in_chans=in_chans).eval()
    params = sum(parameter.numel() for parameter in network.parameters())
    return params, count_flops(network, image_size, in_chans) // 2


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=[] if name in FEW else pytest.mark.thorough) for name in ARCHITECTURES],
)
def test_arithmetic_gives_what_pytorch_counts_in_every_variant(variant):
    assert count_size(ARCHITECTURES[variant], 64, 1000) == measure(ARCHITECTURES[variant], 64, 1000)


@pytest.mark.parametrize(
    ("arguments", "image_size", "num_classes", "in_chans"),
    [
        ({}, 100, 7, 3),  # sides of 25, 13, 7 and 4
        ({"v2": True}, 44, 0, 1),
        ({"act_layer": "frelu"}, 100, 7, 3),
        ({"act_layer": "frelu", "block": "bottleneck"}, 44, 0, 1),
        ({"head": "bottleneck"}, 32, 11, 3),
        ({"head": "bottleneck", "head_features": 24}, 32, 0, 4),
        ({"head": "query2label"}, 64, 11, 3),
        ({"head": "query2label", "decoder_embedding": 16, "head_features": 24}, 96, 5, 3),
        ({"head": "query2label", "decoder_embedding": 16}, 64, 0, 3),
        ({"head": "ml_decoder"}, 64, 250, 3),
        ({"head": "ml_decoder", "num_groups": 20, "decoder_embedding": 16}, 64, 33, 3),
        ({"head": "ml_decoder", "num_groups": 20, "decoder_embedding": 16, "learn_queries": True}, 96, 3, 3),
        ({"head": "ml_decoder", "decoder_embedding": 16}, 64, 0, 3),
    ],
    ids=[
        "odd",
        "v2_backbone",
        "frelu",
        "frelu_backbone",
        "bottleneck",
        "embedding",
        "query2label",
        "narrow_query2label",
        "query2label_backbone",
        "groups",
        "few_groups",
        "few_classes",
        "decoder_backbone",
    ],
)
def test_arithmetic_gives_what_pytorch_counts_for_other_sizes_and_heads(arguments, image_size, num_classes, in_chans):
    arguments = {**NARROW, **arguments}
    expected = measure(arguments, image_size, num_classes, in_chans)
    assert count_size(arguments, image_size, num_classes, in_chans) == expected


def test_every_weight_is_listed_with_the_parameters_of_the_network_that_timm_makes_for_it():
    rows = {row["model"]: row for row in describe_weights()}
    for name in ("tresnet_m.csl_openimages", "tresnet_v2_l.ml_decoder_coco_448", "tresnet_m.miil_in21k"):
        model = timm.create_model(name, device="meta")
        assert rows[name]["params_m"] * 1e6 == sum(parameter.numel() for parameter in model.parameters())
    for name, row in rows.items():
        config = get_pretrained_cfg(name)
        assert (row["num_classes"], row["input_size"]) == (config.num_classes, config.input_size)

import dataclasses
import inspect
import json
import re

import pytest
import timm
import torch
from timm.models import PretrainedCfg

from timm_tresnet.models.heads import HEADS
from timm_tresnet.models.network import TResNet
from timm_tresnet.variants import ARCHITECTURES
from timm_tresnet.weights.catalogue import load_catalogue, make_pretrained_cfg
from timm_tresnet.weights.config import MODEL_ARGS, PRETRAINED_CFG, check_config, read_config


def test_tables_have_every_argument_of_the_network_and_every_field_of_timm():
    arguments = inspect.signature(TResNet).parameters.keys() - {"device", "dtype"}
    assert set(MODEL_ARGS) - {"rebuild"} == arguments  # the name of recompute until 0.2
    assert set(PRETRAINED_CFG) == {field.name for field in dataclasses.fields(PretrainedCfg)}


def test_defaults_of_the_network_fit():
    for name, parameter in inspect.signature(TResNet).parameters.items():
        if name in MODEL_ARGS:
            assert MODEL_ARGS[name].fits(json.loads(json.dumps(parameter.default))), name


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_classes": 0},
        {"num_classes": 5, "drop_rate": 0.1, "drop_path_rate": 0.2, "global_pool": "avg"},
        {"in_chans": 4},
        {"layers": (1, 1, 1, 1), "width_factor": 1.5, "block": "basic", "stem": "conv7x7", "use_se": False},
        {"aa_layer": False, "act_layer": "relu", "norm_layer": "groupnorm1", "output_stride": 16, "recompute": "none"},
        {"norm_layer": "frozenbatchnorm2d"},
        {"head_features": 64, "negative_slope": 0.25, "stem_negative_slope": 0.0, "v2": True},
    ],
    ids=lambda arguments: "_".join(arguments) or "plain",
)
def test_configs_written_by_timm_are_accepted(arguments, tmp_path):
    model = timm.create_model("test_tresnet", **arguments)
    labels = {"label_names": [f"naïve {index}" for index in range(model.num_classes)]}
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True, model_config=labels)
    written = json.loads((tmp_path / "config.json").read_text())
    assert read_config(tmp_path / "config.json") == written


@pytest.mark.parametrize("name", load_catalogue())
def test_configs_of_public_weights_are_accepted(name, tmp_path):
    public = load_catalogue()[name]
    config = {
        "architecture": public.architecture,
        "num_classes": public.converted_classes,
        "model_args": public.network_arguments,
        "pretrained_cfg": make_pretrained_cfg(public, public.converted_classes),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path / "config.json")["architecture"] == public.architecture


def test_first_form_of_the_config_is_accepted(tmp_path):
    config = {
        "architecture": "test_tresnet",
        "num_classes": 10,
        "num_features": 512,
        "mean": [0, 0, 0],
        "labels": ["a"],
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert read_config(path) == config
    path.write_text(json.dumps({**config, "model_args": {}}))
    with pytest.raises(ValueError, match=r'config.json has "model_args", which is not a field of timm'):
        read_config(path)


def test_thresholds_in_the_notes_are_checked(tmp_path):
    path = tmp_path / "config.json"
    config = {
        "architecture": "test_tresnet",
        "num_classes": 2,
        "pretrained_cfg": {"notes": ["thresholds: [0.5, 0.25]"]},
    }
    path.write_text(json.dumps(config))
    assert read_config(path) == config
    config["pretrained_cfg"]["notes"] = ["thresholds: [0.5, 2.5]"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json has wrong notes: needs the note of thresholds to be"):
        read_config(path)


def refuse(config, path):
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"\A") as caught:
        read_config(path)
    return str(caught.value)


@pytest.mark.parametrize(
    "pooling", ["fast", "avg", "max", "avgmax", "catavgmax", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax", ""]
)
def test_poolings_of_timm_are_taken(pooling):
    assert MODEL_ARGS["global_pool"].fits(pooling)
    classes = 0 if pooling == "" else 3
    model = TResNet((1, 1, 1, 1), num_classes=classes, global_pool=pooling, width_factor=0.125, device="meta")
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == ((2, 3) if pooling else (2, 256, 2, 2))


FIT = {  # the last values on either side that an argument of the network takes, and those beyond
    "layers": ([[1] * 4, [200] * 4], [[0, 1, 1, 1], [201, 1, 1, 1], [1] * 3, [1] * 5]),
    "in_chans": ([1, 1024], [0, 1025]),
    "num_classes": ([0, 1_000_000], [-1, 1_000_001]),
    "width_factor": ([1e-9, 16], [0, 16.001]),
    "v2": ([True, False], [None, 1]),
    "block": (["basic", "bottleneck", ["basic", "bottleneck"] * 2, None], ["other", ["basic"] * 3, ["basic"] * 5]),
    "stem": (["space_to_depth", "conv7x7"], ["conv3x3", None]),
    "use_se": ([True, False, [True, False] * 2], [None, [True] * 3, [True] * 5]),
    "aa_layer": (["blur", "", True, False], ["sharp", None]),
    "act_layer": (["frelu"], [None, "a\n"]),
    "negative_slope": ([0, 1], [-0.001, 1.001]),
    "stem_negative_slope": ([0, 1], [-0.001, 1.001]),
    "output_stride": ([8, 16, 32], [4, 64, None]),
    "head_features": ([1, 65536, None], [0, 65537]),
    "num_groups": ([1, 1_000_000, None], [0, 1_000_001]),
    "decoder_embedding": ([1, 65536, None], [0, 65537]),
    "label_embedding": ([1, 65536, None], [0, 65537]),
    "learn_queries": ([True, False, None], [0]),
    "drop_rate": ([0, 0.99], [-0.001, 0.991]),
    "drop_path_rate": ([0, 0.99], [-0.001, 0.991]),
    "recompute": (["none", "activations", "expansions"], ["checkpointing", None]),
    "rebuild": (["none", "activations", "expansions"], ["checkpointing", None]),
}
FIT_PREPROCESSING = {  # likewise of the preprocessing, where None stands for what is not known
    "input_size": ([[1] * 3, [4096] * 3], [[0, 1, 1], [4097, 1, 1], [1] * 2, [1] * 4]),
    "test_input_size": ([[1] * 3, [4096] * 3], [[0, 1, 1], [1] * 2]),
    "min_input_size": ([[1] * 3, [4096] * 3], [[0, 1, 1], [1] * 2]),
    "mean": ([[-10_000] * 1024, [10_000]], [[], [0] * 1025, [10_001], [-10_001]]),
    "std": ([[1e-9] * 1024, [10_000]], [[], [1] * 1025, [10_001], [0]]),
    "crop_pct": ([0.1, 2], [0.099, 2.001]),
    "test_crop_pct": ([0.1, 2], [0.099, 2.001]),
    "crop_mode": (["center", "squash", "border"], ["left"]),
    "interpolation": ([], ["random", ""]),
    "fixed_input_size": ([False], [True]),
    "label_offset": ([0, 1], [-1, 2]),
    "label_names": ([[], ["a", ""]], [[1], ["\n"], {"a": "b"}]),
    "label_descriptions": ([{}, {"a": "b"}], [{"a": 1}, ["a"]]),
    "pool_size": ([[1, 1], [4096, 4096]], [[0, 1], [4097, 1], [1], [1] * 3]),
    "test_pool_size": ([[1, 1], [4096, 4096]], [[0, 1], [4097, 1], [1], [1] * 3]),
    "first_conv": (["body.conv1.conv", "body.conv1.0"], ["conv1"]),
    "classifier": (["head.fc"], ["fc"]),
    "notes": (["a", [], ["a"] * 1000], [["a"] * 1001, [1], 1]),
    "paper_ids": (["a", [], ["a"] * 1000], [["a"] * 1001, [1], 1]),
    **{
        name: (["a", ""], [1, "\n", ["a"]])
        for name in ("architecture", "tag", "license", "description", "origin_url", "paper_name")
    },
    **{
        name: ([""], ["a", 1])
        for name in ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")
    },
}


@pytest.mark.parametrize("name", FIT)
def test_arguments_of_the_network_have_bounds(name):
    good, bad = FIT[name]
    assert [MODEL_ARGS[name].fits(value) for value in (*good, *bad)] == [True] * len(good) + [False] * len(bad)


@pytest.mark.parametrize("name", FIT_PREPROCESSING)
def test_fields_of_the_pretrained_config_have_bounds(name):
    good, bad = FIT_PREPROCESSING[name]
    kind = PRETRAINED_CFG[name]
    assert [kind.fits(value) for value in (None, *good, *bad)] == [True] * (1 + len(good)) + [False] * len(bad)


def test_every_field_has_bounds():
    assert MODEL_ARGS.keys() - FIT.keys() == {"norm_layer", "global_pool", "head"}  # tested below
    assert PRETRAINED_CFG.keys() - FIT_PREPROCESSING.keys() == {"num_classes"}
    assert [PRETRAINED_CFG["num_classes"].fits(value) for value in (0, 10**6, -1, 10**6 + 1, None)] == [True] * 2 + [
        False
    ] * 3


KNOWN = ", ".join(f'"{name}"' for name in ARCHITECTURES)
WRONG = {  # configs, and what is said of them
    "empty": ({}, "needs architecture, which is missing"),
    "no_preprocessing": (
        {"architecture": "test_tresnet", "pretrained_cfg": 3},
        "needs pretrained_cfg to be an object, got 3",
    ),
    "list": ([], "needs its content to be an object, got []"),
    "architecture": (
        {"architecture": "resnet50", "pretrained_cfg": {}},
        f'needs architecture to be a TResNet, one of {KNOWN}, got "resnet50"',
    ),
    "architecture_of_the_first_form": (
        {"architecture": "resnet50"},
        f'needs architecture to be a TResNet, one of {KNOWN}, got "resnet50"',
    ),
    "features": (
        {"architecture": "test_tresnet", "num_features": 10**9 + 1},
        "needs num_features to be an integer from 1 to 1000000000 or null, got 1000000001",
    ),
    "field": (
        {"architecture": "test_tresnet", "pretrained_cfg": {"depth": 3}},
        'has "pretrained_cfg.depth", which is not a field of timm\'s pretrained config',
    ),
    "elsewhere": (
        {"architecture": "test_tresnet", "pretrained_cfg": {"url": "x"}},
        'needs pretrained_cfg.url to be null or left out, since weights are beside the config, got "x"',
    ),
    "labels": (
        {"architecture": "test_tresnet", "pretrained_cfg": {}, "label_names": [3]},
        "needs label_names to be a list of 0 to 1000000, each text without control characters or null, got [3]",
    ),
    "classes": (
        {"architecture": "test_tresnet", "model_args": {"num_classes": 4}, "pretrained_cfg": {}},
        "needs num_classes to be the same everywhere, got 1000 and 4 in model_args",
    ),
    "classes_of_the_config": (
        {"architecture": "test_tresnet", "model_args": {"num_classes": 4}, "pretrained_cfg": {"num_classes": 5}},
        "needs num_classes to be the same everywhere, got 5 and 4 in model_args",
    ),
    "channels_of_the_network": (
        {"architecture": "test_tresnet", "model_args": {"in_chans": 5}, "pretrained_cfg": {"std": [1, 1]}},
        "needs pretrained_cfg.std to have a number for each of 5 channels, got 2",
    ),
    "channels": (
        {"architecture": "test_tresnet", "pretrained_cfg": {"std": [1] * 4}},
        "needs pretrained_cfg.std to have a number for each of 3 channels, got 4",
    ),
}


@pytest.mark.parametrize(("config", "fault"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said(config, fault):
    for called in ("config.json", "the file"):
        with pytest.raises(ValueError, match=f"^{called} {re.escape(fault)}$"):
            check_config(config, *([called] if called == "the file" else []))


def test_numbers_for_each_channel_of_the_network_are_taken():
    for mean in ([0], [0] * 3, [0] * 5):  # timm's own are for three channels
        check_config({"architecture": "test_tresnet", "model_args": {"in_chans": 5}, "pretrained_cfg": {"mean": mean}})
    check_config({"architecture": "test_tresnet", "num_features": 10**9})


def test_channels_are_those_of_the_images_where_no_argument_says_so(tmp_path):
    config = {"architecture": "test_tresnet", "pretrained_cfg": {"input_size": [4, 64, 64], "mean": [0, 0, 0, 0]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path / "config.json") == config
    config["pretrained_cfg"]["mean"] = [0, 0]
    said = refuse(config, tmp_path / "config.json")
    assert said.endswith("needs pretrained_cfg.mean to have a number for each of 4 channels, got 2")


def test_unknown_arguments_are_named_with_the_known_ones(tmp_path):
    config = {"architecture": "test_tresnet", "model_args": {"depth": 3}, "pretrained_cfg": {}}
    said = refuse(config, tmp_path / "config.json")
    known = ", ".join(MODEL_ARGS)
    assert said.endswith(f'has "model_args.depth", which is not one of TResNet\'s arguments, {known}')


def test_numbers_of_classes_that_differ_are_named(tmp_path):
    config = {"architecture": "test_tresnet", "num_classes": 3, "model_args": {"num_classes": 4}, "pretrained_cfg": {}}
    said = refuse(config, tmp_path / "config.json")
    assert said.endswith("needs num_classes to be the same everywhere, got 3 and 4 in model_args")


@pytest.mark.parametrize(
    "norm_layer",
    [
        *(
            "batchnorm2d",
            "batchnorm",
            "frozenbatchnorm2d",
            "groupnorm",
            "groupnorm1",
            "layernorm2d",
            "rmsnorm2d",
            "frn",
        ),
        *("frntlu", "evonormb0", "evonormb1", "evonormb2", "evonorms0", "evonorms0a", "evonorms1", "evonorms1a"),
        *("evonorms2", "evonorms2a"),
    ],
)
def test_norms_of_timm_are_taken(norm_layer):
    assert MODEL_ARGS["norm_layer"].fits(norm_layer)
    TResNet((1, 1, 1, 1), norm_layer=norm_layer, device="meta")


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
def test_interpolations_of_timm_are_taken(interpolation):
    from timm.data.transforms import str_to_interp_mode

    assert PRETRAINED_CFG["interpolation"].fits(interpolation)
    assert str_to_interp_mode(interpolation).value == interpolation


@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_taken(head):
    assert MODEL_ARGS["head"].fits(head)

import dataclasses
import inspect
import json

import pytest
import timm
import torch
from timm.models import PretrainedCfg

from timm_tresnet.models.heads import HEADS
from timm_tresnet.models.network import TResNet
from timm_tresnet.weights.catalogue import load_catalogue, make_pretrained_cfg
from timm_tresnet.weights.config import MODEL_ARGS, PRETRAINED_CFG, read_config


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


def test_channels_come_from_the_image_size_without_an_argument(tmp_path):
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

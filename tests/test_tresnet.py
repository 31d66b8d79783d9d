import logging
from pathlib import Path

import pytest
import timm
import timm.models.tresnet
import torch
from reference import randomise, relative_error
from timm.models import (
    get_deprecated_models,
    get_pretrained_cfg,
    is_model_in_modules,
    is_model_pretrained,
    list_models,
    list_pretrained,
)
from torch.nn import functional as F

import timm_tresnet
from timm_tresnet import TResNet
from timm_tresnet.variants import ARCHITECTURES

BuiltinTResNet = timm.models.tresnet.TResNet
PAPER_VARIANTS = {
    "tresnet_m": {"layers": [3, 4, 11, 3]},
    "tresnet_l": {"layers": [4, 5, 18, 3], "width_factor": 1.2},
    "tresnet_xl": {"layers": [4, 5, 24, 3], "width_factor": 1.3},
    "tresnet_v2_l": {"layers": [3, 4, 23, 3], "width_factor": 1.0, "v2": True},
}
TAGS = [
    "tresnet_l.miil_in1k",
    "tresnet_l.miil_in1k_448",
    "tresnet_m.miil_in1k",
    "tresnet_m.miil_in1k_448",
    "tresnet_m.miil_in21k",
    "tresnet_m.miil_in21k_ft_in1k",
    "tresnet_v2_l.miil_in21k",
    "tresnet_v2_l.miil_in21k_ft_in1k",
    "tresnet_xl.miil_in1k",
    "tresnet_xl.miil_in1k_448",
]
ALIASES = {
    "tresnet_m_miil_in21k": "tresnet_m.miil_in21k",
    "tresnet_m_448": "tresnet_m.miil_in1k_448",
    "tresnet_l_448": "tresnet_l.miil_in1k_448",
    "tresnet_xl_448": "tresnet_xl.miil_in1k_448",
}
SMALL = {"layers": (1, 1, 1, 1), "num_classes": 10}
each_variant = pytest.mark.parametrize("variant", ARCHITECTURES)
each_paper_variant = pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=[] if name == "tresnet_m" else pytest.mark.thorough) for name in PAPER_VARIANTS],
)


def make_pair(variant, **kwargs):
    """Ours and timm's built-in network with the same randomised weights."""
    kwargs = {**PAPER_VARIANTS[variant], **kwargs}
    ours, builtin = TResNet(**kwargs), randomise(BuiltinTResNet(**kwargs))
    ours.load_state_dict(builtin.state_dict())
    return ours, builtin


@each_paper_variant
def test_logits_equal_the_builtin_network_in_eval(variant):
    ours, builtin = make_pair(variant)
    for size in [(64, 64), (96, 128), (100, 76)]:
        x = torch.rand(1, 3, *size)
        with torch.no_grad():
            assert relative_error(ours.eval()(x), builtin.eval()(x)) <= 1e-5


@pytest.mark.parametrize("variant", ["tresnet_m", pytest.param("tresnet_v2_l", marks=pytest.mark.thorough)])
def test_loss_and_gradients_equal_the_builtin_network_in_train(variant):
    ours, builtin = make_pair(variant, num_classes=10)
    x, target = torch.rand(2, 3, 64, 64), torch.tensor([3, 7])
    losses = []
    for model in (ours, builtin):
        loss = F.cross_entropy(model.train()(x), target)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    for (name, actual), expected in zip(ours.named_parameters(), builtin.parameters(), strict=True):
        assert relative_error(actual.grad, expected.grad) <= 1e-5, name
    torch.testing.assert_close(ours.state_dict(), builtin.state_dict())  # running statistics


@each_paper_variant
def test_same_seed_gives_the_weights_of_the_builtin_network(variant):
    states = []
    for network in (TResNet, BuiltinTResNet):
        torch.manual_seed(3)
        states.append(network(**PAPER_VARIANTS[variant], num_classes=10).state_dict())
    assert list(states[0]) == list(states[1])
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_stochastic_depth_and_dropout_draw_as_in_the_builtin_network():
    ours, builtin = make_pair("tresnet_m", num_classes=10, drop_rate=0.3, drop_path_rate=0.4)
    x = torch.rand(4, 3, 64, 64)
    outputs = []
    for model in (ours, builtin):
        torch.manual_seed(1)
        outputs.append(model.train()(x))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@each_variant
def test_timm_builds_ours(variant):
    model = timm.create_model(variant, device="meta")
    assert type(model) is timm_tresnet.TResNet
    assert getattr(timm.models, variant) is getattr(timm_tresnet.tresnet, variant)
    assert is_model_in_modules(variant, ["tresnet"])


def test_registry_lists_every_variant_and_tag_once():
    assert list_models("*tresnet*") == list_models(module="tresnet") == sorted(ARCHITECTURES)
    embedded = ["test_tresnet.mosaic_cifar10", "test_tresnet.r64_cifar10"]
    assert list_pretrained("*tresnet*") == [*embedded, *TAGS]
    assert list_models(module="tresnet", pretrained=True) == list_pretrained("*tresnet*")


@pytest.mark.parametrize("name", TAGS)
def test_pretrained_config_equals_the_one_timm_ships(name):
    architecture, tag = name.split(".")
    shipped = timm.models.tresnet.default_cfgs[architecture].cfgs[tag]
    config = get_pretrained_cfg(name)
    assert is_model_pretrained(name)
    assert (config.architecture, config.tag, config.hf_hub_id) == (architecture, tag, f"timm/{name}")
    for field in ("input_size", "num_classes", "crop_pct", "interpolation", "mean", "std", "pool_size"):
        assert getattr(config, field) == getattr(shipped, field), field
    assert timm.models.tresnet.default_cfgs[architecture].tags[0] == get_pretrained_cfg(architecture).tag


@pytest.mark.parametrize("variant", ["tresnet_s", "tresnet_v2_xl", "tresnet_d"])
def test_variants_without_weights_say_so(variant):
    assert not is_model_pretrained(variant)
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(variant, pretrained=True, **SMALL)


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_deprecated_names_build_ours_with_the_current_config(alias, name):
    assert get_deprecated_models("tresnet")[alias] == name
    with pytest.warns(UserWarning, match=f"Mapping deprecated model name {alias} to current {name}"):
        model = timm.create_model(alias, device="meta")
    assert type(model) is TResNet
    assert model.pretrained_cfg["tag"] == name.split(".")[1]


def test_registering_again_changes_nothing():
    before = list_models(module="tresnet", include_tags=True), get_deprecated_models()
    timm_tresnet.tresnet.register()
    assert (list_models(module="tresnet", include_tags=True), get_deprecated_models()) == before


def test_first_model_logs_who_built_it(caplog):
    timm_tresnet.tresnet._log_takeover.cache_clear()
    with caplog.at_level(logging.INFO):
        timm.create_model("test_tresnet")
        timm.create_model("test_tresnet")
    messages = [record.message for record in caplog.records if "timm_tresnet plugin" in record.message]
    assert len(messages) == 1


@pytest.mark.parametrize("in_chans", [1, 2, 4, 6])
def test_any_number_of_channels_adapts_the_pretrained_stem(in_chans, caplog):
    pretrained = timm.create_model("test_tresnet", pretrained=True).body.conv1.conv.weight.unflatten(1, (16, 3))
    with caplog.at_level(logging.WARNING):
        model = timm.create_model("test_tresnet", pretrained=True, in_chans=in_chans)
    assert not caplog.records
    assert model.in_chans == in_chans
    stem = model.body.conv1.conv.weight.unflatten(1, (16, in_chans))
    for channel in range(in_chans):
        expected = pretrained.sum(2) if in_chans == 1 else pretrained[:, :, channel % 3] * 3 / in_chans
        torch.testing.assert_close(stem[:, :, channel], expected)
    # A grey image, repeated over the channels, means the same to both networks.
    grey = torch.rand(1, 1, 64, 64)
    if in_chans in (1, 6):
        torch.testing.assert_close(
            model.eval()(grey.expand(-1, in_chans, -1, -1)),
            timm.create_model("test_tresnet", pretrained=True).eval()(grey.expand(-1, 3, -1, -1)),
            rtol=1e-4,
            atol=1e-4,
        )


def test_adapted_stem_survives_saving_and_loading_a_folder(tmp_path):
    model = timm.create_model("test_tresnet", pretrained=True, in_chans=4, num_classes=3).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=4).eval()
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_embedded_weights_classify_and_fit_their_limits():
    model = timm.create_model("test_tresnet", pretrained=True).eval()
    path = Path(model.pretrained_cfg["file"])
    assert path.stat().st_size <= 1_500_000
    assert sum(parameter.numel() for parameter in model.parameters()) <= 700_000
    assert model.pretrained_cfg["label_names"][3] == "cat"

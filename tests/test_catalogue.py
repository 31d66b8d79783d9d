import argparse
import dataclasses

import pytest
import reference
import timm
import torch
from publishing import PUBLIC_WEIGHT
from timm.models import get_pretrained_cfg, list_models

from timm_tresnet.conversion.description import _choose_public_weight
from timm_tresnet.conversion.recognition import Recognised, _check_fit, _detect, _detect_head, _find_blurs
from timm_tresnet.utils.notes import MULTI_LABEL
from timm_tresnet.weights.catalogue import NOTHING_KNOWN, WeightFacts, load_catalogue, make_pretrained_cfg
from timm_tresnet.weights.checkpoint import find_networks, from_official, from_query2label
from timm_tresnet.weights.labels import read_thresholds

CATALOGUE = load_catalogue()
NOT_OURS = ("unknown",)  # heads that the registered network has not
each_public_weight = pytest.mark.parametrize("public", CATALOGUE.values(), ids=CATALOGUE)
# The first of each architecture, and of each head.
KINDS = {kind: name for name, one in reversed(CATALOGUE.items()) for kind in (one.architecture, one.head)}
one_of_each_kind = pytest.mark.parametrize(
    "public",
    [
        pytest.param(public, id=name, marks=[] if name in KINDS.values() else pytest.mark.thorough)
        for name, public in CATALOGUE.items()
    ],
)
OFFICIAL = {  # how the official code makes each architecture
    "tresnet_m": {"layers": (3, 4, 11, 3)},
    "tresnet_l": {"layers": (4, 5, 18, 3), "planes": 76},
    "tresnet_xl": {"layers": (4, 5, 24, 3), "planes": 83},
    "tresnet_v2_l": {"layers": (3, 4, 23, 3), "bottlenecks": (True,) * 4},
    "tresnet_v2_xl": {"layers": (3, 8, 34, 5), "bottlenecks": (True,) * 4},
    "tresnet_d": {"layers": (3, 6, 14, 3), "bottlenecks": (True,) * 4, "frelu": True},
}
# Where the official code and timm prepare images differently, the catalogue has the former, the tag the latter.
OTHER_CROP_IN_TIMM = {name for name in CATALOGUE if name.endswith(("_448", "miil_in21k"))}

VALID = """["tresnet_m.tag"]
architecture = "tresnet_m"
tag = "tag"
files = ["a.pth"]
dataset = "D"
num_classes = 2
interpolation = "bilinear"
crop_pct = 1.0
crop_mode = "squash"
mean = [0.0]
std = [1.0]
metric = { name = "mAP", value = 1.0, published = "P" }
paper = "arXiv:1"
code = "https://example.org"
"""


@one_of_each_kind
def test_official_names_and_shapes_are_found_to_be_the_public_weights(public):
    with torch.device("meta"):
        tensors = reference.official_state_dict(
            **OFFICIAL[public.architecture],
            num_classes=public.num_classes or 7,
            head={"unknown": "linear"}.get(public.head, public.head),
            head_features=8192 if public.head == "query2label" else 512,
            num_groups=public.num_groups or 100,
            decoder_embedding=public.decoder_embedding or 768,
            counters=True,
        )
    network, *_ = find_networks(tensors)
    blurred = _find_blurs(network.tensors)
    weights = from_official(network.tensors) | from_query2label(network.beside)
    head, classes, head_arguments = _detect_head(weights)
    architecture, model_args = _detect(weights, blurred, custom=False)
    _check_fit(weights, architecture, model_args | head_arguments, classes)
    found = Recognised(
        architecture=architecture,
        model_args=model_args | head_arguments,
        state_dict=weights,
        head=head,
        num_classes=classes,
        layout="official",
        inplace_abn=True,
    )
    assert public.files
    for file in public.files:
        assert _choose_public_weight(found, file, None) == (public, [])


@each_public_weight
def test_registered_config_agrees_with_the_public_weight(public):
    config = get_pretrained_cfg(public.name)
    assert config.hf_hub_id == public.hf_hub_id
    assert config.num_classes == (0 if public.head in NOT_OURS else public.num_classes)
    assert config.input_size == (3, public.input_size or 224, public.input_size or 224)
    assert config.interpolation == public.interpolation
    if public.mean:
        assert (config.mean, config.std) == (public.mean, public.std)
    crop = (config.crop_pct, config.crop_mode)
    if public.hf_hub_id and public.name in OTHER_CROP_IN_TIMM:
        assert crop == (0.875, "center") != (public.crop_pct, public.crop_mode)
    else:
        assert crop == (public.crop_pct, public.crop_mode)
    if not public.hf_hub_id:
        assert config.license == public.license
        assert (MULTI_LABEL in (config.notes or ())) == (public.multi_label and public.head not in NOT_OURS)
        thresholds = read_thresholds(config.to_dict(), config.num_classes)
        assert thresholds == (public.threshold and [public.threshold] * config.num_classes)


@one_of_each_kind
def test_registered_tag_builds_the_network_of_the_public_weight(public):
    model = timm.create_model(public.name, device="meta")
    assert model.num_classes == (0 if public.head in NOT_OURS else public.num_classes)
    width = {"bottleneck": 512, "ml_decoder": public.decoder_embedding or 768}.get(public.head, model.num_features)
    assert model.head_hidden_size == width
    learned = isinstance(getattr(getattr(model.head, "queries", None), "vectors", None), torch.nn.Parameter)
    assert learned == (public.learn_queries or public.head == "query2label")
    if public.architecture == "tresnet_d":
        assert model.body.conv1.act is not None
        return
    slopes = {type(m): m.negative_slope for m in model.body.layer1.modules() if isinstance(m, torch.nn.LeakyReLU)}
    assert slopes[torch.nn.LeakyReLU] == public.network_arguments.get("negative_slope", 1e-3)
    assert model.body.conv1.bn.act.negative_slope == public.network_arguments.get("stem_negative_slope", 1e-2)


@pytest.mark.parametrize("public", [r for r in CATALOGUE.values() if not r.hf_hub_id], ids=lambda r: r.name)
def test_weights_that_are_nowhere_yet_say_how_to_make_them(public):
    assert public.name not in list_models(pretrained=True)
    with pytest.raises(RuntimeError) as caught:
        timm.create_model(public.name, pretrained=True)
    for part in (
        public.name,
        public.files[0],
        "timm-tresnet convert",
        "'local-dir:FOLDER', pretrained=True",
    ):
        assert part in str(caught.value)


def test_arguments_override_the_public_weights():
    model = timm.create_model("tresnet_v2_l.miil_stanford_cars_368", device="meta", negative_slope=0.5)
    assert model.body.layer1[0].conv1.bn.act.negative_slope == 0.5
    assert model.body.conv1.bn.act.negative_slope == 1e-6


def test_a_config_that_timm_resolved_before_builds_the_same_network():
    name, config = "tresnet_l.asl_openimages_448", get_pretrained_cfg("tresnet_l.asl_openimages_448")
    for resolved in (config, config.to_dict()):
        model = timm.create_model(name.partition(".")[0], pretrained_cfg=resolved, device="meta")
        assert (model.num_classes, model.head_hidden_size) == (9605, 512)
        with pytest.raises(RuntimeError, match=f"{name} has no Hub repository yet"):
            timm.create_model("tresnet_l", pretrained=True, pretrained_cfg=resolved)


def test_the_original_file_loads_into_the_registered_tag(tmp_path):
    tensors = reference.official_state_dict((1, 1, 1, 1), planes=76, num_classes=9, head="bottleneck")
    torch.save({"model": tensors}, tmp_path / "Open_ImagesV6_TRresNet_L_448.pth")
    overlay = {"file": str(tmp_path / "Open_ImagesV6_TRresNet_L_448.pth"), "num_classes": 9}
    name = "tresnet_l.asl_openimages_448"
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, layers=(1, 1, 1, 1)).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference.official_forward(tensors, x), rtol=1e-4, atol=1e-4)


def test_file_names_and_tensors_tell_public_weights_apart():
    files = [(public.architecture, file) for public in CATALOGUE.values() for file in public.files]
    assert len(files) == len(set(files))


def test_catalogue_cannot_be_changed():
    public = CATALOGUE["tresnet_m.miil_in1k"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        public.tag = "other"
    with pytest.raises(TypeError, match="does not support item assignment"):
        CATALOGUE["other"] = public


def test_a_file_of_ones_own_is_read(tmp_path):
    file = tmp_path / "catalogue.toml"
    file.write_text(VALID)
    (public,) = load_catalogue(file).values()
    assert (public.name, public.input_size, public.license, public.multi_label) == (
        "tresnet_m.tag",
        None,
        None,
        False,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("dataset =", "datasets ="),
            r"public weight tresnet_m.tag: missing fields \['dataset'\], unknown .* \['datasets'\]",
        ),
        (
            ("value = 1.0", "worth = 1.0"),
            r"metric of public weight tresnet_m.tag: missing fields \['value'\], .* \['worth'\]",
        ),
        (('"squash"', '"stretch"'), "crop_mode to be one of center, squash, got 'stretch'"),
        (('tag = "tag"', 'tag = "other"'), "public weight tresnet_m.tag needs the key tresnet_m.other"),
        (("num_classes = 2", "num_classes = "), "Invalid value"),
    ],
    ids=["field", "metric", "choice", "key", "toml"],
)
def test_mistakes_in_the_catalogue_are_named(change, message, tmp_path):
    file = tmp_path / "catalogue.toml"
    file.write_text(VALID.replace(*change))
    with pytest.raises(ValueError, match=message):
        load_catalogue(file)


def test_every_fact_has_an_option_and_is_unknown_if_not_given():
    parser = argparse.ArgumentParser()
    for field in dataclasses.fields(WeightFacts):
        parser.add_argument(f"--{field.name.replace('_', '-')}", **field.metadata)
    assert WeightFacts(**vars(parser.parse_args([]))) == NOTHING_KNOWN
    usage = " ".join(parser.format_usage().split()).partition("[-h] ")[2]
    assert usage == (
        "[--input-size PIXELS] [--crop-pct FRACTION] [--crop-mode {center,squash}] [--interpolation "
        "{nearest,bilinear,bicubic,lanczos}] [--mean M [M ...]] [--std S [S ...]] [--negative-slope SLOPE] "
        "[--stem-negative-slope SLOPE] [--license NAME] [--dataset NAME] [--multi-label | --no-multi-label] "
        "[--threshold P]"
    )
    assert NOTHING_KNOWN.known == {}
    words = "--input-size 448 --mean 0.5 0.4 0.3 --crop-mode squash --no-multi-label --stem-negative-slope 0.1".split()
    assert WeightFacts(**vars(parser.parse_args(words))).known == {
        "input_size": 448,
        "mean": [0.5, 0.4, 0.3],
        "crop_mode": "squash",
        "multi_label": False,
        "stem_negative_slope": 0.1,
    }


def test_config_has_only_known_facts():
    config = make_pretrained_cfg(NOTHING_KNOWN, 5)
    known = dataclasses.replace(NOTHING_KNOWN, input_size=368, crop_pct=0.9, multi_label=True)
    assert make_pretrained_cfg(known, 5, in_chans=1) == {
        **config,
        "input_size": (1, 368, 368),
        "pool_size": (12, 12),
        "crop_pct": 0.9,
        "notes": (MULTI_LABEL,),
    }
    assert "notes" not in make_pretrained_cfg(known, 0)  # a backbone has no labels
    said = {
        "crop_pct": 0.8, "crop_mode": "squash", "interpolation": "nearest", "mean": (0.5,) * 3, "std": (0.2,) * 3,
        "license": "mit",
    }  # fmt: skip
    facts = dataclasses.replace(NOTHING_KNOWN, **said, dataset="Birds", input_size=(96, 65))
    sizes = {"input_size": (3, 96, 65), "pool_size": (3, 3)}
    assert make_pretrained_cfg(facts, 5) == {**config, **said, **sizes, "description": "Trained on Birds"}
    public = make_pretrained_cfg(PUBLIC_WEIGHT, 3)
    assert (public["tag"], public["origin_url"], public["paper_ids"]) == (
        "insects", "https://github.com/owner/insects", "arXiv:2003.13630",
    )  # fmt: skip
    multi_label = dataclasses.replace(PUBLIC_WEIGHT, multi_label=True, threshold=0.7)
    assert make_pretrained_cfg(multi_label, 3)["notes"] == ("multi-label", "thresholds: 0.7")
    assert config == {
        "custom_load": False,
        "fixed_input_size": False,
        "num_classes": 5,
        "first_conv": "body.conv1.conv",
        "classifier": "head.fc",
    }

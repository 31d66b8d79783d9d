from types import SimpleNamespace

import pytest
import timm

from timm_tresnet.weights.preprocessing import (
    NAMES,
    explain_assumed,
    fill_preprocessing,
    find_assumed,
    for_channels,
    note_assumed,
    resolve_preprocessing,
)


def test_what_is_assumed_is_noted_beside_the_notes_there_are():
    own = timm.models.get_pretrained_cfg("test_tresnet")
    filled = fill_preprocessing({"notes": ("multi-label",), "mean": (0.5,) * 3}, own)
    assert filled["mean"] == (0.5,) * 3
    assert filled["input_size"] == own.input_size
    assert filled["notes"][0] == "multi-label"
    (assumed,) = filled["notes"][1:]
    assert all((name in assumed) == (name != "mean") for name in NAMES)


def test_channels_of_the_images_count_and_what_is_whole_stays():
    own = timm.models.get_pretrained_cfg("test_tresnet")
    grey = fill_preprocessing({}, own, in_chans=1)
    assert grey["input_size"][0] == len(grey["mean"]) == len(grey["std"]) == 1
    whole = {name: getattr(own, name) for name in NAMES}
    assert fill_preprocessing(whole, own) == whole


def test_notes_of_what_is_assumed_are_put_behind_others_and_read_again():
    noted = "assumed: std, mean"
    assert note_assumed(None, ["std", "mean"]) == (noted,)
    assert note_assumed("other", ["std", "mean"]) == ("other", noted)
    assert note_assumed(["one", "two"], ["std", "mean"]) == ("one", "two", noted)
    assert note_assumed(["one"], []) == ("one",)
    assert note_assumed(None, []) is None
    assert find_assumed({"notes": ["other: crop_pct", noted, "assumed: input_size"]}) == ["input_size", "mean", "std"]
    assert find_assumed({}) == []


def test_a_mean_for_other_channels_is_the_average():
    assert for_channels([0.25, 0.5, 0.75], 3) == (0.25, 0.5, 0.75)
    assert for_channels([0.25, 0.5, 0.75], 2) == (0.5, 0.5)
    assert for_channels([0.25], 3) == (0.25, 0.25, 0.25)


def test_what_is_assumed_is_explained_with_its_values():
    config = {"architecture": "tresnet_m", "mean": (0.0, 0.5, 1.0), "crop_pct": 0.875, "interpolation": "bilinear"}
    model = SimpleNamespace(pretrained_cfg={**config, "notes": ["assumed: crop_pct, mean"]})
    assert explain_assumed(model) == (
        "the preprocessing of images is unknown for these weights; assumed, as for tresnet_m: mean (0, 0.5, 1), "
        "crop_pct 0.875. If you know it, convert the weights again with --like WEIGHTS or --mean, --std, ..."
    )
    assert explain_assumed(SimpleNamespace(pretrained_cfg=config)) == ""


def test_images_have_the_channels_of_the_network():
    overlay = {"input_size": (3, 32, 48), "mean": (0.0, 0.5, 1.0), "std": (0.5, 0.5, 0.2), "crop_pct": 0.5}
    model = timm.create_model("test_tresnet", in_chans=2, pretrained_cfg_overlay=overlay, device="meta")
    found = resolve_preprocessing(model)
    assert (found["input_size"], found["mean"], found["crop_pct"]) == ((2, 32, 48), (0.5, 0.5), 0.5)
    assert found["std"] == pytest.approx((0.4, 0.4))
    assert resolve_preprocessing(model, (64, 96))["input_size"] == (2, 64, 96)

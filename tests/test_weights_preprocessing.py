import timm

from timm_tresnet.weights.preprocessing import NAMES, fill_preprocessing


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

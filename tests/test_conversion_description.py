import pytest
import reference
import timm
import torch
from converting import load_folder, save_checkpoint
from reference import relative_error

import timm_tresnet
from timm_tresnet import convert_checkpoint, write_folder


def test_unknown_values_are_left_out_and_named(tensors, tmp_path):
    conversion = convert_checkpoint(save_checkpoint(tensors, tmp_path / "mine.pth"))
    for name in ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "license", "notes", "tag"):
        assert name not in conversion.pretrained_cfg
    assert any(
        note.startswith("unknown and left out: input_size, interpolation, mean, std, crop_pct; when loaded, the values")
        for note in conversion.notes
    )


def test_given_values_arrive_in_the_model(tensors, tmp_path):
    given = {
        "input_size": 96,
        "crop_pct": 0.9,
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.2, 0.1),
        "license": "mit",
        "dataset": "Pets",
        "multi_label": True,
        "negative_slope": 0.2,
        "stem_negative_slope": 0.3,
    }
    file = save_checkpoint(
        {"model": tensors, "idx_to_class": {i: f"label {i}" for i in range(10)}}, tmp_path / "mine.pth"
    )
    write_folder(convert_checkpoint(file, **given), tmp_path / "folder")
    model = load_folder(tmp_path / "folder")
    config = model.pretrained_cfg
    data = timm.data.resolve_data_config(model=model)
    assert {name: tuple(data[name]) for name in ("input_size", "mean", "std")} == {
        "input_size": (3, 96, 96),
        "mean": given["mean"],
        "std": given["std"],
    }
    assert (data["interpolation"], data["crop_pct"], data["crop_mode"]) == ("bicubic", 0.9, "squash")
    assert (config["license"], config["description"]) == ("mit", "Trained on Pets")
    assert config["notes"] == ["multi-label"]
    assert config["label_names"][3] == "label 3"
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(model(x), reference.official_forward(tensors, x, slope=0.2, stem_slope=0.3)) <= 1e-5


def test_given_values_override_a_public_weights(tmp_path):
    tensors = reference.official_state_dict((3, 4, 11, 3), num_classes=80)
    file = save_checkpoint({"model": tensors}, tmp_path / "MS_COCO_TRresNet_M_224_81.8.pth")
    conversion = convert_checkpoint(file, input_size=448, multi_label=False)
    assert conversion.public_weight.name == "tresnet_m.asl_in21k_ft_coco"
    config = conversion.pretrained_cfg
    assert (config["input_size"], config["crop_mode"]) == ((3, 448, 448), "squash")
    assert "notes" not in config
    assert conversion.labels["label_names"][0] == "person"
    assert convert_checkpoint(file, public_weight="none").public_weight is None
    with pytest.raises(ValueError, match="no public weight is named 'coco'; there are tresnet_m.miil_in1k, "):
        convert_checkpoint(file, public_weight="coco")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_size": 30}, "an input size of at least 20, in multiples of 4, got 30"),
        ({"crop_pct": 87.5}, "a crop_pct above 0 and up to 2, got 87.5"),
        ({"crop_mode": "left"}, "a crop_mode of center, squash or border, got left"),
        ({"mean": (0.5,)}, "a mean for each of 3 channels, got"),
        ({"std": (0.0, 1.0, 1.0)}, "a std above 0"),
        ({"negative_slope": -1.0}, "a negative_slope from 0 to 1, got -1.0"),
    ],
)
def test_values_that_cannot_be_are_refused(given, message, tensors, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(save_checkpoint(tensors, tmp_path / "a.pth"), **given)


def test_bad_numbers_are_warned_of_by_name(tensors, tmp_path):
    tensors["body.layer2.0.conv1.0.0.weight"][0, 0, 0, 0] = float("nan")
    tensors["head.fc.bias"][3] = float("inf")
    conversion = convert_checkpoint(save_checkpoint(tensors, tmp_path / "a.pth"))
    assert conversion.warnings == ("NaN or infinite values in body.layer2.0.conv1.conv.weight, head.fc.bias",)


def test_public_names_are_those_of_the_module():
    assert timm_tresnet.convert_checkpoint is timm_tresnet.conversion.convert_checkpoint
    assert timm_tresnet.Conversion is timm_tresnet.conversion.Conversion

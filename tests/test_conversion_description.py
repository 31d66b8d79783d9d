import dataclasses
import re

import pytest
import reference
import timm
import torch
from converting import SMALL, load_folder, save_checkpoint
from publishing import PUBLIC_WEIGHT
from reference import relative_error

import timm_tresnet
from timm_tresnet import convert_checkpoint, write_folder
from timm_tresnet.weights.labels import label_config


def test_unknown_values_are_left_out_and_named(tensors, tmp_path):
    conversion = convert_checkpoint(save_checkpoint(tensors, tmp_path / "mine.pth"))
    for name in ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "license", "notes", "tag"):
        assert name not in conversion.pretrained_cfg
    assert any(
        note.startswith("unknown and left out: input_size, interpolation, mean, std, crop_pct; when loaded, the values")
        for note in conversion.notes
    )


NAMELESS = "class names: none found; give them with --labels FILE"
ABN = "In-Place ABN weights became batch norm weights, |w| + 1e-5"
UNKNOWN = (
    "unknown and left out: input_size, interpolation, mean, std, crop_pct; when loaded, the values of test_tresnet are "
    "assumed. Copy them from other weights with --like WEIGHTS, or give the ones that you know"
)


def cast(tensors, *dtypes):
    kinds = {name: dtypes[index % len(dtypes)] for index, name in enumerate(tensors)}
    return {name: t.to(kinds[name]) if t.is_floating_point() else t for name, t in tensors.items()}


def of_query2label(**changes):
    tensors = reference.official_state_dict(**SMALL, head="query2label", head_features=24)
    layer = "module.transformer.decoder.layers."
    third = {name.replace("s.1.", "s.2."): t for name, t in tensors.items() if name.startswith(f"{layer}1.")}
    return tensors | third if changes else tensors


NOTES = {  # what a file holds, and what is said of it before UNKNOWN
    "official": (dict, [NAMELESS, ABN]),
    "timm": (lambda _: timm.create_model("test_tresnet", num_classes=3).state_dict(), [NAMELESS]),
    "half": (
        lambda t: cast(t, torch.float16),
        [NAMELESS, ABN, "weights were cast from torch.float16 to torch.float32"],
    ),
    "mixed": (
        lambda t: cast(t, torch.float64, torch.bfloat16),
        [NAMELESS, ABN, "weights were cast from torch.bfloat16, torch.float64 to torch.float32"],
    ),
    "replaced_norms": (
        lambda t: {n: torch.full_like(each, 0.25) if n.endswith(".1.weight") else each for n, each in t.items()},
        [
            "no norm weight is below 0.25, so In-Place ABN may have been replaced by batch norm already; then each "
            "weight is 1e-5 too large, and norm_weights='bn' keeps the weights",
            NAMELESS,
            ABN,
        ],
    ),
    "least_norms": (
        lambda t: {n: torch.full_like(each, 9e-6) if n.endswith(".1.weight") else each for n, each in t.items()},
        [NAMELESS, ABN],
    ),
    "average": (
        lambda t: {"model": t, "ema": dict(t), "teacher": dict(t)},
        ["used 'ema', not 'model', 'teacher'; choose with --key KEY", NAMELESS, ABN],
    ),
    "loss": (
        lambda t: {**{f"model.{n}": each for n, each in t.items()}, "loss.weight": torch.ones(1), "epoch": 7},
        ["left out, not part of the network: loss.weight, epoch", NAMELESS, ABN],
    ),
    "names": (lambda t: {"model": t, "idx_to_class": [*"abcdefghij"]}, ["class names: the checkpoint", ABN]),
    "few_names": (
        lambda t: {"model": t, "idx_to_class": [*"abc"]},
        ["class names: the checkpoint (3 names for 10 classes, the rest are numbered)", ABN],
    ),
    "no_names": (
        lambda t: {"model": t, "idx_to_class": 3},
        ["the file's idx_to_class was left out: it needs a dict or a list of names, got int", NAMELESS, ABN],
    ),
    "zero_shot": (
        lambda _: reference.official_state_dict(**SMALL, head="ml_decoder", decoder_embedding=64, zero_shot=True),
        [
            "the file has no word embeddings of the labels; set them with model.set_label_embeddings(names, vectors) "
            "before you use the network",
            ABN,
        ],
    ),
    "query2label": (
        lambda _: of_query2label(),
        [
            "Query2Label's attention is assumed to have 4 heads, as published; tensors do not show the number",
            NAMELESS,
            ABN,
        ],
    ),
    "query2label_of_three_layers": (
        lambda _: of_query2label(third=True),
        ["the Query2Label head was left out; only the backbone is converted", ABN],
    ),
}


@pytest.mark.parametrize(("make", "notes"), NOTES.values(), ids=NOTES)
def test_what_may_matter_is_noted_and_nothing_else(make, notes, tensors, tmp_path):
    conversion = convert_checkpoint(save_checkpoint(make(tensors), tmp_path / "a.pth"))
    assert conversion.notes == (*notes, UNKNOWN)
    assert conversion.warnings == ()


@pytest.fixture
def insects(monkeypatch, tmp_path):
    """Writes a file of a public weight that a test registers, its name that of the fixture."""

    def write(name="insects.pth", official=None, **facts):
        public = dataclasses.replace(PUBLIC_WEIGHT, **facts)
        monkeypatch.setattr("timm_tresnet.conversion.description.load_catalogue", lambda: {public.name: public})
        tensors = reference.official_state_dict(**{**SMALL, "num_classes": public.num_classes, **(official or {})})
        return save_checkpoint({"model": tensors}, tmp_path / name), public

    return write


def test_a_public_weight_says_what_tensors_do_not(insects):
    file, public = insects(labels="voc", num_classes=20, negative_slope=0.2, learn_queries=True)
    conversion = convert_checkpoint(file)
    assert (conversion.public_weight, conversion.facts) == (public, public)
    assert conversion.model_args == {"negative_slope": 0.2, "learn_queries": True}
    assert conversion.labels == label_config("voc")
    assert conversion.notes == ("class names: the list voc", ABN)
    assert (conversion.pretrained_cfg["tag"], conversion.pretrained_cfg["input_size"]) == ("insects", (3, 64, 64))
    assert "notes" not in conversion.pretrained_cfg  # names that came with the weights need no source


def test_the_result_of_a_public_weight_is_that_on_its_own_data_set(insects):
    file, public = insects()
    assert convert_checkpoint(file, dataset="Insects").facts.metric == public.metric
    other = convert_checkpoint(file, dataset="Birds", crop_pct=0.9).facts
    assert (other.metric, other.dataset, other.crop_pct, other.tag) == (None, "Birds", 0.9, "insects")


def test_a_public_weight_of_another_network_is_not_used_and_why_is_said(insects):
    needed = "{'architecture': 'test_tresnet', 'head': 'linear', 'num_classes': 3}"
    file, _ = insects(official={"num_classes": 4})
    problem = (
        f"the public weight test_tresnet.insects needs {needed}, the file has "
        "{'architecture': 'test_tresnet', 'head': 'linear', 'num_classes': 4}"
    )
    unused = f"{problem}; it has the file's name but was not used"
    conversion = convert_checkpoint(file)
    assert (conversion.notes, conversion.public_weight) == ((unused, NAMELESS, ABN, UNKNOWN), None)
    assert convert_checkpoint(file, public_weight="none").notes == (NAMELESS, ABN, UNKNOWN)
    with pytest.raises(ValueError, match=re.escape(f"cannot convert {file}: {problem}") + "$"):
        convert_checkpoint(file, public_weight="test_tresnet.insects")
    file, _ = insects(official={"blurred": False})
    problem = f"needs {needed}, the file has {needed} with other aa_layer"
    assert (
        convert_checkpoint(file, custom=True).notes[0].endswith(f"{problem}; it has the file's name but was not used")
    )
    with pytest.raises(ValueError, match=re.escape(problem) + "$"):
        convert_checkpoint(file, custom=True, public_weight="test_tresnet.insects")


def test_a_public_weight_is_taken_by_its_name_for_any_file(insects):
    file, public = insects(name="mine.pth")
    assert convert_checkpoint(file).public_weight is None
    assert convert_checkpoint(file, public_weight="test_tresnet.insects").public_weight == public
    for name, meant in (
        ("birds", "; there are test_tresnet.insects, and 'none'"),
        ("test_tresnet.insect", "; did you mean test_tresnet.insects?"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{file}: no public weight is named {name!r}{meant}") + "$"):
            convert_checkpoint(file, public_weight=name)


def test_a_public_weight_of_any_head_takes_that_of_the_file(insects):
    file, public = insects(head="unknown", official={"num_classes": 5})
    conversion = convert_checkpoint(file)
    assert (conversion.public_weight, conversion.num_classes) == (public, 5)


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


BOUNDS = {  # of values that are given: the last ones on either side, those beyond, and what is needed
    "input_size": ([20, (24, 60)], [30, 16, (64, 30)], "an input size of at least 20, in multiples of 4"),
    "crop_pct": ([0.001, 2.0], [0.0, 2.001, 87.5], "a crop_pct above 0 and up to 2"),
    "crop_mode": (["center", "squash", "border"], ["left"], "a crop_mode of center, squash or border"),
    "mean": ([(0.5, -1.0, 0.0)], [(0.5,), (0.5,) * 4], "a mean for each of 3 channels"),
    "std": ([(0.001, 1.0, 2.0)], [(0.0, 1.0, 1.0), (1.0, -1.0, 1.0)], "a std above 0"),
    "negative_slope": ([0.0, 1.0], [-0.001, 1.001], "a negative_slope from 0 to 1"),
    "stem_negative_slope": ([0.0, 1.0], [-0.001, 1.001], "a stem_negative_slope from 0 to 1"),
    "threshold": ([0.0, 1.0], [-0.001, 1.001], "a threshold from 0 to 1"),
}


@pytest.mark.parametrize(("name", "bounds"), BOUNDS.items(), ids=BOUNDS)
def test_values_that_cannot_be_are_refused(name, bounds, tensors, tmp_path):
    file = save_checkpoint(tensors, tmp_path / "a.pth")
    good, bad, needed = bounds
    for value in good:
        assert getattr(convert_checkpoint(file, **{name: value}).facts, name) == value
    for value in bad:
        with pytest.raises(ValueError, match=re.escape(f"cannot convert {file}: needs {needed}, got {value}")):
            convert_checkpoint(file, **{name: value})


def test_a_std_for_other_channels_is_refused(tensors, tmp_path):
    with pytest.raises(ValueError, match=r"needs a std for each of 3 channels, got \(0.5,\)"):
        convert_checkpoint(save_checkpoint(tensors, tmp_path / "a.pth"), std=(0.5,))


def test_bad_numbers_are_warned_of_by_name(tensors, tmp_path):
    tensors["body.layer2.0.conv1.0.0.weight"][0, 0, 0, 0] = float("nan")
    tensors["head.fc.bias"][3] = float("inf")
    conversion = convert_checkpoint(save_checkpoint(tensors, tmp_path / "a.pth"))
    assert conversion.warnings == ("NaN or infinite values in body.layer2.0.conv1.conv.weight, head.fc.bias",)


def test_public_names_are_those_of_the_module():
    assert timm_tresnet.convert_checkpoint is timm_tresnet.conversion.convert_checkpoint
    assert timm_tresnet.Conversion is timm_tresnet.conversion.Conversion

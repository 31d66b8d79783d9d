import argparse
import errno
import json
import os
import pickle
import random
import stat
import struct
import sys
from pathlib import Path

import pytest
import reference
import timm
import torch
from safetensors.torch import save_file

import timm_tresnet
from timm_tresnet import TResNet, convert_checkpoint, write_folder

SMALL = {"layers": (2, 2, 3, 1), "planes": 16}  # test_tresnet
CUSTOM = (1, 1, 2, 1)


@pytest.fixture
def tensors():
    return reference.official_state_dict(**SMALL, counters=True)


def save(content, path):
    torch.save(content, path)
    return path


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def load(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


@torch.no_grad()
def assert_gives(folder, expected, x):
    assert relative_error(load(folder)(x), expected) <= 1e-5


# ---- layouts


def half(tensors):
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


LAYOUTS = {
    "bare": lambda tensors: tensors,
    "official": lambda tensors: {"model": tensors, "num_classes": 10},
    "module": lambda tensors: {"state_dict": {f"module.{name}": t for name, t in tensors.items()}, "epoch": 7},
    "compiled": lambda tensors: {f"_orig_mod.module.{name}": tensor for name, tensor in tensors.items()},
    "ema": lambda tensors: {"model": half(tensors), "ema": {f"module.{name}": t for name, t in tensors.items()}},
    "nested": lambda tensors: {"model": {"state_dict": tensors}},
    "train": lambda tensors: {
        "state_dict": half(tensors),
        "state_dict_ema": tensors,
        "args": argparse.Namespace(lr=0.1),
        "optimizer": {"state": {0: {"step": 3}}},
    },
    "parameters": lambda tensors: {
        name: torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point()) for name, tensor in tensors.items()
    },
    "without_counters": lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")},
    "one_storage": lambda tensors: dict(zip(tensors, share_storage(tensors.values()), strict=True)),
}


def share_storage(tensors):
    """The same numbers as views of one tensor, as a flattened optimizer leaves them; counters stay."""
    tensors = list(tensors)
    numbers = torch.cat([tensor.flatten() for tensor in tensors if tensor.is_floating_point()])
    position = 0
    for tensor in tensors:
        if not tensor.is_floating_point():
            yield tensor
            continue
        yield numbers[position : position + tensor.numel()].view(tensor.shape)
        position += tensor.numel()


@pytest.mark.parametrize("wrap", LAYOUTS.values(), ids=LAYOUTS)
def test_official_checkpoints_give_the_official_logits(wrap, tensors, tmp_path):
    conversion = convert_checkpoint(save(wrap(tensors), tmp_path / "tresnet_l.pth"))
    assert (conversion.architecture, conversion.layout, conversion.head) == ("test_tresnet", "official", "linear")
    assert conversion.model_args == {}
    assert conversion.num_classes == 10
    write_folder(conversion, tmp_path / "folder")
    x = torch.rand(2, 3, 64, 96)
    assert_gives(tmp_path / "folder", reference.official_forward(tensors, x), x)


def test_blur_kernels_and_safetensors_files_are_taken(tmp_path):
    tensors = reference.official_state_dict(**SMALL, blur_buffers=True)
    save_file(tensors, tmp_path / "m.safetensors")
    write_folder(convert_checkpoint(tmp_path / "m.safetensors"), tmp_path / "folder")
    x = torch.rand(1, 3, 64, 64)
    assert_gives(tmp_path / "folder", reference.official_forward(tensors, x), x)


@pytest.mark.parametrize(
    "wrap", [lambda w: w, lambda w: {"state_dict": {f"module.{n}": t for n, t in w.items()}}], ids=["bare", "train"]
)
def test_timm_checkpoints_stay_as_they_are(wrap, tmp_path):
    model = timm.create_model("test_tresnet", pretrained=True)
    torch.nn.init.normal_(model.body.layer1[0].conv1.bn.weight)
    conversion = convert_checkpoint(save(wrap(model.state_dict()), tmp_path / "a.pth"))
    assert (conversion.layout, conversion.architecture) == ("timm", "test_tresnet")
    torch.testing.assert_close(conversion.state_dict, dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_become_single_before_the_norm_weights_are_rebuilt(dtype, tmp_path):
    name = "body.conv1.1.weight"
    tensors = reference.official_state_dict(**SMALL)
    cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    conversion = convert_checkpoint(save(cast, tmp_path / "a.pth"))
    assert {tensor.dtype for tensor in conversion.state_dict.values()} == {torch.float32, torch.int64}
    expected = (cast[name].double().abs() + 1e-5).float()
    torch.testing.assert_close(conversion.state_dict["body.conv1.bn.weight"], expected, rtol=1e-6, atol=0)
    assert f"weights were cast from {dtype} to torch.float32" in conversion.notes


HEADS = {
    "bottleneck": ({"head": "bottleneck", "head_features": 24}, 10, {"head_features": 24}),
    "ml_decoder": ({"head": "ml_decoder"}, 0, {}),
    "none": ({"head": "none"}, 0, {}),
}


@pytest.mark.parametrize(("official", "num_classes", "model_args"), HEADS.values(), ids=HEADS)
def test_kind_of_head_is_found(official, num_classes, model_args, tmp_path):
    tensors = reference.official_state_dict(**SMALL, **official)
    conversion = convert_checkpoint(save({"model": tensors}, tmp_path / "a.pth"))
    assert (conversion.head, conversion.num_classes) == (official["head"], num_classes)
    assert conversion.model_args == model_args
    assert any("ML-Decoder head (10 classes) was left out" in n for n in conversion.notes) == (
        official["head"] == "ml_decoder"
    )
    write_folder(conversion, tmp_path / "folder")
    x = torch.rand(2, 3, 64, 64)
    assert_gives(tmp_path / "folder", reference.official_forward(tensors, x), x)
    assert load(tmp_path / "folder", num_classes=3)(x).shape == (2, 3)


# ---- which network


def test_architecture_is_that_of_the_tensors_not_of_the_name(tmp_path):
    tensors = reference.official_state_dict((3, 4, 23, 3), bottlenecks=(True,) * 4, num_classes=80, head="ml_decoder")
    conversion = convert_checkpoint(save({"model": tensors}, tmp_path / "tresnet_l.pth"))
    assert conversion.architecture == "tresnet_v2_l"
    assert conversion.public_weight is None
    assert any("tresnet_l.miil_in1k" in note and "was not used" in note for note in conversion.notes)
    known = convert_checkpoint(tmp_path / "tresnet_l.pth", public_weight="tresnet_v2_l.ml_decoder_coco_448")
    assert known.pretrained_cfg["input_size"] == (3, 448, 448)
    assert "notes" not in known.pretrained_cfg  # the backbone has no labels
    with pytest.raises(ValueError, match=r"public weight tresnet_l.miil_in1k is for .* the file holds .*tresnet_v2_l"):
        convert_checkpoint(tmp_path / "tresnet_l.pth", public_weight="tresnet_l.miil_in1k")


ABLATIONS = {
    "shallow": {"layers": CUSTOM},
    "wide": {"layers": CUSTOM, "width_factor": 1.3},
    "bottlenecks": {"layers": CUSTOM, "block": "bottleneck"},
    "without_gates": {"layers": CUSTOM, "use_se": False},
    "classic_stem": {"layers": CUSTOM, "stem": "conv7x7"},
    "grey": {"layers": CUSTOM, "in_chans": 1},
}


@pytest.mark.parametrize("arguments", ABLATIONS.values(), ids=ABLATIONS)
def test_networks_that_are_no_variant_are_taken_on_demand(arguments, tmp_path):
    model = TResNet(**arguments, num_classes=5).eval()
    file = save(model.state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"is none of the variants.*(1, 1, 2, 1).*tresnet_xl.*incomplete.*custom"):
        convert_checkpoint(file)
    write_folder(convert_checkpoint(file, custom=True), tmp_path / "folder")
    x = torch.rand(1, arguments.get("in_chans", 3), 64, 64)
    with torch.no_grad():
        assert_gives(tmp_path / "folder", model(x), x)


def test_strided_convolutions_of_the_official_code_are_told_from_blurred_ones(tmp_path):
    tensors = reference.official_state_dict(CUSTOM, blurred=False)
    conversion = convert_checkpoint(save(tensors, tmp_path / "a.pth"), custom=True)
    assert conversion.model_args["aa_layer"] is False
    write_folder(conversion, tmp_path / "folder")
    x = torch.rand(1, 3, 64, 64)
    assert_gives(tmp_path / "folder", reference.official_forward(tensors, x), x)


def test_other_image_channels_are_found(tmp_path):
    model = TResNet(layers=(2, 2, 3, 1), width_factor=0.25, in_chans=6, num_classes=5).eval()
    conversion = convert_checkpoint(save(model.state_dict(), tmp_path / "a.pth"), input_size=64)
    assert conversion.model_args == {"in_chans": 6}
    assert conversion.pretrained_cfg["input_size"] == (6, 64, 64)
    write_folder(conversion, tmp_path / "folder")
    x = torch.rand(1, 6, 64, 64)
    with torch.no_grad():
        assert_gives(tmp_path / "folder", model(x), x)


# ---- norm weights


def test_norm_weights_follow_the_flag_where_the_names_mislead(tensors, tmp_path):
    official, renamed = tmp_path / "official.pth", tmp_path / "renamed.pth"
    plain = {n: t.abs() + 1e-5 if n.endswith(".1.weight") else t for n, t in tensors.items()}
    save(plain, official)  # as the official code's InplacABN_to_ABN leaves it
    model = timm.create_model("test_tresnet")
    torch.nn.init.normal_(model.body.conv1.bn.weight)
    save(model.state_dict(), renamed)  # names changed, values not
    expected = plain["body.conv1.1.weight"]

    def convert(file, norm_weights):
        conversion = convert_checkpoint(file, norm_weights=norm_weights)
        return conversion.state_dict["body.conv1.bn.weight"], conversion.notes

    weight, notes = convert(official, None)
    torch.testing.assert_close(weight, expected + 1e-5, rtol=0, atol=0)
    assert any("norm_weights='bn' leaves them" in note for note in notes)
    weight, notes = convert(official, "bn")
    torch.testing.assert_close(weight, expected, rtol=0, atol=0)
    assert not any("norm" in note for note in notes)
    weight, notes = convert(renamed, "abn")
    torch.testing.assert_close(weight, model.body.conv1.bn.weight.detach().abs() + 1e-5, rtol=0, atol=0)
    with pytest.raises(ValueError, match="norm_weights needs to be 'abn', 'bn' or None, got 'iabn'"):
        convert(official, "iabn")


# ---- what is known


def test_unknown_values_are_left_out_and_named(tensors, tmp_path):
    conversion = convert_checkpoint(save(tensors, tmp_path / "mine.pth"))
    for name in ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "license", "notes", "tag"):
        assert name not in conversion.pretrained_cfg
    assert any("timm's defaults apply: input_size, crop_pct, interpolation, mean, std" in n for n in conversion.notes)


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
    file = save({"model": tensors, "idx_to_class": {i: f"label {i}" for i in range(10)}}, tmp_path / "mine.pth")
    write_folder(convert_checkpoint(file, **given), tmp_path / "folder")
    model = load(tmp_path / "folder")
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


def test_values_go_before_those_of_a_public_weight(tmp_path):
    tensors = reference.official_state_dict((3, 4, 11, 3), num_classes=80)
    file = save({"model": tensors}, tmp_path / "MS_COCO_TRresNet_M_224_81.8.pth")
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
        ({"crop_pct": 1.5}, "a crop_pct above 0 and up to 1, got 1.5"),
        ({"crop_mode": "border"}, "a crop_mode of center or squash, got border"),
        ({"mean": (0.5,)}, "a mean for each of 3 channels, got"),
        ({"std": (0.0, 1.0, 1.0)}, "a std above 0"),
        ({"negative_slope": -1.0}, "a negative_slope from 0 to 1, got -1.0"),
    ],
)
def test_values_that_cannot_be_are_refused(given, message, tensors, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(save(tensors, tmp_path / "a.pth"), **given)


def test_bad_numbers_are_warned_of_by_name(tensors, tmp_path):
    tensors["body.layer2.0.conv1.0.0.weight"][0, 0, 0, 0] = float("nan")
    tensors["head.fc.bias"][3] = float("inf")
    conversion = convert_checkpoint(save(tensors, tmp_path / "a.pth"))
    assert conversion.warnings == ("NaN or infinite values in body.layer2.0.conv1.conv.weight, head.fc.bias",)


# ---- files that are refused


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_checkpoint_is_not_executed(legacy, tensors, tmp_path):
    marker = tmp_path / "executed"
    torch.save(
        {"model": tensors, "extra": Hostile(marker)}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy
    )
    with pytest.raises(ValueError, match=r"refused to read .*a.pth: it needs \w+.mkdir to be run"):
        convert_checkpoint(tmp_path / "a.pth")
    assert not marker.exists()


def test_partly_matching_checkpoints_are_refused_by_name(tensors, tmp_path):
    tensors["body.layer4.0.extra"] = tensors.pop("body.layer4.0.conv3.0.weight")
    tensors["head.fc.bias"] = torch.zeros(11)
    with pytest.raises(ValueError, match=r"cannot convert .*a.pth: does not fit test_tresnet") as caught:
        convert_checkpoint(save({"model": tensors}, tmp_path / "a.pth"))
    for part in (
        "missing body.layer4.0.conv3.conv.weight",
        "unexpected body.layer4.0.extra",
        "head.fc.bias (11,) instead of (10,)",
    ):
        assert part in str(caught.value)


def make_cyclic():
    wrapper = {}
    wrapper["model"] = wrapper
    return wrapper


REFUSED = {
    "resnet": (
        lambda tensors: {"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)},
        "no TResNet: neither body.conv1.0.weight nor body.conv1.conv.weight among conv1.weight, fc.weight",
    ),
    "empty": (lambda tensors: {}, "no TResNet: .* among nothing"),
    "list": (lambda tensors: list(tensors.values()), "needs a dict of tensors, got list"),
    "cyclic": (lambda tensors: make_cyclic(), "unexpected, no tensors: model"),
    "mixed": (lambda tensors: {**tensors, "epoch": 7, 3: 4}, "unexpected, no tensors: epoch, 3"),
    "truncated": (
        lambda tensors: {name: t for name, t in tensors.items() if not name.startswith(("body.layer3", "body.layer4"))},
        r"no tensors of body.layer3: missing body.layer3.\*, body.layer4.\*",
    ),
    "one_block_lost": (
        lambda tensors: {name: t for name, t in tensors.items() if not name.startswith("body.layer3.2")},
        r"is none of the variants: .*\(2, 2, 2, 1\)",
    ),
    "twice": (
        lambda tensors: {**{f"module.{name}": t for name, t in tensors.items()}, "head.fc.bias": torch.zeros(10)},
        "two tensors for head.fc.bias: with and without 'module.'",
    ),
    "two_names": (
        lambda tensors: {**tensors, "body.layer1.0.conv1.0.0.weight": tensors["body.layer1.0.conv1.0.weight"]},
        "one behind .*body.layer1.0.conv1",
    ),
    "some_blurred": (
        lambda tensors: {name.replace("layer3.0.conv2.0.", "layer3.0.conv2."): t for name, t in tensors.items()},
        "missing body.layer3.0.conv2.0.0.weight",
    ),
    "deep_block": (
        lambda tensors: {**tensors, "body.layer3.99999999.conv1.0.weight": torch.zeros(1)},
        "unexpected body.layer3.99999999.conv1.conv.weight",
    ),
    "stem": (lambda tensors: {**tensors, "body.conv1.0.weight": torch.zeros(16, 50, 3, 3)}, "fits no stem"),
    "classifier": (lambda tensors: {**tensors, "head.fc.weight": torch.zeros(10)}, "needs two dimensions"),
    "repeated": (
        lambda tensors: {**tensors, "head.fc.weight": torch.zeros(1, 1).expand(10**7, 10**7)},
        "head.fc.weight of shape .* is larger than what the file holds",
    ),
    "sparse": (
        lambda tensors: {**tensors, "head.fc.bias": torch.zeros(10).to_sparse()},
        "head.fc.bias needs to hold plain floating-point numbers, got torch.float32, torch.sparse_coo",
    ),
    "integers": (
        lambda tensors: {**tensors, "head.fc.bias": torch.zeros(10, dtype=torch.int8)},
        "head.fc.bias needs to hold plain floating-point numbers, got torch.int8",
    ),
    "nowhere": (
        lambda tensors: {**tensors, "head.fc.bias": torch.zeros(10, device="meta")},
        "head.fc.bias needs to hold plain floating-point numbers",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_tresnet_is_refused(change, message, tensors, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(save(change(tensors), tmp_path / "a.pth"))


def damage_header(data, claim):
    return struct.pack("<Q", claim(struct.unpack("<Q", data[:8])[0])) + data[8:]


DAMAGED = {
    "empty": lambda data: b"",
    "text": lambda data: b"<html>403 Forbidden</html>",
    "truncated": lambda data: data[: len(data) // 2],
    "header_cut": lambda data: data[:100],
    "long_header": lambda data: damage_header(data, lambda length: 10 * length),
    "endless_header": lambda data: damage_header(data, lambda length: 2**63),
    "no_json": lambda data: data[:9] + b"\xff" * 50 + data[59:],
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_damaged_safetensors_files_are_refused(damage, tensors, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(damage((tmp_path / "a.safetensors").read_bytes()))
    with pytest.raises(ValueError, match=r"cannot read .*a.safetensors: "):
        convert_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("length", [10, 1000, -1000])
def test_truncated_pickles_are_refused(length, legacy, tensors, tmp_path):
    torch.save(tensors, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:length])
    with pytest.raises(ValueError, match=r"cannot read .*a.pth: damaged or foreign"):
        convert_checkpoint(tmp_path / "a.pth")


def test_a_missing_file_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        convert_checkpoint(tmp_path / "a.pth")


# ---- the folder


@pytest.fixture
def conversion(tensors, tmp_path):
    return convert_checkpoint(save(tensors, tmp_path / "a.pth"))


def test_folder_holds_weights_config_and_card_and_nothing_else(conversion, tmp_path):
    write_folder(conversion, tmp_path / "new" / "folder", repo_id="owner/name")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert os.listdir(folder.parent) == ["folder"]
    assert json.loads((folder / "config.json").read_text())["architecture"] == "test_tresnet"
    assert "owner/name" in (folder / "README.md").read_text()
    (tmp_path / "probe").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {stat.S_IMODE((tmp_path / "probe").stat().st_mode)}


def test_only_an_earlier_conversion_is_overwritten_and_only_on_demand(conversion, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_folder(conversion, folder)  # empty is as good as new
    (folder / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match="holds README.md, config.json, model.safetensors; .* or overwrite it"):
        write_folder(conversion, folder)
    assert (folder / "README.md").read_text() == "mine"
    write_folder(conversion, folder, overwrite=True)
    assert (folder / "README.md").read_text() != "mine"
    (folder / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="holds thesis.tex, which no conversion writes"):
        write_folder(conversion, folder, overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"):
        write_folder(conversion, folder / "thesis.tex")
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "folder"]


def test_a_failed_check_leaves_what_was_there(conversion, tmp_path):
    write_folder(conversion, tmp_path / "folder")
    before = (tmp_path / "folder" / "model.safetensors").stat().st_ino

    def check(folder):
        assert load(folder).num_classes == 10
        raise ValueError("logits differ")

    with pytest.raises(ValueError, match="logits differ"):
        write_folder(conversion, tmp_path / "folder", overwrite=True, check=check)
    assert (tmp_path / "folder" / "model.safetensors").stat().st_ino == before
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "folder"]


def test_a_full_disk_leaves_nothing_and_a_later_run_works(conversion, tmp_path, monkeypatch):
    write_bytes = Path.write_bytes

    def fail(path, data):
        write_bytes(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        with pytest.raises(OSError, match="No space left on device"):
            write_folder(conversion, tmp_path / "folder")
    assert os.listdir(tmp_path) == ["a.pth"]
    write_folder(conversion, tmp_path / "folder")
    assert load(tmp_path / "folder").num_classes == 10


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_limit_on_the_size_of_files_is_an_error_without_a_traceback(conversion, tmp_path, run_python):
    process = run_python(
        "-c",
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from timm_tresnet.cli import main; sys.exit(main(sys.argv[1:]))",
        "convert",
        "a.pth",
        "--output",
        "folder",
        check=False,
    )
    assert process.returncode == 1
    assert "File too large" in process.stderr
    assert "Traceback" not in process.stderr
    assert os.listdir(tmp_path) == ["a.pth"]


def test_a_killed_run_leaves_nothing_under_the_name_and_a_later_run_works(conversion, tmp_path, run_python):
    process = run_python(
        "-c",
        "import os, signal, sys; from timm_tresnet import convert_checkpoint, write_folder\n"
        "write_folder(convert_checkpoint('a.pth'), 'folder', check=lambda _: os.kill(os.getpid(), signal.SIGKILL))",
        check=False,
    )
    assert process.returncode < 0
    (left,) = set(os.listdir(tmp_path)) - {"a.pth"}
    assert left.startswith(".folder.")
    assert left.endswith(".partial")
    write_folder(conversion, tmp_path / "folder")
    assert load(tmp_path / "folder").num_classes == 10


def test_public_names_are_those_of_the_module():
    assert timm_tresnet.convert_checkpoint is timm_tresnet.convert.convert_checkpoint
    assert timm_tresnet.Conversion is timm_tresnet.convert.Conversion


# ---- fuzz: every damaged file ends in a clear error or in a right load


def convert_or_refuse(file, expected):
    """The weights, which then fit the network, or None, and then the error names the file."""
    try:
        weights = convert_checkpoint(file).state_dict
    except ValueError as caught:
        error = caught
    else:
        assert {n: t.shape for n, t in weights.items()} == {n: t.shape for n, t in expected.items()}
        return weights
    assert str(file) in str(error)
    return None


@pytest.fixture
def expected(tensors, tmp_path):
    return convert_checkpoint(save(tensors, tmp_path / "whole.pth")).state_dict


def mutate(data, generator):
    data = bytearray(data)
    kind = generator.choice(["flip", "zero", "cut", "insert", "swap"])
    position = generator.randrange(len(data))
    length = generator.randrange(1, 9)
    if kind == "flip":
        data[position] ^= 1 << generator.randrange(8)
    elif kind == "zero":
        data[position : position + length] = bytes(length)
    elif kind == "cut":
        del data[position : position + length]
    elif kind == "insert":
        data[position:position] = generator.randbytes(length)
    else:
        other = generator.randrange(len(data))
        data[position], data[other] = data[other], data[position]
    return bytes(data)


@pytest.mark.parametrize("seed", range(10))
def test_mutated_safetensors_headers_end_in_an_error_or_a_right_load(seed, tensors, expected, tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(tensors, file)
    whole = file.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    generator = random.Random(seed)
    for case in range(90):
        head = mutate(whole[:8] if case % 10 == 0 else whole[:end], generator)
        file.write_bytes(head + whole[8 if case % 10 == 0 else end :])
        convert_or_refuse(file, expected)


@pytest.mark.parametrize("seed", range(10))
def test_mutated_pickles_end_in_an_error_or_a_right_load(seed, expected, tmp_path):
    torch.manual_seed(0)
    tensors = reference.official_state_dict(**SMALL, counters=True)
    file = tmp_path / "a.pth"
    torch.save(tensors, file, _use_new_zipfile_serialization=bool(seed % 2))
    whole = file.read_bytes()
    generator = random.Random(seed)
    # The pickle is in front; in the legacy format, magic number and version come first.
    end = min(len(whole), 60_000)
    for _ in range(60):
        file.write_bytes(mutate(whole[:end], generator) + whole[end:])
        convert_or_refuse(file, expected)


@pytest.mark.parametrize("seed", range(10))
def test_mutated_names_and_shapes_end_in_an_error_or_a_right_load(seed, tensors, expected, tmp_path):
    pytest.importorskip("safetensors", "0.7", "safetensors older than 0.7 cannot write complex numbers")
    file = tmp_path / "a.safetensors"
    generator = random.Random(seed)
    refused = 0
    for _ in range(60):
        changed = dict(tensors)
        for _ in range(generator.choice([1, 1, 2])):
            name = generator.choice(list(changed))
            tensor = changed.pop(name)
            kind = generator.choice(["drop", "rename", "block", "shape", "reshape", "dtype", "twice", "prefix"])
            if kind == "rename":
                name = mutate(name.encode(), generator).decode(errors="replace")
            elif kind == "block":
                name = name.replace(".0.", f".{generator.choice([1, 3, 50, 100, 10**9])}.", 1)
            elif kind == "shape":
                tensor = torch.zeros([generator.randrange(4) for _ in range(generator.randrange(5))])
            elif kind == "reshape":
                tensor = tensor.reshape(-1)
            elif kind == "dtype":
                tensor = tensor.to(generator.choice([torch.float16, torch.int32, torch.bool, torch.complex64]))
            elif kind == "twice":
                changed[f"module.{name}"] = tensor
            elif kind == "prefix":
                changed = {f"module.{other}": value for other, value in changed.items()}
            if kind != "drop":
                changed[name] = tensor.clone()
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, file)
        weights = convert_or_refuse(file, expected)
        if weights is None:
            refused += 1
        else:  # half precision is all that such a change can do to the numbers
            for name, tensor in weights.items():
                if not name.endswith("num_batches_tracked"):
                    torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
    assert 0 < refused < 60


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_of_other_tools_are_refused(protocol, tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"body.conv1.0.weight": [1.0]}, protocol=protocol))
    with pytest.raises(ValueError, match=r"cannot read .*a.pth"):
        convert_checkpoint(tmp_path / "a.pth")

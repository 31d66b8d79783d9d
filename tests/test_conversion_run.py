"""Runs of timm's train.py are converted with the preprocessing of timm's validate.py."""

import argparse
import os
import pickle
import re
import shutil
import struct

import numpy as np
import pytest
import timm
import torch
import yaml
from converting import load_folder, save_checkpoint
from PIL import Image
from publishing import direct_client
from reference import relative_error
from timm.utils import CheckpointSaver, ModelEmaV2

from timm_tresnet import convert_checkpoint, write_folder
from timm_tresnet.cli import main as cli
from timm_tresnet.conversion.run import Run, find_checkpoint, find_run, name_classes
from timm_tresnet.weights.loading import look_up_weights

USUAL = {  # train.py's defaults, but for what only its training is about
    "model": "test_tresnet", "num_classes": 3, "pretrained": False, "initial_checkpoint": "", "in_chans": None,
    "img_size": None, "input_size": None, "crop_pct": None, "mean": None, "std": None, "interpolation": "", "gp": None,
    "model_kwargs": {}, "model_ema": False, "model_ema_force_cpu": False, "data": None, "data_dir": None, "dataset": "",
    "train_split": "train", "val_split": "validation", "class_map": "", "lr": 0.1, "opt_betas": None, "aa": None,
}  # fmt: skip


def make_model(args):
    """As validate.py does."""
    in_chans = args.in_chans or (args.input_size or [3])[0]
    return timm.create_model(
        args.model, num_classes=args.num_classes, in_chans=in_chans, global_pool=args.gp, **args.model_kwargs
    )


def train(folder, ema=False, file="model_best.pth.tar", **given):
    """Train a step and save it with train.py's saver; return the file, args and network."""
    args = argparse.Namespace(**{**USUAL, "model_ema": ema, **given})
    model = make_model(args)
    average = ModelEmaV2(model, decay=0.5) if ema else None
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    in_chans = args.in_chans or (args.input_size or [3])[0]
    model(torch.rand(4, in_chans, 32, 32)).square().sum().backward()
    optimizer.step()
    if average:
        average.update(model)
    folder.mkdir(exist_ok=True)
    saver = CheckpointSaver(
        model, optimizer, args, average, torch.amp.GradScaler("cpu"), checkpoint_dir=str(folder), max_history=2
    )
    saver.amp_scaler.state_dict_key = "amp_scaler"
    saver.save_checkpoint(0, metric=np.float64(50.0))  # scikit-learn's metrics are numpy's numbers
    (folder / "args.yaml").write_text(yaml.safe_dump({**vars(args), "num_classes": given.get("num_classes")}))
    return folder / file, args, (average.module if average else model).eval()


def convert(tmp_path, file, **given):
    conversion = convert_checkpoint(file, **given)
    write_folder(conversion, tmp_path / "converted", overwrite=True)
    return load_folder(tmp_path / "converted"), conversion


def resolve(**arguments):
    """timm's data config, without the difference between a tuple and the list that JSON makes of it."""
    config = timm.data.resolve_data_config(**arguments)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}


def assert_same_network(model, expected, in_chans=3):
    x = torch.rand(2, in_chans, 64, 64)
    with torch.no_grad():
        assert relative_error(model(x), expected(x)) <= 1e-6


@pytest.fixture
def start(tmp_path):
    """A folder with weights that have a preprocessing of their own."""
    overlay = {"input_size": (3, 48, 48), "test_input_size": (3, 80, 80), "mean": (0.1, 0.2, 0.3), "crop_pct": 0.7,
               "std": (0.5, 0.5, 0.6), "interpolation": "bicubic", "crop_mode": "squash",
               "test_crop_pct": 0.9}  # fmt: skip
    model = timm.create_model("test_tresnet", num_classes=7, pretrained_cfg_overlay=overlay, negative_slope=0.2)
    arguments = {"model_args": {"num_classes": 7, "negative_slope": 0.2}}
    timm.models.save_for_hf(model, tmp_path / "start", safe_serialization=True, **arguments)
    return tmp_path / "start"


RUNS = {
    "silent": {},
    "tag": {"model": "test_tresnet.mosaic_cifar10", "pretrained": True},
    "size": {"img_size": 48},
    "rectangle": {"input_size": [3, 48, 96]},
    "normalised": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.2]},
    "normalised_alike": {"mean": [0.5], "std": [0.25]},
    "crop": {"crop_pct": 0.8, "interpolation": "bicubic"},
    "frame": {"crop_pct": 1.1},
    "odd_size": {"img_size": 50, "model_kwargs": {"stem": "conv7x7"}},
    "grey": {"input_size": [1, 48, 48], "mean": [0.5], "std": [0.5]},
    "six_channels": {"in_chans": 6, "img_size": 64, "mean": [0.5], "std": [0.5]},
    "folder": {"model": "local-dir:{start}"},
    "folder_and_size": {"model": "local-dir:{start}", "pretrained": True, "img_size": 64, "std": [0.25]},
    "checkpoint": {"initial_checkpoint": "somewhere.pth.tar", "img_size": 32},
}


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(
            given, id=name, marks=[] if name in ("silent", "rectangle", "crop", "grey") else pytest.mark.thorough
        )
        for name, given in RUNS.items()
    ],
)
def test_images_are_prepared_as_validate_py_does(given, start, tmp_path):
    given = {**given, "model": given.get("model", "test_tresnet").format(start=start)}
    file, args, model = train(tmp_path / "run", **given)
    converted, conversion = convert(tmp_path, file)
    assert resolve(model=converted) == resolve(args=vars(args), model=model, use_test_size=True)
    assert not any(note.startswith("unknown") for note in conversion.notes)
    assert_same_network(converted, model, model.in_chans)


def test_a_mean_for_other_channels_becomes_their_average_as_in_timms_loaders(start, tmp_path):
    file, _, model = train(tmp_path / "run", model=f"local-dir:{start}", in_chans=1)
    converted, conversion = convert(tmp_path, file)
    assert converted.pretrained_cfg["mean"] == pytest.approx([0.2])  # of 0.1, 0.2, 0.3
    assert converted.pretrained_cfg["std"] == pytest.approx([1.6 / 3])
    assert conversion.pretrained_cfg["input_size"] == (1, 80, 80)
    assert_same_network(converted, model, 1)


KWARGS = {
    "slopes": {"model_kwargs": {"negative_slope": 0.3, "stem_negative_slope": 0.1}},
    "activation": {"model_kwargs": {"act_layer": "silu"}},
    "no_blur": {"model_kwargs": {"aa_layer": False}},
    "norm": {"model_kwargs": {"norm_layer": "layernorm2d"}},
    "dilated": {"model_kwargs": {"output_stride": 16}},
    "custom": {"model_kwargs": {"layers": (1, 1, 1, 1), "use_se": False, "stem": "conv7x7", "drop_path_rate": 0.1}},
    "pooling": {"gp": "max"},
    "head": {"model_kwargs": {"head": "ml_decoder", "num_groups": 2, "decoder_embedding": 16}},
}


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(given, id=name, marks=[] if name in ("slopes", "custom", "pooling") else pytest.mark.thorough)
        for name, given in KWARGS.items()
    ],
)
def test_arguments_without_tensors_come_from_the_run(given, tmp_path):
    file, _, model = train(tmp_path / "run", **given)
    assert_same_network(convert(tmp_path, file)[0], model)


def test_arguments_that_no_config_can_say_are_refused(tmp_path):
    file, args, _ = train(tmp_path / "run")
    args.model_kwargs = {"act_layer": 3}
    save_checkpoint({**torch.load(file, weights_only=False), "args": args}, file)
    with pytest.raises(
        ValueError, match="cannot convert .*config.json cannot store the run's model_kwargs: it needs act_layer"
    ):
        convert_checkpoint(file)


def test_arguments_of_the_structure_are_those_of_a_custom_network():
    structure = {
        "layers": (1, 1, 1, 1), "width_factor": 0.5, "block": "basic", "stem": "conv7x7", "use_se": False, "v2": True,
        "aa_layer": False,
    }  # fmt: skip
    given = [{name: value} for name, value in structure.items()]
    assert [name for each in given for name in each if Run({"model_kwargs": each}, None).custom] == list(structure)
    usual = {**dict.fromkeys(structure), "drop_rate": 0.1, "num_classes": 3}  # None: train.py was not told
    assert not Run({"model_kwargs": usual, "gp": "max"}, None).custom
    assert not Run({"model_kwargs": None}, None).custom


def test_arguments_that_tensors_tell_are_not_those_of_the_run():
    untold = {
        "act_layer": "silu", "negative_slope": 0.2, "stem_negative_slope": 0.3, "norm_layer": "frn",
        "output_stride": 16, "global_pool": "max", "aa_layer": False, "learn_queries": True,
    }  # fmt: skip
    told = {"layers": (1, 1, 1, 1), "head": "bottleneck", "num_classes": 3, "drop_rate": 0.1}
    assert Run({"model_kwargs": {**untold, **told}}, None).hidden_arguments == untold
    assert Run({"gp": "avg", "model_kwargs": {"global_pool": None}}, None).hidden_arguments == {"global_pool": "avg"}


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({}, "state_dict_ema"),
        ({"model_ema_force_cpu": True}, "state_dict"),
        pytest.param({"val_split": ""}, "state_dict", marks=pytest.mark.thorough),
        pytest.param({"model_ema": None}, "state_dict_ema", marks=pytest.mark.thorough),
    ],
    ids=["validated", "on_the_cpu", "no_validation", "not_said"],
)
def test_the_average_is_taken_where_the_metric_was_its_own(given, key, tmp_path):
    file, _, _ = train(tmp_path / "run", ema=True, **given)
    conversion = convert_checkpoint(file)
    both = torch.load(file, weights_only=False)
    assert conversion.key == key
    torch.testing.assert_close(conversion.state_dict, dict(both[key]), rtol=0, atol=0)
    other = {"state_dict", "state_dict_ema"} - {key}
    said = f"used '{key}', not '{''.join(other)}'; choose with --key KEY"
    assert any(note.startswith(said) for note in conversion.notes)
    (other,) = other
    torch.testing.assert_close(convert_checkpoint(file, key=other).state_dict, dict(both[other]), rtol=0, atol=0)


def test_a_folder_of_a_run_stands_for_its_best_checkpoint(tmp_path, capsys):
    first, _, model = train(tmp_path / "first", img_size=48)
    train(tmp_path / "second", img_size=64)
    words = ["convert", str(first.parent), str(tmp_path / "second"), "--output", str(tmp_path / "out")]
    assert cli.main(words) == 0
    assert "run of train.py: the checkpoint's args" in capsys.readouterr().out
    assert_same_network(load_folder(tmp_path / "out" / "first"), model)
    for name in ("model_best", "last"):
        for file in tmp_path.glob(f"first/{name}*"):
            file.unlink()
    with pytest.raises(FileNotFoundError, match=r"first has none of model_best.pth.tar, last.pth.tar, .*name the"):
        convert_checkpoint(tmp_path / "first")


def test_of_a_folder_the_best_checkpoint_is_taken(tmp_path):
    for name in ("pytorch_model.bin", "model.safetensors", "last.pth.tar", "model_best.pth.tar"):  # best last
        (tmp_path / name).touch()
        assert find_checkpoint(tmp_path) == tmp_path / name
    assert find_checkpoint(tmp_path / "last.pth.tar") == tmp_path / "last.pth.tar"
    (tmp_path / "empty" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as caught:
        find_checkpoint(tmp_path / "empty")
    names = "model_best.pth.tar, last.pth.tar, model.safetensors, pytorch_model.bin"
    assert str(caught.value) == f"{tmp_path / 'empty'} has none of {names}; name the checkpoint itself"


@pytest.mark.parametrize(
    ("args", "measured"),
    [
        ({"model_ema": True, "val_split": "validation"}, True),
        ({"model_ema": True}, True),
        ({"model_ema": True, "val_split": ""}, False),
        ({"model_ema": True, "model_ema_force_cpu": True}, False),
        ({"model_ema": False}, None),
        ({}, None),
    ],
)
def test_the_average_is_measured_if_it_was_validated(args, measured):
    assert Run(args, None).average_measured is measured


def average(folder):
    """As avg_checkpoints.py and clean_checkpoint.py write it: nothing but tensors."""
    weights = torch.load(folder / "model_best.pth.tar", weights_only=False)["state_dict"]
    return save_checkpoint({name: tensor.double().float() for name, tensor in weights.items()}, folder / "averaged.pth")


def test_args_yaml_speaks_for_a_file_of_tensors_alone(tmp_path):
    file, _, model = train(tmp_path / "run", img_size=48, mean=[0.5], model_kwargs={"negative_slope": 0.3})
    averaged = average(file.parent)
    converted, conversion = convert(tmp_path, averaged)
    assert converted.pretrained_cfg["input_size"] == [3, 48, 48]
    assert any("args.yaml" in note for note in conversion.notes)
    assert_same_network(converted, model)
    elsewhere = shutil.copy(averaged, tmp_path / "averaged.pth")
    assert "input_size" not in convert_checkpoint(elsewhere).pretrained_cfg
    found = convert_checkpoint(elsewhere, args=file.parent / "args.yaml")
    assert found.pretrained_cfg == conversion.pretrained_cfg


def test_args_in_the_checkpoint_override_args_beside_it(tmp_path):
    file, _, _ = train(tmp_path / "run", img_size=48)
    train(tmp_path / "other", img_size=96, model_kwargs={"negative_slope": 0.003, "stem_negative_slope": 0.02})
    content = torch.load(file, weights_only=False)
    content["args"].model_kwargs = {"stem_negative_slope": 0.02, "negative_slope": 0.003}  # YAML sorts them
    save_checkpoint(content, file)
    (file.parent / "args.yaml").write_text(yaml.safe_dump(vars(content["args"])))
    same = convert_checkpoint(file)
    assert not any("differs" in note for note in same.notes)
    shutil.copy(tmp_path / "other" / "args.yaml", file.parent)
    conversion = convert_checkpoint(file)
    assert conversion.pretrained_cfg["input_size"] == (3, 48, 48)
    assert any("differs; used from the checkpoint's args: img_size 48, not 96" in note for note in conversion.notes)
    assert convert_checkpoint(file, args=file.parent / "args.yaml").pretrained_cfg["input_size"] == (3, 96, 96)


NO_RUNS = {
    "objects": (
        "!!python/object/apply:os.mkdir [executed]\n",
        "args.yaml is not YAML: ConstructorError: could not determine a constructor for the tag",
    ),
    "text": ("just text\n", "is not a mapping"),
    "deep": ("[" * 5000, "args.yaml is not YAML: maximum recursion depth exceeded"),
    "ultralytics": ("model: yolov8n.pt\nimgsz: 640\n", "names an unknown model"),
    "another_network": ("model: resnet50\n", "it is not a TResNet"),
    "another_run": ("model: tresnet_l\n", 'names the model "tresnet_l", the checkpoint "test_tresnet"'),
    "odd_model": ("model: [test_tresnet]\n", "needs model to be text without control characters"),
    "no_model": ("lr: 0.1\n", "needs model, which is missing"),
}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        pytest.param(
            *case, id=name, marks=[] if name in ("objects", "another_run", "no_model") else pytest.mark.thorough
        )
        for name, case in NO_RUNS.items()
    ],
)
def test_args_that_are_none_of_a_run_are_left_out_and_the_note_says_why(text, fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, _, _ = train(tmp_path / "run")
    content = torch.load(file, weights_only=False)
    content = {name: content[name] for name in ("state_dict", "arch") if name == "state_dict" or "tresnet_l" in text}
    save_checkpoint(content, file)
    (file.parent / "args.yaml").write_text(text)
    conversion = convert_checkpoint(file)
    assert any("left out" in note and fault in note for note in conversion.notes), conversion.notes
    assert "mean" not in conversion.pretrained_cfg
    with pytest.raises(ValueError, match=re.escape(fault)):
        convert_checkpoint(file, args=file.parent / "args.yaml")
    assert not (tmp_path / "executed").exists()


def test_args_are_found_in_the_file_or_beside_it_and_what_differs_is_said(tmp_path):
    path, beside = tmp_path / "a.pth", tmp_path / "args.yaml"
    assert find_run({}, path) == (None, ())
    own = {**USUAL, "img_size": 48, "num_classes": None, "data_dir": None}
    beside.write_text(yaml.safe_dump({**own, "lr": 3.0}))
    run, faults = find_run({"args": own}, path)
    assert (run.notes, faults) == (("run of train.py: the checkpoint's args",), ())
    # What train.py completes once it has begun is in the checkpoint only.
    completed = {**own, "num_classes": 3, "data_dir": "images"}
    assert find_run({"args": completed}, path)[0].notes == run.notes
    beside.write_text(yaml.safe_dump({**own, "img_size": 64, "gp": "max", "num_classes": 5}))
    told = 'img_size 48, not 64, gp null, not "max"'
    differs = f"{beside} differs; used from the checkpoint's args: num_classes 3, not 5, {told}"
    assert find_run({"args": argparse.Namespace(**completed)}, path)[0].notes == (*run.notes, differs)
    assert find_run({}, path)[0].notes == (f"run of train.py: {beside}",)
    assert find_run({"args": [own]}, path)[0].args["img_size"] == 64
    found = find_run({"args": own}, tmp_path / "elsewhere" / "b.pth", beside)[0]
    assert (found.args["img_size"], found.notes) == (64, (f"run of train.py: {beside}",))
    beside.write_bytes(b"#" * (2**20 + 1))
    long = f"{beside} needs to be at most 1048576 bytes long, got 1048577"
    assert find_run({}, path) == (None, (f"{beside} was left out: {long}",))
    with pytest.raises(ValueError, match=f"^{re.escape(long)}$"):
        find_run({}, path, beside)
    beside.write_text("- text\n")
    assert find_run({}, path) == (None, (f"left out: {beside}: it is not a mapping",))
    with pytest.raises(ValueError, match=f"^{re.escape(str(beside))} cannot be used: it is not a mapping$"):
        find_run({}, path, beside)
    assert find_run({"args": {"lr": 1}, "arch": "test_tresnet"}, tmp_path / "b" / "c")[1] == (
        "left out: the checkpoint's args: it needs model, which is missing",
    )


def test_the_model_in_args_is_that_of_the_checkpoint(tmp_path):
    def find(arch, model="test_tresnet"):
        return find_run({"args": {"model": model}, "arch": arch}, tmp_path / "a.pth")

    for arch in ("test_tresnet", "TResNet", None, 3):  # a class's name is none of timm's
        assert find(arch)[0].start.architecture == "test_tresnet"
    for arch in ("tresnet_m", "hf-hub:owner/name"):
        fault = f'it names the model "test_tresnet", the checkpoint "{arch}"'
        assert find(arch) == (None, (f"left out: the checkpoint's args: {fault}",))
    run, (fault,) = find(None, "resnet50")
    assert run is None
    assert fault.startswith("left out: the checkpoint's args: it names an unknown model: cannot look up")


@pytest.mark.parametrize(
    "args",
    [
        {"model": torch.zeros(3)},
        {"model": ["test_tresnet"]},
        {"lr": 0.1},
        {3: 4},
    ],
    ids=["tensor", "list", "another_code", "numbers"],
)
def test_args_of_other_training_code_are_left_out(args, tmp_path):
    file, _, _ = train(tmp_path / "run")
    (file.parent / "args.yaml").unlink()
    save_checkpoint({**torch.load(file, weights_only=False), "args": args}, file)
    conversion = convert_checkpoint(file)
    assert any(note.startswith("left out: the checkpoint's args: it ") for note in conversion.notes)
    assert any(
        note.startswith("unknown and left out: input_size, interpolation, mean, std") for note in conversion.notes
    )


LEFT_OUT = {  # fields of args that cannot be used, and what is said of them
    "interpolation": ({"interpolation": "random"}, 'needs interpolation to be one of .*"random"; used instead: "bil'),
    "crop": ({"crop_pct": 87.5}, r"needs crop_pct to be a number from 0.1 to 2 .*got 87.5; used instead: 1.0$"),
    "size": ({"img_size": "large"}, r"needs img_size to be an integer .*; used instead: \[3, 64, 64\]"),
    "one_size": ({"input_size": 224}, r"needs input_size to be a list of 3, .*; used instead: \[3, 48, 48\]"),
    "tensor": ({"mean": torch.zeros(3)}, r"needs mean .*; used instead: \[0.0, 0.0, 0.0\]"),
    "two_numbers": ({"std": [0.5, 0.5]}, r"needs std to have a number for each of 3 channels, got \[0.5, 0.5\]; used"),
    "grey": ({"std": [0.5], "mean": [0.1, 0.2], "in_chans": 1}, r"needs mean to have a number for each of 1 channels"),
    "pooling": ({"gp": "mean"}, "needs gp to be one of .*; it counts as not given"),
    "place": ({"data_dir": "images\n"}, "needs data_dir to be text without control .*; it counts as not given"),
    "average": ({"model_ema": "yes"}, "needs model_ema to be .*; it counts as not given"),
}


@pytest.mark.parametrize(("odd", "said"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_a_field_of_args_that_cannot_be_used_is_left_out_alone(odd, said, tmp_path):
    """The data config is that of validate.py with the field left out; validate.py itself ends in an error."""
    usual = {"img_size": 48, "std": [0.3], "crop_pct": 0.8, "model_kwargs": {"negative_slope": 0.3}}
    usual = {name: value for name, value in usual.items() if not (odd.keys() == {"img_size"} and name == "img_size")}
    in_chans = odd.get("in_chans")
    file, args, model = train(tmp_path / "run", in_chans=in_chans, **usual)
    content = torch.load(file, weights_only=False)
    save_checkpoint({**content, "args": argparse.Namespace(**{**vars(args), **odd})}, file)
    (file.parent / "args.yaml").unlink()
    converted, conversion = convert(tmp_path, file)
    notes = [note for note in conversion.notes if note.startswith("left out of the checkpoint's args: it needs ")]
    assert len(notes) == 1
    assert re.search(said, notes[0]), notes
    remaining = {**vars(args), **odd, notes[0].partition(" needs ")[2].split()[0]: None}
    expected = resolve(args=remaining, model=model, use_test_size=True)
    expected["mean"] = expected["mean"][: model.in_chans]
    assert resolve(model=converted) == expected
    assert_same_network(converted, model, model.in_chans)


def test_a_field_of_args_that_cannot_be_used_leaves_nothing_known_where_the_start_is_gone(start, tmp_path):
    file, _, _ = train(tmp_path / "run", model=f"local-dir:{start}", img_size=64)
    content = torch.load(file, weights_only=False)
    content["args"].crop_pct = "much"
    save_checkpoint(content, file)
    shutil.rmtree(start)
    conversion = convert_checkpoint(file)
    assert any("needs crop_pct" in note and note.endswith("nothing is used instead") for note in conversion.notes)
    assert conversion.pretrained_cfg["input_size"] == (3, 64, 64)
    assert "crop_pct" not in conversion.pretrained_cfg


def test_without_the_starting_weights_only_the_args_are_used(start, tmp_path):
    file, _, _ = train(tmp_path / "run", model=f"local-dir:{start}", img_size=64)
    shutil.rmtree(start)
    conversion = convert_checkpoint(file)
    assert conversion.pretrained_cfg["input_size"] == (3, 64, 64)
    assert not {"mean", "std", "interpolation", "crop_pct"} & conversion.pretrained_cfg.keys()
    said = "the run's starting weights are unknown, only its args are used: cannot look up"
    assert any(said in note for note in conversion.notes)


def test_a_start_on_the_hub_is_looked_up_without_its_weights(start, hub, monkeypatch, tmp_path):
    direct_client(monkeypatch, hub, tmp_path / "cache")
    hub.add("owner/start", start)
    weights = look_up_weights("hf-hub:owner/start")
    assert (weights.architecture, weights.model_args["negative_slope"]) == ("test_tresnet", 0.2)
    file, args, model = train(tmp_path / "run", model="hf-hub:owner/start", img_size=64)
    converted, _ = convert(tmp_path, file)
    assert resolve(model=converted) == resolve(args=vars(args), model=model, use_test_size=True)
    assert not any("safetensors" in path for _, path, _ in hub.requests)
    like = convert_checkpoint(file, like="hf-hub:owner/start").pretrained_cfg
    assert (like["crop_mode"], like["input_size"]) == ("squash", (3, 48, 48))


def test_deprecated_names_and_public_weights_can_be_looked_up():
    assert look_up_weights("tresnet_m_448").pretrained_cfg["input_size"] == (3, 448, 448)
    assert look_up_weights("tresnet_v2_l.miil_stanford_cars_368").model_args["negative_slope"] == 1e-6
    with pytest.raises(ValueError, match="cannot look up the weights resnet50: it is not a TResNet"):
        look_up_weights("resnet50")


def draw(folder, *names, suffix="png"):
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name / f"a.{suffix}")
    return folder


def read_by_timm(root, **kwargs):
    found = timm.data.create_dataset("", root=str(root), split="train", **kwargs).reader.class_to_idx
    return sorted(found, key=found.get)


FOLDERS = {
    "natural": ("train", ["b10", "b9", "A", "ä"]),
    "nested": ("training", ["2024/cat", "2024/dog", "old/cow"]),
    "no_split": ("", ["x1", "x11", "X2"]),
}


@pytest.mark.parametrize(("split", "names"), FOLDERS.values(), ids=FOLDERS)
def test_folders_name_the_classes_in_the_order_of_timms_reader(split, names, tmp_path, capsys):
    draw(tmp_path / "images" / split, *names)
    (tmp_path / "images" / split / "empty").mkdir()
    (tmp_path / "images" / split / names[0] / "notes.txt").write_text("no image")
    file, _, _ = train(tmp_path / "run", data_dir=str(tmp_path / "images"), num_classes=len(names))
    converted, conversion = convert(tmp_path, file)
    assert list(converted.pretrained_cfg["label_names"]) == read_by_timm(tmp_path / "images")
    assert "class names: folders of the training images" in conversion.notes
    image = str(next((tmp_path / "images").rglob("*.png")))
    assert cli.main(["classify", "--model", f"local-dir:{tmp_path / 'converted'}", image]) == 0
    assert (
        capsys.readouterr().err == "timm-tresnet: class names: folders of the training images, in the weights' config\n"
    )


def test_images_of_the_runs_type_name_the_classes(tmp_path):
    images = draw(tmp_path / "images", "train/cat", "train/dog")
    draw(images, "train/cow", suffix="jpg")
    args = {"data_dir": str(images)}
    for num_classes, types in ((3, None), (2, ".png"), (1, ".jpg"), (3, ".jpg;.png")):
        names, source, fault = name_classes(Run({**args, "input_key": types}, None), num_classes)
        assert list(names) == read_by_timm(images, input_key=types)
        assert (len(names), source, fault) == (num_classes, "folders of the training images", "")


def test_class_maps_name_the_classes(tmp_path):
    images = draw(tmp_path / "images", "train/cat", "train/dog", "train/cow")
    (images / "train" / "map.txt").write_text("dog\ncow\ncat\n")
    (tmp_path / "map.pkl").write_bytes(pickle.dumps({"cow": 0, "cat": 1, "dog": 2}))
    for name in ("map.txt", str(tmp_path / "map.pkl")):
        file, _, _ = train(tmp_path / "run", data_dir=str(images), class_map=name)
        conversion = convert_checkpoint(file)
        assert conversion.labels["label_names"] == read_by_timm(images, class_map=name)
        assert "class names: the run's class map" in conversion.notes


def test_a_class_map_is_bounded(tmp_path):
    """Python's own reader would take 32 GiB for the first, and the second would be read as a whole."""
    map = tmp_path / "map.pkl"
    file, _, _ = train(tmp_path / "run", class_map=str(map))
    map.write_bytes(b"\x80\x02}r" + struct.pack("<I", 2**31) + b".")
    assert any("declares 2147483648 objects after 2 operations" in note for note in convert_checkpoint(file).notes)
    with map.open("wb") as content:
        content.truncate(2**24 + 1)  # sparse
    assert any("needs to be at most 16777216 bytes long" in note for note in convert_checkpoint(file).notes)
    map.unlink()
    os.mkfifo(map)
    assert any("map.pkl is not a file" in note for note in convert_checkpoint(file).notes)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_class_map_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "map.pkl").write_bytes(pickle.dumps({"cow": Hostile(), "cat": 1, "dog": 2}))
    file, _, _ = train(tmp_path / "run", class_map=str(tmp_path / "map.pkl"))
    conversion = convert_checkpoint(file)
    assert conversion.labels == {}
    assert any("class map was left out: " in note and "code to be run, " in note for note in conversion.notes)
    assert not (tmp_path / "executed").exists()


FAULTY = "the run's folders of images, {}, were left out: it"
NO_NAMES = {
    "gone": (
        {"data_dir": "nowhere"},
        "the run has no class folders at nowhere; name the classes with --labels FILE",
    ),
    "not_said": ({}, "the run does not say where its images were; name the classes with --labels FILE"),
    "none": ({"data_dir": "none"}, f"{FAULTY.format('none')} needs 3 names, one for each class, got 0"),
    "more": ({"data": "many"}, f"{FAULTY.format('many')} needs 3 names, one for each class, got 4"),
    "loose": (
        {"data_dir": "loose"},
        f'{FAULTY.format("loose")} needs name 0 to be text without control characters, got ""',
    ),
    "case": (
        {"data_dir": "case"},
        f"{FAULTY.format('case')} has names that differ only in case, whose order in timm is undefined",
    ),
    "case_of_few": (
        {"data_dir": "both"},
        f"{FAULTY.format('both')} has names that differ only in case, whose order in timm is undefined",
    ),
    "data_set": (
        {"dataset": "torch/cifar10", "data_dir": "two"},
        'classes of the data set "torch/cifar10" are not read; name them with --labels FILE',
    ),
    "no_map": (
        {"class_map": "gone.txt", "data_dir": "three"},
        "the run's class map was left out: there is no three/gone.txt",
    ),
    "long_map": (
        {"class_map": "long.txt", "data_dir": "three"},
        "the run's class map long.txt was left out: it needs 3 names, one for each class, got 4",
    ),
}


@pytest.mark.parametrize(("given", "fault"), NO_NAMES.values(), ids=NO_NAMES)
def test_missing_or_surplus_names_are_reported(given, fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "two", "a", "b")
    draw(tmp_path / "both", "B", "b")
    (tmp_path / "none").mkdir()
    draw(tmp_path / "three", "a", "b", "c")
    draw(tmp_path / "many", "a", "b", "c", "d", "e", "f")
    draw(tmp_path / "case", "a", "B", "b")
    draw(tmp_path / "loose", "a", ".")
    (tmp_path / "long.txt").write_text("a\nb\nc\nd\n")
    assert name_classes(Run({**USUAL, **given}, None), 3) == ((), "", fault)


def test_why_there_are_no_names_is_noted(tmp_path):
    file, _, _ = train(tmp_path / "run", data_dir="nowhere")
    conversion = convert_checkpoint(file)
    assert conversion.labels == {}
    assert "the run has no class folders at nowhere; name the classes with --labels FILE" in conversion.notes
    assert "class names: none found; give them with --labels FILE" in conversion.notes


def test_folders_of_torchvision_are_numbered_by_their_letters(tmp_path):
    images = draw(tmp_path / "images", *(f"train/{name}" for name in ("b10", "b9", "A", "B9")))
    for data_set in ("torch/folder", "Torch/image_folder"):
        found = timm.data.create_dataset(data_set.lower(), root=str(images), split="train").class_to_idx
        run = Run({"data_dir": str(images), "dataset": data_set}, None)
        assert name_classes(run, 4) == (tuple(sorted(found, key=found.get)), "folders of the training images", "")


def test_splits_have_the_names_that_timm_looks_for(tmp_path):
    for number, (there, asked) in enumerate(
        [
            *(("training", "train"), ("train", "training"), ("train", "train[:10%]"), ("eval", "validation")),
            *(("valid", "val"), ("evaluation", "valid"), ("validation", "eval"), ("val", "evaluation")),
            *(("test", "test"), ("", "test")),
        ]
    ):
        root = tmp_path / str(number)
        draw(root / there, "b", "a")
        (root / "c").symlink_to(root / there / "a")
        found = timm.data.create_dataset("", root=str(root), split=asked).reader.class_to_idx
        names, _, fault = name_classes(Run({"data_dir": str(root), "train_split": asked}, None), len(found))
        assert (list(names), fault) == (sorted(found, key=found.get), "")


FEW_NAMES = {  # what a run with six outputs was given, the names, and where they are said to be from
    "folders": ({"data_dir": "four"}, "folders of the training images"),
    "class_map": ({"data_dir": "four", "class_map": "map.txt"}, "the run's class map"),
    "labels": ({"data_dir": "three"}, "a file of labels"),
}


@pytest.mark.parametrize(("given", "source"), FEW_NAMES.values(), ids=FEW_NAMES)
def test_a_network_with_more_outputs_than_names_keeps_the_names(given, source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "four", "b10", "b9", "cow", "dog")
    draw(tmp_path / "three", "x", "y", "z")
    (tmp_path / "map.txt").write_text("dog\ncow\nb9\nb10\n")
    names = ["b9", "b10", "cow", "dog"] if source.startswith("folders") else ["dog", "cow", "b9", "b10"]
    file, _, _ = train(tmp_path / "run", num_classes=6, **given)
    words = ["convert", str(file), "--output", "out", *(["--labels", "map.txt"] if "labels" in source else [])]
    assert cli.main(words) == 0
    said = f"class names: {source} (4 names for 6 classes, the rest are numbered)"
    assert said in map(str.strip, capsys.readouterr().out.splitlines())
    assert load_folder(tmp_path / "out").pretrained_cfg["label_names"] == [*names, "class 4", "class 5"]
    image = str(next((tmp_path / "four").rglob("*.png")))
    assert cli.main(["classify", "--model", "local-dir:out", "--top-k", "6", image]) == 0
    out, err = capsys.readouterr()
    assert all(f"{name} " in out for name in (*names, "class 4", "class 5"))
    assert err == f"timm-tresnet: {said}, in the weights' config\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [("l.txt", "ä\nb\nc c\n"), ("l.json", '["ä", "b", "c c"]'), ("l.json", '{"2": "c c", "0": "ä", "1": "b"}'),
     ("l.json", '{"c c": 2, "b": 1, "ä": 0}')],
    ids=["text", "list", "by_number", "by_name"],
)  # fmt: skip
def test_a_file_of_labels_goes_before_the_runs_names(name, text, tmp_path):
    draw(tmp_path / "images", "x", "y", "z")
    file, _, _ = train(tmp_path / "run", data_dir=str(tmp_path / "images"))
    (tmp_path / name).write_text(text, encoding="utf-8")
    conversion = convert_checkpoint(file, labels=tmp_path / name)
    assert conversion.labels == {"label_names": ["ä", "b", "c c"]}
    assert "class names: a file of labels" in conversion.notes


def test_a_file_of_labels_that_cannot_name_the_classes_is_an_error(tmp_path, capsys):
    file, _, _ = train(tmp_path / "run")
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\n")
    words = ["convert", str(file), "--output", str(tmp_path / "out"), "--labels"]
    assert cli.main([*words, str(tmp_path / "labels.txt")]) == 1
    assert "labels.txt cannot name the classes: it needs 3 names, one for each class, got 4" in capsys.readouterr().err
    assert cli.main([*words, str(tmp_path / "gone.txt")]) == 1
    assert "gone.txt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_weights_lend_their_preprocessing(start, tmp_path, monkeypatch):
    bare = save_checkpoint(timm.create_model("test_tresnet", num_classes=3).state_dict(), tmp_path / "a.pth")
    by_folder = convert_checkpoint(bare, like=str(start)).pretrained_cfg
    names = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    assert [by_folder[name] for name in names] == [
        (3, 48, 48), (0.1, 0.2, 0.3), (0.5, 0.5, 0.6), "bicubic", 0.7, "squash",
    ]  # fmt: skip
    assert by_folder == convert_checkpoint(bare, like=f"local-dir:{start}").pretrained_cfg
    by_name = convert_checkpoint(bare, like="tresnet_m.miil_in1k", crop_pct=0.9).pretrained_cfg
    assert [by_name[name] for name in names] == [
        (3, 224, 224), (0.0,) * 3, (1.0,) * 3, "bilinear", 0.9, "center",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="cannot convert .*cannot look up the weights resnet50: it is not a TResNet"):
        convert_checkpoint(bare, like="resnet50")
    unknown = convert_checkpoint(bare, like="tresnet_l.q2l_coco_448").pretrained_cfg  # no source says mean and std
    assert unknown["input_size"] == (3, 448, 448)
    assert "mean" not in unknown


def test_assumed_values_stay_assumed_and_are_reported(tmp_path, capsys):
    bare = save_checkpoint(timm.create_model("test_tresnet", num_classes=3).state_dict(), tmp_path / "a.pth")
    write_folder(convert_checkpoint(bare, interpolation="bicubic", input_size=48), tmp_path / "folder")
    model = load_folder(tmp_path / "folder")
    assumed = "assumed, as for test_tresnet: mean (0, 0, 0), std (1, 1, 1), crop_pct 1.0. If you know it"
    timm.models.save_for_hf(model, tmp_path / "again", safe_serialization=True, model_config={"num_classes": 3})
    artifact = tmp_path / "network.pt"
    for folder in ("folder", "again"):
        name = f"local-dir:{tmp_path / folder}"
        data = timm.data.resolve_data_config(model=load_folder(tmp_path / folder))
        assert (tuple(data["mean"]), data["interpolation"], data["input_size"][1]) == ((0, 0, 0), "bicubic", 48)
        assert cli.main(["export", name, "--format", "torchscript", "--output", str(artifact)]) == 0
        assert assumed in capsys.readouterr().err
        image = str(next(draw(tmp_path / "images", "x").rglob("*.png")))
        for words in (["--model", name], ["--engine", "torch", str(artifact), "--trust"]):
            assert cli.main(["classify", *words, image]) == 0
            (line,) = (line for line in capsys.readouterr().err.splitlines() if "assumed" in line)
            assert assumed in line
    described = yaml.safe_load(artifact.with_name("network.pt.json").read_text())
    assert described["preprocessing_assumed"] == ["mean", "std", "crop_pct"]
    write_folder(convert_checkpoint(bare, like="test_tresnet"), tmp_path / "known")
    assert cli.main(["classify", "--model", f"local-dir:{tmp_path / 'known'}", image]) == 0
    assert capsys.readouterr().err == "timm-tresnet: class names: no names are known, classes are numbered\n"

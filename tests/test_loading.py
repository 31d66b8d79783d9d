import copy
import json
import math
import os
import shutil

import pytest
import timm
import torch

from timm_tresnet import cli
from timm_tresnet.images import SAMPLES
from timm_tresnet.loading import load_network

CAT = str(SAMPLES / "cat.jpg")
MISSING = object()
HUGE = 10**30
DAMAGES = [  # where in config.json, and what is put there
    *((path, value) for path in ["architecture"] for value in [
        MISSING, None, 7, [], ["test_tresnet"], {}, True, "", "resnet50", "tresnet_q", "../test_tresnet", "os.system",
        "test_tresnet.r64_cifar10", "test_tresnet\n", "\ud800",
    ]),
    *(("pretrained_cfg", value) for value in [None, [], "r64", 3, True]),
    *((f"pretrained_cfg.{name}", value) for name, values in {
        "unknown": [1],
        "__class__": ["x"],
        "file": ["/etc/passwd", "model.bin", 3],
        "url": ["http://127.0.0.1:9/x.pth", ["http://127.0.0.1:9/x.pth", "x"]],
        "state_dict": [{"head.fc.weight": [1]}],
        "hf_hub_id": ["other/repository"],
        "hf_hub_filename": ["../../x.bin"],
        "source": ["url", "timm"],
        "custom_load": [True, "hf", 1],
        "architecture": [1],
        "input_size": [[3, 64], "64", [3, 63, 63], [3, 4, 4], [3, -64, 64], [3, 64.5, 64], [3, 10**9, 64], 64],
        "fixed_input_size": [True],
        "interpolation": ["cubist", 3, "random"],
        "mean": [[0, 0], "000", [None] * 3, [math.nan] * 3, 0, [[0], [0], [0]]],
        "std": [[0, 0, 0], [1, 1], [-1, 1, 1], [math.inf] * 3],
        "crop_pct": [0, -1, "all", math.nan, 1e-9, HUGE],
        "crop_mode": ["round", 1],
        "num_classes": [None, "ten", -1, HUGE],
        "label_offset": [-1, "one", 10**6],
        "label_names": [{"0": "cat"}, "cat", [1, 2], ["\x1b[2J"], ["\ud800"]],
        "label_descriptions": [["cat"], {"cat": 3}, {"cat": "\x07"}],
        "pool_size": ["2", [2], [0, 0]],
        "first_conv": ["head.fc", "nowhere", 3],
        "classifier": ["nowhere", ["head.fc"], 3],
        "tag": [3, ["a"]],
        "notes": [3, {"a": 1}, [None]],
        "license": [3],
    }.items() for value in values),
    *(("num_classes", value) for value in [None, "ten", 9.5, -1, HUGE, 10**7, [10], True, 7, math.nan]),
    *(("label_names", value) for value in [3, "cat", {"0": "cat"}, [None], ["a\nb"], ["\ud800"]]),
    *(("label_descriptions", value) for value in [3, ["cat"], {"cat": None}]),
    *(("model_args", value) for value in [None, [], "x", 3, [["layers", [1, 1, 1, 1]]]]),
    *((f"model_args.{name}", value) for name, values in {
        "_target_": ["os.system"],
        "checkpoint_path": ["/etc/passwd"],
        "pretrained": [True],
        "pretrained_cfg": [{"file": "/etc/passwd"}],
        "pretrained_cfg_overlay": [{"file": "/etc/passwd"}],
        "cache_dir": ["/tmp"],
        "features_only": [True],
        "img_size": [64],
        "device": ["meta", "cuda"],
        "dtype": ["float16", "torch.float16", 3],
        "in_chans": [0, -3, "three", 3.0, None, HUGE, True],
        "num_classes": [5, "ten", None, -1],
        "width_factor": [0, -1, "wide", math.inf, math.nan, None, HUGE, 1e-9, 15],
        "layers": ["1111", [1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1.5], [1, 1, 1, "1"], None, [10**9] * 4, 3, [1] * 5],
        "v2": ["yes", 1, None],
        "block": ["transformer", 3, ["basic"], ["basic"] * 3 + [None]],
        "stem": ["conv3x3", None, 3],
        "use_se": ["yes", [True], None, 2],
        "aa_layer": ["sharp", 1, None],
        "act_layer": ["nothing", "", 3, None, "os.system"],
        "negative_slope": ["0.1", math.nan, math.inf, -1, None, 2],
        "stem_negative_slope": ["0.1", math.nan, [0.1]],
        "norm_layer": ["nothing", "", 3, None, "groupnorm"],
        "output_stride": [0, 4, "32", 32.0, None],
        "global_pool": ["nothing", 3, None, ""],
        "head_features": [0, -1, "many", HUGE, 1.5],
        "drop_rate": [-1, 2, "half", math.nan],
        "drop_path_rate": [-1, 1, None],
        "rebuild": ["everything", None, 1],
    }.items() for value in values),
]  # fmt: skip
TEXTS = {  # what is no config at all
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "number": b"7",
    "not_json": b"architecture: test_tresnet",
    "cut": b'{"architecture": "test_tr',
    "not_utf8": '{"architecture": "test_tresnet"}'.encode("utf-16"),
    "deep": b"[" * 10**5,
    "zeros": bytes(100),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder as timm writes them, which the tests damage and mend again."""
    folder = tmp_path_factory.mktemp("good")
    model = timm.create_model("test_tresnet", num_classes=10, in_chans=3)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


@pytest.fixture
def config(good):
    path = good / "config.json"
    content = path.read_bytes()
    yield path
    path.write_bytes(content)


def damage(config, path, value):
    config = copy.deepcopy(config)
    table = config
    *parents, name = path.split(".")
    for parent in parents:
        table = table[parent]
    if value is MISSING:
        del table[name]
    else:
        table[name] = value
    return config


def assert_refused(name, capfd, *parts):
    """One sentence on standard error, nothing else, exit status 2."""
    assert cli.main(["classify", "--model", name, CAT]) == 2
    output, error = capfd.readouterr()
    assert output == ""
    (line,) = error.splitlines()
    assert line.startswith(f"timm-tresnet: cannot load the model {name}: ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize(("path", "value"), DAMAGES, ids=lambda each: "" if each is MISSING else repr(each)[:30])
def test_damaged_config_is_refused_in_one_sentence(path, value, good, config, capfd):
    config.write_text(json.dumps(damage(json.loads(config.read_text()), path, value)))
    assert_refused(f"local-dir:{good}", capfd, str(config))


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_what_is_no_config_is_refused_in_one_sentence(content, good, config, capfd):
    config.write_bytes(content)
    assert_refused(f"local-dir:{good}", capfd, str(config))


def test_good_folder_classifies(good, capfd):
    assert cli.main(["classify", "--model", f"local-dir:{good}", CAT]) == 0
    assert capfd.readouterr().err == ""


def test_other_commands_check_the_config_too(good, config, tmp_path, capfd):
    config.write_text(json.dumps(damage(json.loads(config.read_text()), "model_args.negative_slope", math.nan)))
    output = tmp_path / "network.pt"
    assert cli.main(["export", f"local-dir:{good}", "--format", "torchscript", "--output", str(output)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "needs model_args.negative_slope to be a number from 0 to 1, got NaN" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50", "it is no TResNet; see `timm-tresnet list`"),
        ("resnet50.a1_in1k", "it is no TResNet"),
        ("", "Unknown model"),
        ("hf-hub:", "hf-hub:OWNER/NAME or local-dir:FOLDER"),
        ("local-dir:", "hf-hub:OWNER/NAME or local-dir:FOLDER"),
        ("file:/etc/passwd", "hf-hub:OWNER/NAME or local-dir:FOLDER"),
        ("hf-hub:a@", "a revision behind @"),
        ("hf-hub:a/b/c/d", "Repo id must be"),
        ("hf-hub:../..", "Repo id must"),
        ("hf-hub:a@b@c@d", ""),
        ("local-dir:nowhere", "No such file"),
        ("local-dir:/dev/null", "Not a directory"),
        ("./folder", ""),
        ("\x00", ""),
        ("local-dir:\x00", ""),
    ],
)
def test_names_that_mean_nothing_are_refused_in_one_sentence(name, message, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused(name, capfd, message)


def no_tensors(folder):
    (folder / "model.safetensors").unlink()


def pipe(folder):
    no_tensors(folder)
    os.mkfifo(folder / "model.safetensors")


def dangling_link(folder):
    no_tensors(folder)
    (folder / "model.safetensors").symlink_to("nowhere")


def folder_for_a_file(folder):
    no_tensors(folder)
    (folder / "model.safetensors").mkdir()


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickle_of_code(folder):
    no_tensors(folder)
    torch.save({"body.conv1.conv.weight": os.system}, folder / "pytorch_model.bin")


def pickle_of_something(folder):
    no_tensors(folder)
    torch.save([1, 2, 3], folder / "pytorch_model.bin")


def pickle_of_noise(folder):
    no_tensors(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02" + bytes(range(256)))


def another_network(folder):
    model = timm.create_model("test_tresnet", num_classes=10, layers=(1, 1, 1, 1), width_factor=0.5)
    timm.models.save_for_hf(model, folder / "other", safe_serialization=True)
    shutil.copy(folder / "other" / "model.safetensors", folder)


DAMAGED_WEIGHTS = [no_tensors, pipe, dangling_link, folder_for_a_file, cut, pickle_of_code, pickle_of_something]
DAMAGED_WEIGHTS += [pickle_of_noise, another_network]


@pytest.mark.parametrize("damage", DAMAGED_WEIGHTS, ids=lambda damage: damage.__name__)
def test_damaged_weights_are_refused_in_one_sentence(damage, good, tmp_path, capfd):
    folder = shutil.copytree(good, tmp_path / "folder")
    damage(folder)
    assert_refused(f"local-dir:{folder}", capfd)


def test_names_of_our_own_load_as_before():
    for name in ("test_tresnet", "test_tresnet.r64_cifar10"):
        assert load_network(name).num_classes == 10

import json
import math
import os
import re
import shutil
import struct

import pytest
import timm
import torch
from damaging import DAMAGES, damage, first_of_each_path
from hub_server import Fault

from timm_tresnet.cli import main as cli
from timm_tresnet.utils.images import SAMPLES
from timm_tresnet.utils.terminal import escape
from timm_tresnet.weights.catalogue import load_catalogue
from timm_tresnet.weights.loading import build_skeleton, load_network, look_up_weights

CAT = str(SAMPLES / "cat.jpg")
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
    arguments = {"num_classes": 10, "in_chans": 3}  # which older timm does not write by itself
    model = timm.create_model("test_tresnet", **arguments)
    timm.models.save_for_hf(model, folder, safe_serialization=True, model_args=arguments)
    return folder


@pytest.fixture
def config(good):
    path = good / "config.json"
    content = path.read_bytes()
    yield path
    path.write_bytes(content)


def assert_refused(name, capfd, *parts):
    """One sentence on standard error, nothing else, exit status 2."""
    assert cli.main(["classify", "--model", name, CAT]) == 2
    output, error = capfd.readouterr()
    assert output == ""
    (line,) = error.splitlines()
    assert line.startswith(f"timm-tresnet: cannot load the model {escape(name)}: ")
    for part in parts:
        assert part in line


@first_of_each_path(DAMAGES)
def test_damaged_config_is_refused_in_one_sentence(path, value, good, config, capfd):
    config.write_text(json.dumps(damage(json.loads(config.read_text()), path, value)))
    assert_refused(f"local-dir:{good}", capfd, str(config))


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_invalid_configs_are_refused_in_one_sentence(content, good, config, capfd):
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
        ("resnet50", "it is not a TResNet; see `timm-tresnet list`"),
        ("resnet50.a1_in1k", "it is not a TResNet"),
        ("", "there is no model"),
        ("hf-hub:", "hf-hub:OWNER/NAME or local-dir:FOLDER"),
        ("local-dir:", "hf-hub:OWNER/NAME or local-dir:FOLDER"),
        ("file:/etc/passwd", "hf-hub:OWNER/NAME or local-dir:FOLDER"),
        ("hf-hub:a@", "a revision after @"),
        ("hf-hub:a/b/c/d", "Repo id must be"),
        ("hf-hub:../..", "Repo id must"),
        ("hf-hub:a@b@c@d", ""),
        ("local-dir:nowhere", "there is no folder nowhere"),
        ("local-dir:/dev/null", "there is no folder /dev/null"),
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


def long_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**40) + path.read_bytes()[8:])


DAMAGED_WEIGHTS = {  # and what is said of them beside the folder
    no_tensors: "",
    pipe: "model.safetensors: not a file",
    dangling_link: "model.safetensors",
    folder_for_a_file: "model.safetensors: not a file",
    cut: "",
    long_header: "model.safetensors: damaged safetensors file: its header declares 1099511627776 bytes",
    pickle_of_code: "",
    pickle_of_something: "",
    pickle_of_noise: "pytorch_model.bin: damaged file, or not written by torch.save: ",
    another_network: "",
}


@pytest.mark.parametrize(
    ("damage", "said"), DAMAGED_WEIGHTS.items(), ids=[damage.__name__ for damage in DAMAGED_WEIGHTS]
)
def test_damaged_weights_are_refused_in_one_sentence(damage, said, good, tmp_path, capfd):
    folder = shutil.copytree(good, tmp_path / "folder")
    damage(folder)
    assert_refused(f"local-dir:{folder}", capfd, said and f"{folder}/{said}")


def test_names_of_our_own_load_as_before():
    for name in ("test_tresnet", "test_tresnet.r64_cifar10"):
        assert load_network(name).num_classes == 10


IN_A_CHILD = """
import contextlib
import sys
from timm_tresnet.cli.main import main

image, *names = sys.argv[1:]
for name in names:
    print(">")
    with contextlib.redirect_stderr(sys.stdout):
        print(main(["classify", "--model", name, image]))
"""


def test_repository_is_loaded_at_the_commit_whose_config_was_checked(good, hub, run_child, tmp_path):
    damaged = shutil.copytree(good, tmp_path / "damaged")
    config = damage(json.loads((damaged / "config.json").read_text()), "pretrained_cfg.url", "http://127.0.0.1:9/x.pth")
    (damaged / "config.json").write_text(json.dumps(config))
    commit = hub.add("owner/good", good)
    hub.add("owner/damaged", damaged)
    good_names = ["hf-hub:owner/good", f"hf-hub:owner/good@{commit}"]
    output = run_child(IN_A_CHILD, CAT, *good_names, "hf-hub:owner/damaged", "hf-hub:owner/nowhere")
    answers = [answer.splitlines() for answer in output.split(">\n")[1:]]
    assert [answer[-1] for answer in answers] == ["0", "0", "2", "2"]
    assert [len(answer) for answer in answers] == [2, 2, 2, 2]
    needs = "config.json of owner/damaged needs pretrained_cfg.url to be null"
    assert f"cannot load the model hf-hub:owner/damaged: {needs}" in answers[2][0]
    assert [path for method, path, status in hub.requests if method == "GET"] == [
        "/owner/good/resolve/main/config.json",
        f"/owner/good/resolve/{commit}/model.safetensors",
        "/owner/damaged/resolve/main/config.json",
    ]
    assert run_child(IN_A_CHILD, CAT, *good_names, HF_HUB_OFFLINE="1") == output.partition(">\ntimm-tresnet: cannot")[0]


def test_weights_that_changed_on_their_way_are_refused_and_fetched_again(good, hub, run_child):
    hub.add("owner/good", good)
    hub.faults.append(Fault("GET .*safetensors", change=lambda body: body[:-1] + bytes([body[-1] ^ 1])))
    output = run_child(IN_A_CHILD, CAT, "hf-hub:owner/good", "hf-hub:owner/good")
    refused, answered = output.split(">\n")[1:]
    assert "model.safetensors of owner/good needs the SHA-256 " in refused
    assert refused.splitlines()[1:] == ["2"]
    assert answered.endswith("0\n")


def test_registered_weights_are_looked_up_with_the_arguments_of_their_network():
    found = look_up_weights("tresnet_v2_l.ml_decoder_coco_448")
    public = load_catalogue()["tresnet_v2_l.ml_decoder_coco_448"]
    assert found.architecture == "tresnet_v2_l"
    assert found.model_args == public.network_arguments
    assert found.model_args["head"] == "ml_decoder"
    assert found.pretrained_cfg["tag"] == "ml_decoder_coco_448"


def test_a_folder_is_looked_up_with_the_arguments_in_its_config(good):
    found = look_up_weights(f"local-dir:{good}")
    assert found.architecture == "test_tresnet"
    assert found.model_args.items() >= {"num_classes": 10, "in_chans": 3}.items()
    assert look_up_weights(f"LOCAL_DIR:{good}").pretrained_cfg == found.pretrained_cfg


NO_NETWORK = {  # arguments that are right each by itself
    "large": ({"width_factor": 15}, "it has 2.3e+09 parameters, more than 1e+09"),
    "no_pooling": ({"global_pool": ""}, "it needs a global_pool to classify images, got ''"),
}


@pytest.mark.parametrize(("arguments", "fault"), NO_NETWORK.values(), ids=NO_NETWORK)
def test_what_describes_no_network_that_can_be_run_is_refused(arguments, fault, good, config):
    content = json.loads(config.read_text())
    content["model_args"].update(arguments)
    config.write_text(json.dumps(content))
    for called in ("config.json", "the file"):
        with pytest.raises(ValueError, match=f"^{called} describes a network that cannot run: {re.escape(fault)}$"):
            build_skeleton(f"local-dir:{good}", *([called] if called == "the file" else []))


def test_networks_for_other_channels_and_without_classes_are_run(good, config):
    content = json.loads(config.read_text())
    content["num_classes"] = content["model_args"]["num_classes"] = content["pretrained_cfg"]["num_classes"] = 0
    content["model_args"].update(in_chans=5, global_pool="")
    content["pretrained_cfg"].update(input_size=[5, 32, 48])
    config.write_text(json.dumps(content))
    model = build_skeleton(f"local-dir:{good}")
    assert (model.in_chans, model.num_classes, model.training) == (5, 0, False)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}

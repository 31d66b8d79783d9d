import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from tagged import WORDS, write_classes

from timm_tresnet.cli import main as cli

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lightning", "torchmetrics", "torchvision")),
    reason="install the extra tagging",
)
EASY = ["--aa", "", "--reprob", "0", "--lr", "5e-3", "--warmup-epochs", "0"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with 3 classes of 14 images to train on and 5 to measure with."""
    folder = tmp_path_factory.mktemp("classes")
    write_classes(folder / "train", 14)
    write_classes(folder / "val", 20, seed=1)
    return folder


def train(folder, output, *words):
    return cli.main(["train", str(folder), "--output", str(output), *WORDS, *map(str, words)])


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "classifier"
    assert train(data, output, "--epochs", "4", *EASY) == 0
    return output


def measure_as_validate_script(model, folder):
    """Top-1 as timm's validate.py computes it."""
    config = timm.data.resolve_data_config({}, model=model)
    dataset = timm.data.create_dataset("", str(folder), split="validation")
    options = {name: config[name] for name in ("interpolation", "mean", "std", "crop_pct", "crop_mode")}
    loader = timm.data.create_loader(
        dataset, config["input_size"], 4, device=torch.device("cpu"), num_workers=0, pin_memory=False, **options
    )
    right = timm.utils.AverageMeter()
    with torch.inference_mode():
        for images, targets in loader:
            top1, _ = timm.utils.accuracy(model(images), targets, topk=(1, 5))
            right.update(top1.item(), len(images))
    return right.avg


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm's dataset leaves files open
def test_a_training_learns_and_ends_with_a_folder_that_timm_and_the_commands_take(data, tmp_path, capsys):
    output = tmp_path / "classifier"
    assert train(data, output, "--epochs", "4", *EASY) == 0
    printed = capsys.readouterr().out
    first, second, third, *_ = printed.splitlines()
    assert first == "42 training images, 60 held out, 3 labels; 4 epochs of 5 batches of 8"
    assert second.startswith("test_tresnet with 0.")
    assert second.endswith(" M parameters, from random weights, at 32x32 pixels")
    assert third.startswith("adam, learning rate 0.005, cosine; 32-true on cpu; checkpoints go into ")
    assert "epoch 4/4: loss " in printed
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "config.json", "model.safetensors"]

    model = timm.create_model(f"local-dir:{output}", pretrained=True).eval()
    assert list(model.pretrained_cfg["label_names"]) == ["2", "10", "ä b"]  # timm's order
    top1 = float(printed.rpartition("top-1 ")[2].split(",")[0])
    assert top1 == pytest.approx(measure_as_validate_script(model, data), abs=0.006)
    assert 60 < top1 < 100
    card = (output / "README.md").read_text(encoding="utf-8")
    assert f"| top-1 on held-out images | {top1:.2f} % |" in card
    assert "| 10 | 14 | " in card

    assert cli.main(["classify", "--json", "--top-k", "1", "--model", f"local-dir:{output}", str(data / "val")]) == 0
    results = json.loads(capsys.readouterr().out)
    right = [Path(each["image"]).parent.name == each["predictions"][0]["label"] for each in results]
    assert 100 * sum(right) / len(right) == pytest.approx(top1, abs=0.006)


@pytest.mark.skipif(not os.environ.get("TIMM_SCRIPTS"), reason="TIMM_SCRIPTS does not name timm's scripts")
def test_validate_script_prints_the_same_top_1(data, trained):
    script = Path(os.environ["TIMM_SCRIPTS"]) / "validate.py"
    words = ["--data-dir", data, "--model", f"local-dir:{trained}", "--pretrained", "--device", "cpu", "--workers", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), *map(str, words)]
    process = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.rpartition("--result\n")[2])
    card = (trained / "README.md").read_text(encoding="utf-8")
    assert f"| top-1 on held-out images | {found['top1']:.2f} % |" in card


def test_preprocessing_is_that_of_the_weights(trained):
    config = json.loads((trained / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]
    start = timm.create_model("test_tresnet").pretrained_cfg
    for name in ("mean", "std"):
        assert config[name] == list(start[name])
    assert (config["crop_pct"], config["crop_mode"], config["interpolation"]) == (1.0, "center", "bilinear")
    assert config["input_size"] == [3, 32, 32]
    assert "notes" not in config  # no tagger


def test_a_finished_training_is_said_to_be_so_and_left_alone(data, trained, capsys):
    before = {path: path.read_bytes() for path in trained.iterdir()}
    assert train(data, trained, "--epochs", "4", *EASY, "--resume") == 0
    printed = capsys.readouterr().out
    assert printed == f"{trained} is already finished with these settings; train again with --overwrite\n"
    assert {path: path.read_bytes() for path in trained.iterdir()} == before
    assert train(data, trained, "--epochs", "5", *EASY, "--resume") == 2
    assert "other epochs (4, now 5)" in capsys.readouterr().err


def test_a_training_that_is_resumed_gives_the_bits_of_one_that_was_not_stopped(data, tmp_path, monkeypatch):
    from timm_tresnet.tagging.module import Tagger

    words = ["--epochs", "2", "--batch-size", "16"]  # with timm's augmentation, which draws from three generators
    assert train(data, tmp_path / "whole", *words) == 0
    step = Tagger.training_step

    def stop(self, batch, index):
        if self.current_epoch == 1:
            raise ValueError("stopped")
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Tagger, "training_step", stop)
        assert train(data, tmp_path / "stopped", *words) == 2
    torch.rand(7)  # what was drawn in between does not matter
    assert train(data, tmp_path / "stopped", *words, "--resume") == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_images_that_cannot_be_read_are_named(tmp_path, capsys):
    folder = tmp_path / "classes"
    write_classes(folder / "train", 4)
    write_classes(folder / "validation", 2, seed=1)
    damaged = [folder / "train" / "2" / "0.png", folder / "validation" / "10" / "1.png"]
    for path in damaged:
        path.write_bytes(b"damaged")
    (folder / "train" / "10" / "x.webp").write_bytes(b"")
    assert train(folder, tmp_path / "out", "--epochs", "1", *EASY) == 0
    printed = capsys.readouterr().out
    assert f"skipped 1 unreadable training images: {damaged[0]}" in printed
    assert f"skipped 1 unreadable validation images: {damaged[1]}" in printed
    assert f"{folder / 'train'}: left out 1 .webp files, which timm's reader skips" in printed


def test_without_packages_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "timm_tresnet.tagging.training", None)
    assert cli.main(["train", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "run pip install '.[tagging]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "test_tresnett"], "there is no model test_tresnett; did you mean test_tresnet"),
        (["--aa", "nonsense"], "timm cannot make the augmentation --aa nonsense"),
        (["--val", "nowhere"], "nowhere needs to be a folder with a folder for each class"),
    ],
)
def test_mistakes_are_reported_in_a_sentence(data, tmp_path, capsys, words, message):
    assert train(data, tmp_path / "out", "--epochs", "1", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()

import argparse
import importlib.util
import json
import os
import subprocess

import numpy as np
import pytest
import timm
import torch
from scripts import load_script

MODEL = "test_tresnet.r64_cifar10"
LABELS = np.tile(np.arange(10), 60)


@pytest.fixture(scope="module")
def transfer():
    return load_script("benchmarks/transfer.py")


@pytest.fixture
def scripts(tmp_path):
    """A folder with a train.py that does nothing."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "train.py").touch()
    return folder


def test_no_image_is_in_two_parts_and_none_is_lost(transfer):
    parts = transfer.split(LABELS, 30, 0)
    found = np.concatenate([parts.train, parts.validation, parts.test])
    assert sorted(found) == list(range(len(LABELS)))
    assert [len(each) for each in (parts.train, parts.validation, parts.test)] == [300, 100, 200]


def test_every_class_has_as_many_images_in_a_part(transfer):
    parts = transfer.split(LABELS, 30, 0)
    for part, count in ((parts.train, 30), (parts.validation, 10), (parts.test, 20)):
        assert list(np.bincount(LABELS[part])) == [count] * 10


def test_seeds_draw_other_images_for_training_and_the_same_for_testing(transfer):
    first, second = (transfer.split(LABELS, 30, seed) for seed in (0, 1))
    assert set(first.train) != set(second.train)
    assert list(first.test) == list(second.test)
    assert list(first.train) == list(transfer.split(LABELS, 30, 0).train)


def test_fewer_images_are_some_of_more(transfer):
    few, many = (transfer.split(LABELS, count, 0) for count in (5, 30))
    assert set(few.train) < set(many.train)
    assert list(few.test) == list(many.test)


def test_a_class_with_too_few_images_is_named(transfer):
    with pytest.raises(ValueError, match="class 0 needs 41 images besides the test images, got 40"):
        transfer.split(LABELS, 41, 0)


@pytest.mark.parametrize(("data", "count", "size"), [("mnist", 5000, 28), ("digits", 1797, 8)])
def test_data_sets_are_those_of_the_packages(transfer, data, count, size):
    module, package = transfer.DATA[data]
    if importlib.util.find_spec(module.split(".")[0]) is None:
        pytest.skip(f"{package} is not installed: install the extra transfer")
    images, labels = transfer.load_digits(data)
    assert images.shape == (count, size, size)
    assert (images.dtype, images.min(), images.max()) == (np.uint8, 0, 255)
    assert set(labels) == set(range(10))
    parts = transfer.split(labels, 100, 0)
    assert list(np.bincount(labels[parts.train])) == [100] * 10


def test_images_are_written_as_the_model_takes_them(transfer, tmp_path):
    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, (600, 8, 8), dtype=np.uint8)
    transfer.write_images(images, LABELS, np.array([7, 13]), timm.get_pretrained_cfg(MODEL).to_dict(), tmp_path)
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert written == ["train/3/0013.png", "train/7/0007.png"]
    with Image.open(tmp_path / "train" / "3" / "0013.png") as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")
        red, green, blue = np.moveaxis(np.asarray(image), -1, 0)
    assert (red == green).all()
    assert (red == blue).all()
    assert list(red[[0, 0, -1, -1], [0, -1, 0, -1]]) == list(images[13][[0, 0, -1, -1], [0, -1, 0, -1]])  # corners


def test_arms_differ_in_the_weights_that_they_start_from(transfer, scripts, tmp_path):
    settings = transfer._parse(["--scripts", str(scripts)])
    recipes = transfer.write_recipes(settings.recipe, tmp_path)
    runs = [transfer.Run(arm, "digits", 10, 0, 1e-3) for arm in transfer.ARMS]
    commands = [
        transfer.make_command(run, recipes[run.arm], tmp_path / "weights", tmp_path, tmp_path, settings) for run in runs
    ]
    assert commands[0][-3:] == ["--pretrained", "--pretrained-path", str(tmp_path / "weights")]
    recipe = commands[1].index("--config") + 1
    assert commands[0][recipe] == str(transfer.RECIPE)
    assert [*commands[1][:recipe], commands[0][recipe], *commands[1][recipe + 1 :]] == commands[0][:-3]
    shipped, scratch = (transfer.yaml.safe_load(recipes[arm].read_text()) for arm in transfer.ARMS)
    assert shipped == {"pretrained": True, **scratch}
    assert settings.epochs == shipped["epochs"]


def test_results_are_read_again_only_for_the_same_recipe_flags_and_weights(transfer, scripts, tmp_path):
    settings = transfer._parse(["--scripts", str(scripts)])
    recipe, weights = tmp_path / "recipe.yaml", tmp_path / "weights"
    recipe.write_text("epochs: 50  # once\n")
    weights.write_text("weights")
    names = set()

    def name(arm="transfer", seed=0, lr=1e-3):
        return transfer.name_run(transfer.Run(arm, "digits", 10, seed, lr), recipe, weights, settings)

    first, scratch = name(), name("scratch")
    names |= {first, scratch, name(seed=1), name(lr=2e-3)}
    recipe.write_text("epochs: 50  # twice\n")
    assert name() == first
    weights.write_text("other weights")
    assert name("scratch") == scratch
    names.add(name())
    recipe.write_text("epochs: 40\n")
    names |= {name(), name("scratch")}
    settings.part = "validation"
    names.add(name("scratch"))
    assert len(names) == 8


def test_top1_counts_the_right_answers(transfer):
    class Bright(torch.nn.Module):
        pretrained_cfg = timm.get_pretrained_cfg(MODEL).to_dict()

        def forward(self, x):
            return torch.stack([0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5], 1)

    images = np.repeat(np.array([0, 255, 0, 255], dtype=np.uint8), 64).reshape(4, 8, 8)
    assert transfer.evaluate(Bright(), images, np.array([0, 1, 1, 1])) == 75


def test_tables_have_mean_and_range_over_the_seeds(transfer):
    rows = [
        {"row": arm, "data": "digits", "images_per_class": 10, "seed": seed, "lr": lr, "top1": top1, "top1_last": 50}
        for arm, lr, results in (("transfer", 1e-3, (80, 90)), ("scratch", 1e-3, (60, 61)), ("scratch", 1e-2, (70,)))
        for seed, top1 in enumerate(results)
    ]
    header, _, line = transfer.format_table(rows).splitlines()
    assert header.startswith(
        "| data set | images a class | transfer: top-1, % | scratch, 0.001: top-1, % | scratch, 0.01"
    )
    assert line.startswith("| digits | 10 | 85.00 (80.00-90.00) | 60.50 (60.00-61.00) | 70.00 (70.00-70.00) | 50.00 |")


def test_batches_that_no_training_could_fill_are_refused(transfer, scripts, capsys):
    with pytest.raises(SystemExit, match="2"):
        transfer.main(["--scripts", str(scripts), "--images-per-class", "2", "--batch-size", "32"])
    assert "--batch-size needs at most the images of the smallest training, 20, got 32" in capsys.readouterr().err


def test_a_missing_package_is_named(transfer, scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(transfer.DATA, "digits", ("no_such_package.datasets", "scikit-learn"))
    words = ["--scripts", str(scripts), "--data", "digits", "--json", str(tmp_path / "results.json")]
    assert transfer.main(words) == 1
    assert (
        "--data digits needs scikit-learn: in the clone of timm-tresnet, run pip install '.[transfer]'"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "results.json").exists()


def test_a_training_that_fails_is_reported(transfer, scripts, monkeypatch, capsys):
    images = np.zeros((600, 8, 8), dtype=np.uint8)
    monkeypatch.setattr(transfer, "load_digits", lambda data: (images, LABELS))
    (scripts / "train.py").write_text("raise SystemExit('out of luck')")
    assert transfer.main(["--scripts", str(scripts), "--data", "digits"]) == 1
    assert "out of luck" in capsys.readouterr().err


@pytest.mark.skipif(not os.environ.get("TIMM_SCRIPTS"), reason="TIMM_SCRIPTS does not name timm's scripts")
def test_both_arms_are_trained_and_measured_and_read_again(transfer, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="install the extra transfer")
    work, commands = tmp_path / "work", []

    def run(command, **options):
        commands.append(command)
        return subprocess.run(command, **options)

    monkeypatch.setattr(transfer.train_script, "subprocess", argparse.Namespace(run=run))
    words = ["--data", "digits", "--images-per-class", "2", "--batch-size", "10", "--seeds", "1", "--epochs", "2"]
    words += ["--work", str(work)]
    assert transfer.main([*words, "--json", str(tmp_path / "first.json")]) == 0
    assert "| digits | 2 | " in capsys.readouterr().out
    assert len(commands) == 2
    assert transfer.main([*words, "--json", str(tmp_path / "second.json")]) == 0
    assert len(commands) == 2  # read, not trained again
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second"))
    assert first["rows"] == second["rows"]
    assert [row["row"] for row in first["rows"]] == ["transfer", "scratch"]
    held_out = len(transfer.split(transfer.load_digits("digits")[1], 2, 1).test)
    for row in first["rows"]:
        assert (row["images_per_class"], row["seed"], row["epochs"]) == (2, 1, 2)
        assert row["images"] == held_out > 590
        assert 0 <= row["top1"] <= 100
    assert first["settings"]["weights_sha256"]

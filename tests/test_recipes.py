import importlib.util
import math
import os
import random
import re
import shlex
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision.transforms as T
import yaml
from PIL import Image, ImageOps

from timm_tresnet.cli import main as cli
from timm_tresnet.cli.commands.recipe import find_recipes, read_recipe

FILES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
NAMES = [file.stem for file in FILES]
SCRIPTS = os.environ.get("TIMM_SCRIPTS")
needs_scripts = pytest.mark.skipif(not SCRIPTS, reason="TIMM_SCRIPTS does not name a folder with timm's train.py")

LINE = re.compile(r"^\w+: \S.* # (.+)$")
SOURCE = re.compile(
    r"(?:ours|arXiv:\d{4}\.\d{5}|timm [0-9a-f]{8}, train\.py|(?:TResNet|ImageNet21K)#\d+|"
    r"(?:README|Transfer_learning)\.md|(?:train|train_single_label|data_loader)\.py)(?![\w.]*\w)"
)
HEADINGS = ["Source: ", "Published", "Not expressed:", "Give it: "]


def find_gaps(text):
    """Settings that a recipe's file leaves open."""
    head, _, body = text.partition("\n\n")
    summary, *rest = head.splitlines()
    gaps = [] if re.fullmatch(r"# [A-Z].{20,110}\.", summary) else ["what it is for, in a sentence"]
    starts = [line.removeprefix("# ") for line in rest if re.match(r"# \S", line)]
    gaps += [heading for heading in HEADINGS if not any(start.startswith(heading) for start in starts)]
    if "not measured by us" not in re.sub(r"\n#\s*", " ", head):
        gaps.append("not measured by us")
    for line in body.splitlines():
        comment = LINE.match(line)
        if not comment or not SOURCE.match(comment[1]):
            gaps.append(line)
    names = [line.partition(":")[0] for line in body.splitlines()]
    return gaps + [f"{name} twice" for name in dict.fromkeys(names) if names.count(name) > 1]


def find_faults(parser, recipe):
    """Find settings that train.py refuses, or silently ignores."""
    actions = {action.dest: action for action in parser._actions}
    faults = []
    for name, value in recipe.items():
        action = actions.get(name)
        if action is None or f"--{name.replace('_', '-')}" not in action.option_strings:
            faults.append(f"no flag for {name}")
            continue
        if type(action).__name__ == "ParseKwargs":
            fits = isinstance(value, dict) and not any(map(_is_number_in_quotes, value.values()))
        elif action.nargs == 0:
            fits = value is True
        else:
            values = value if action.nargs in ("+", "*") or isinstance(action.nargs, int) else [value]
            kinds = {float: (float, int), int: int, str: str, None: str}[action.type]
            fits = (
                isinstance(values, list)
                and len(values) == (action.nargs if isinstance(action.nargs, int) else len(values) or 1)
                and all(
                    isinstance(one, kinds) and not isinstance(one, bool) and one in (action.choices or [one])
                    for one in values
                )
                and all(map(math.isfinite, [one for one in values if isinstance(one, float)]))
            )
        if not fits:
            faults.append(f"{name} cannot be {value!r}")
    return faults


def _is_number_in_quotes(value):
    return isinstance(value, str) and bool(re.fullmatch(r"[\d.+-]+(e[\d+-]+)?", value, re.IGNORECASE))


@pytest.fixture
def load_script():
    """Loads train.py anew, since it changes the defaults of its parser."""

    def load():
        spec = importlib.util.spec_from_file_location("timm_train_script", Path(SCRIPTS) / "train.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_the_command_finds_the_files_of_a_clone():
    assert find_recipes() == dict(zip(NAMES, FILES, strict=True))
    assert len(NAMES) == 10


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_every_recipe_says_what_it_is_and_where_each_line_comes_from(file):
    assert find_gaps(file.read_text()) == []


def test_a_line_without_a_source_and_a_missing_heading_are_found():
    text = FILES[0].read_text()
    assert find_gaps(text.replace("# Give it: ", "# Needs: ")) == ["Give it: "]
    assert find_gaps(text + "momentum: 0.8\n") == ["momentum: 0.8"]
    for source in ("as usual", "oursource", "notes.md", "train.pyc", "timm, train.py", "Other#5"):
        assert find_gaps(text + f"momentum: 0.8  # {source}\n") == [f"momentum: 0.8  # {source}"]
    assert find_gaps(text + "lr: 0.1  # ours\n") == ["lr twice"]  # YAML takes the last one without a word
    assert find_gaps(text.replace("not measured by us", "measured")) == ["not measured by us"]
    assert find_gaps("# Train\n" + text.partition("\n")[2]) == ["what it is for, in a sentence"]


def test_the_page_has_every_recipe_with_figures_of_its_file():
    page = (FILES[0].parents[1] / "docs" / "recipes.md").read_text()
    rows = re.findall(r"^\| \[`(\w+)`\]\(\.\./recipes/(\w+)\.yaml\) \|.*\| (.*?)\|$", page, re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == NAMES
    for name, file, published in rows:
        assert name == file
        head = find_recipes()[name].read_text().partition("\n\n")[0]
        figures = re.findall(r"\d+\.\d+", published)
        assert set(figures) <= set(re.findall(r"\d+\.\d+", head))
        assert bool(figures) != ("Published: nothing" in head)
    readme = (FILES[0].parents[1] / "README.md").read_text()
    assert f"{len(NAMES)} recipes for timm's `train.py`" in readme


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_numbers_are_not_texts(file):
    recipe = read_recipe(file)
    assert recipe
    for value in recipe.values():
        for one in value if isinstance(value, list) else [value]:
            assert not _is_number_in_quotes(one)


def test_recipes_that_build_on_another_agree_with_it():
    recipes = {file.stem: read_recipe(file) for file in FILES}
    assert recipes["memory"].items() >= recipes["transfer"].items()
    assert recipes["progressive"].items() >= recipes["imagenet_readme"].items()
    frozen, transfer = recipes["frozen_norms"], recipes["transfer"]
    scaled = {"batch_size", "lr", "model_ema_decay"}
    assert {name: value for name, value in transfer.items() if name not in scaled}.items() <= frozen.items()
    share = frozen["batch_size"] / transfer["batch_size"]
    assert frozen["lr"] == pytest.approx(transfer["lr"] * share**0.5)
    assert frozen["model_ema_decay"] == pytest.approx(transfer["model_ema_decay"] ** share, abs=5e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if "aa" in read_recipe(find_recipes()[name])])
@pytest.mark.parametrize("deviations", [-4, 4])
def test_augmentation_takes_images_at_every_magnitude(monkeypatch, name, deviations):
    # Pillow 13 refuses to posterize to no bits, as AutoAugment v0 does, and random augmentation at magnitude 10.
    transform = timm.data.create_transform(
        (3, 32, 32), is_training=True, auto_augment=read_recipe(find_recipes()[name])["aa"]
    )
    monkeypatch.setattr(random, "gauss", lambda mean, std: mean + deviations * std)
    bits = []
    monkeypatch.setattr(ImageOps, "posterize", lambda image, kept: bits.append(kept) or image)
    image = Image.new("RGB", (32, 32), (255, 128, 0))
    for _ in range(300):
        transform(image)
    assert bits
    assert all(1 <= kept <= 8 for kept in bits)


@pytest.mark.parametrize(
    "size", [(64, 64), (37, 200), (200, 37), (101, 99), (375, 500), (1, 2), (2, 9), (10, 3), (3, 2000)], ids=str
)
def test_scale_and_ratio_of_imagenet21k_squash_the_whole_image(size):
    recipe = read_recipe(find_recipes()["imagenet21k"])
    image = Image.fromarray(torch.randint(0, 255, (*size, 3), dtype=torch.uint8).numpy())
    transform = timm.data.create_transform(
        (3, 64, 64),
        is_training=True,
        scale=recipe["scale"],
        ratio=recipe["ratio"],
        hflip=recipe["hflip"],
        interpolation=recipe["train_interpolation"],
        color_jitter=None,
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    expected = T.ToTensor()(T.Resize((64, 64))(image))
    for _ in range(20):
        torch.testing.assert_close(transform(image), expected, rtol=0, atol=0)


@needs_scripts
@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_train_script_has_every_flag_of_every_recipe(load_script, file):
    assert find_faults(load_script().parser, read_recipe(file)) == []


@needs_scripts
@pytest.mark.parametrize(
    ("planted", "fault"),
    [
        ({"weight_decya": 0.1}, "no flag for weight_decya"),
        ({"weight-decay": 0.1}, "no flag for weight-decay"),
        ({"data": "images"}, "no flag for data"),
        ({"epochs": 50.0}, "epochs cannot be 50.0"),
        ({"lr": "2e-4"}, "lr cannot be '2e-4'"),
        ({"aa": 3}, "aa cannot be 3"),
        ({"amp": False}, "amp cannot be False"),
        ({"lr": True}, "lr cannot be True"),
        ({"scale": 0.5}, "scale cannot be 0.5"),
        ({"train_size_schedule": "growing"}, "train_size_schedule cannot be 'growing'"),
        ({"model_kwargs": "recompute=none"}, "model_kwargs cannot be 'recompute=none'"),
        ({"model_kwargs": {"drop_rate": "1e-1"}}, "model_kwargs cannot be {'drop_rate': '1e-1'}"),
        ({"input_size": [3, 224]}, "input_size cannot be [3, 224]"),
        ({"scale": []}, "scale cannot be []"),
        ({"lr": math.nan}, "lr cannot be nan"),
        ({"mean": [0.5, "0.5", 0.5]}, "mean cannot be [0.5, '0.5', 0.5]"),
        ({"data_dir": 5}, "data_dir cannot be 5"),
        ({"local_rank": 1}, "no flag for local_rank"),
        ({"config": "other.yaml"}, "no flag for config"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_planted_mistakes_are_found(load_script, planted, fault):
    assert find_faults(load_script().parser, {**read_recipe(FILES[0]), **planted}) == [fault]


@needs_scripts
@pytest.mark.parametrize("name", NAMES)
def test_printed_command_means_what_the_file_means(load_script, monkeypatch, capsys, name):
    given = ["--data-dir", "my images", "--model", "tresnet_m"]
    assert cli.main(["recipe", name, *given, "--num-classes", "7", "--", "--opt-betas", "0.9", "0.95"]) == 0
    python, script, *printed = shlex.split(capsys.readouterr().out)
    assert (python, script) == ("python", "train.py")
    given += ["--num-classes", "7", "--opt-betas", "0.9", "0.95"]
    parsed = []
    for words in (printed, ["--config", str(find_recipes()[name]), *given]):
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        parsed.append(vars(load_script()._parse_args()[0]))
    assert parsed[0] == parsed[1]
    assert read_recipe(find_recipes()[name]).items() <= parsed[0].items()


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Eight noisy images of two classes, for training and for validation."""
    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "validation"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for index in range(4):
                pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / split / label / f"{index}.png")
    return folder


@needs_scripts
@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_train_script_takes_two_steps_of_every_recipe(run_python, image_folder, tmp_path, file):
    recipe = read_recipe(file)
    # What a CPU, a tiny model, and eight images of 64 pixels need; the last three only where the recipe has them.
    given = {
        "data_dir": image_folder, "model": "test_tresnet", "num_classes": 2, "device": "cpu", "workers": 1,
        "batch_size": 4, "img_size": 64, "epochs": 1, "warmup_epochs": 0, "cooldown_epochs": 0, "output": tmp_path,
        "experiment": "run",
    } | {
        name: value
        for name, value in {
            "kd_model_name": "test_tresnet",
            "aug_repeats": 0,  # which timm has with several processes alone
            "train_img_sizes": [32, 64],
            "torchcompile": "aot_eager",  # the compiler's graphs, without minutes of C++
        }.items()
        if name in recipe
    }  # fmt: skip
    words = ["--config", file]
    for name, value in given.items():
        words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [value])]
    process = run_python(Path(SCRIPTS) / "train.py", *words)
    steps = re.findall(r"Train: 0 \[ +\d+/2 .*?Loss: (\S+)", process.stdout + process.stderr)
    assert len(steps) == 2
    assert all(float(loss) > 0 for loss in steps)  # nan is not
    used = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert {name: used[name] for name in recipe} == recipe | {name: used[name] for name in given if name in recipe}
    checkpoint = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=False)
    assert ("state_dict_ema" in checkpoint) == bool(recipe.get("model_ema"))
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())

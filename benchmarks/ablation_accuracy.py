"""Ablation of the accuracy of a tiny network on CIFAR-10. It says nothing about ImageNet.

    python benchmarks/ablation_accuracy.py --scripts pytorch-image-models --data cifar10 --json results.json

timm's unchanged train.py trains `test_tresnet` with each of the paper's ingredients off or replaced alone, on a short
schedule, with several seeds each. The result is the accuracy of the last epoch on all test images. CIFAR-10 is given as
folders of image files, train/CLASS/ and test/CLASS/. The first `--images-per-class` training images of each class, by
name, are used.
"""

import argparse
import csv
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ablation import VARIATIONS
from command_line import format_command
from train_script import add_scripts_option, check_scripts, collect, run_training, start_command

from timm_tresnet.bench.results import start_results
from timm_tresnet.cli.options import at_least, new_file
from timm_tresnet.utils.tables import format_markdown

# Settings of recompute do not change the network.
ACCURACY_VARIATIONS = {name: kwargs for name, kwargs in VARIATIONS.items() if "recompute" not in kwargs}


def select_images(data: Path, images_per_class: int, folder: Path) -> None:
    """Fill a folder with links to the used images: train/CLASS/ and validation/CLASS/.

    Raises:
        ValueError: if the data have no class folders, or a class has too few images.
    """
    for split, source, count in (("train", "train", images_per_class), ("validation", "test", None)):
        classes = sorted(path for path in (data / source).glob("*") if path.is_dir())
        if not classes:
            raise ValueError(f"--data needs {source}/CLASS/ folders of images, got none in {data / source}")
        for each in classes:
            images = sorted(path for path in each.iterdir() if path.is_file())
            if count and len(images) < count:
                raise ValueError(f"{each} needs {count} images (--images-per-class), got {len(images)}")
            (folder / split / each.name).mkdir(parents=True)
            for image in images[:count]:
                (folder / split / each.name / image.name).symlink_to(image.resolve())


def make_command(
    images: Path, output: Path, kwargs: dict[str, Any], seed: int, settings: argparse.Namespace
) -> list[str]:
    """Return the command that trains one network with one seed."""
    words = [*start_command(settings), "--data-dir", str(images)]
    words += ["--model", "test_tresnet", "--num-classes", "10", "--img-size", str(settings.image_size)]
    words += ["--epochs", str(settings.epochs), "--warmup-epochs", "1", "--seed", str(seed), "--output", str(output)]
    words += ["--experiment", "run", "--batch-size", "128", "--opt", "sgd", "--lr", str(settings.lr), "--workers", "1"]
    words += ["--weight-decay", "5e-4", "--sched-on-updates", "--scale", "0.6", "1", "--color-jitter", "0"]
    words += ["--device", settings.device, "--log-interval", "1000"]
    if kwargs:
        words += ["--model-kwargs", *(f"{name}={value}" for name, value in kwargs.items())]
    return words


def train(command: Sequence[str], output: Path) -> float:
    """Run a command and return the top-1 of its last epoch, in percent.

    Raises:
        RuntimeError: if it fails; the message has the end of its output.
    """
    run_training(command)
    with (output / "run" / "summary.csv").open(newline="") as file:
        return float(list(csv.DictReader(file))[-1]["eval_top1"])


def measure(images: Path, settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield rows of the results, one for each seed and variation; all variations run before the next seed.

    Args:
        images: folder for links to the used images.
        settings: the script's options.

    Raises:
        ValueError: as in `select_images`.
        RuntimeError: as in `train`.
    """
    select_images(settings.data, settings.images_per_class, images)
    for seed in range(settings.seeds):
        for name in settings.rows:
            with tempfile.TemporaryDirectory() as folder:
                command = make_command(images, Path(folder), ACCURACY_VARIATIONS[name], seed, settings)
                top1 = train(command, Path(folder))
            print(f"seed {seed}, {name}: {top1:.2f} %", file=sys.stderr, flush=True)
            yield {"row": name, "seed": seed, "top1": top1, "epochs": settings.epochs}


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format mean, standard deviation and range of each variation's seeds as a Markdown table."""
    table = []
    for name in dict.fromkeys(row["row"] for row in rows):
        values = [row["top1"] for row in rows if row["row"] == name]
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        extent = f"{min(values):.2f}-{max(values):.2f}"
        table.append([name, f"{statistics.mean(values):.2f}", spread, extent, len(values)])
    return format_markdown(["", "top-1, %: mean", "standard deviation", "range", "seeds"], table)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ablation of a tiny network's accuracy on CIFAR-10.")
    add_scripts_option(parser)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="CIFAR-10 as image files")
    parser.add_argument("--rows", nargs="+", choices=list(ACCURACY_VARIATIONS), default=list(ACCURACY_VARIATIONS))
    parser.add_argument("--images-per-class", type=at_least(1), default=1000)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=at_least(1), default=10)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="file for the results, must not exist yet")
    settings = parser.parse_args(words)
    check_scripts(parser, settings)
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print a table and write the results, even partial ones after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    settings = _parse(words)
    command = format_command(__file__, words)
    results = start_results(command, settings.device, settings, unrecorded=("data", "scripts", "rows"))
    with tempfile.TemporaryDirectory() as folder:
        return collect(measure(Path(folder), settings), results, settings.json, __file__, format_table)


if __name__ == "__main__":
    sys.exit(main())

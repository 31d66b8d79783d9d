"""Speed of `timm-tresnet classify` beside timm's `inference.py`, on small files and on large photographs.

    python benchmarks/collection.py --scripts pytorch-image-models --data cifar10 --json results.json

Both run `test_tresnet` with its weights on the same files, in turns. They are forks of one process that has imported
everything already, so imports are not timed. The small files are CIFAR-10's test images, written by
hub/test_tresnet/prepare.py. The photographs are scikit-image's (`pip install scikit-image`), upscaled to 12 megapixels
and saved as JPEG. The script checks that both commands give the same result for each file, and measures how much
`--fast-jpeg` changes it.
"""

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import runpy
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command_line import format_command
from PIL import Image

from timm_tresnet.bench.results import format_spread, start_results, write_results
from timm_tresnet.cli import main as cli
from timm_tresnet.cli.options import at_least, new_file
from timm_tresnet.utils.images import find_images
from timm_tresnet.utils.tables import format_markdown

MODEL = "test_tresnet"
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")  # in scikit-image's wheel
SIZE = (4000, 3000)
TIMM, CLASSIFY, FAST = "timm's inference.py", "classify", "classify --fast-jpeg"
_TOLERANCE = 1e-4  # of probabilities; timm's script normalises images in another order


def link_small(data: Path, folder: Path, count: int) -> None:
    """Link small images into a folder, the same number from each class.

    Raises:
        ValueError: if there are too few.
    """
    paths = list(find_images([data / "test"]))
    if len(paths) < count:
        raise ValueError(f"{data / 'test'} needs {count} images, got {len(paths)}")
    for index, path in enumerate(paths[:: len(paths) // count][:count]):
        (folder / f"{index:04}{path.suffix}").symlink_to(path.absolute())


def write_photographs(folder: Path, count: int) -> None:
    """Write photographs of 12 megapixels, different crops of scikit-image's photographs.

    Raises:
        ValueError: if scikit-image is not installed.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.origin:
        raise ValueError("photographs need scikit-image; pip install scikit-image")
    for index in range(count):
        with Image.open(Path(spec.origin).parent / "data" / PHOTOGRAPHS[index % len(PHOTOGRAPHS)]) as image:
            photo = image.convert("RGB")
        edge = index // len(PHOTOGRAPHS)
        box = (edge, edge, photo.width - edge, photo.height - edge)
        photo.resize(SIZE, Image.Resampling.BICUBIC, box).save(folder / f"{index:02}.jpg", quality=90)


def make_words(row: str, files: Path, output: Path, settings: argparse.Namespace) -> list[str]:
    """Return the words of a command, program first."""
    size, workers = str(settings.batch_size), str(settings.workers)
    if row == TIMM:
        script = [str(settings.scripts / "inference.py"), "--data-dir", str(files), "--model", MODEL, "--pretrained"]
        script += ["--device", "cpu", "-j", workers, "-b", size, "--topk", "3", "--include-index", "--fullname"]
        return [*script, "--results-separate-col", "--no-console-results", "--results-file", str(output)]
    own = ["timm-tresnet", "classify", str(files), "--model", MODEL, "--device", "cpu", "-j", workers]
    own += ["--batch-size", size, "--output", str(output.with_suffix(".jsonl"))]
    return [*own, "--fast-jpeg"] if row == FAST else own


def time_command(words: Sequence[str], printed: Path) -> tuple[float, float]:
    """Run a command in a fork of this process; return its seconds, and its CPU seconds on all cores.

    Raises:
        RuntimeError: if it fails.
    """
    start = time.perf_counter()
    child = os.fork()
    if not child:
        status = 1
        try:
            descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = sys.stderr = os.fdopen(descriptor, "w")  # they may have been replaced
            status = run_command(words)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status, usage = os.wait4(child, 0)  # includes its own children
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{shlex.join(words)} failed: {printed.read_text(errors='replace')[-2000:]}")
    return seconds, usage.ru_utime + usage.ru_stime


def run_command(words: Sequence[str]) -> int:
    """Run a command in this process."""
    if words[0] == "timm-tresnet":
        return cli.main(list(words[1:]))
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")
    return 0


def read_results(row: str, output: Path) -> dict[str, tuple[int, float]]:
    """Read the most probable class of each file and its probability."""
    if row == TIMM:
        with output.with_suffix(".csv").open(newline="") as file:
            return {
                Path(line["filename"]).name: (int(line["index_0"]), float(line["prob_0"]))
                for line in csv.DictReader(file)
            }
    with output.with_suffix(".jsonl").open() as file:
        results = [json.loads(line) for line in file]
    firsts = {Path(result["image"]).name: result["predictions"][0] for result in results}
    return {name: (first["index"], first["probability"]) for name, first in firsts.items()}


def compare(expected: dict[str, tuple[int, float]], found: dict[str, tuple[int, float]]) -> tuple[float, float]:
    """Return the share of files with the same class, and the largest difference of those files' probabilities.

    Raises:
        RuntimeError: if the files differ.
    """
    if expected.keys() != found.keys():
        raise RuntimeError(f"{len(expected)} files were classified by one command, {len(found)} by the other")
    same = [name for name in expected if expected[name][0] == found[name][0]]
    return len(same) / len(expected), max((abs(expected[name][1] - found[name][1]) for name in same), default=0.0)


def measure(files: Path, display_name: str, names: Sequence[str], settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the rows of the results: commands on the same files, in turns.

    Raises:
        RuntimeError: if a command fails, or their results differ.
    """
    count = sum(1 for _ in find_images([files]))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    found: dict[str, dict[str, tuple[int, float]]] = {}
    for turn in range(settings.rounds):
        for name in names if turn % 2 else list(reversed(names)):
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "results"
                words = make_words(name, files, output, settings)
                times[name].append(time_command(words, Path(folder) / "printed"))
                found[name] = read_results(name, output)
            seconds, cpu_s = times[name][-1]
            print(
                f"{display_name}, round {turn}, {name}: {seconds:.1f} s, {cpu_s:.1f} s of CPU",
                file=sys.stderr,
                flush=True,
            )
    rows = []
    for name in names:
        agreement, difference = compare(found[TIMM], found[name])
        if name != FAST and (agreement < 1 or difference > _TOLERANCE):
            raise RuntimeError(f"{name} differs from {TIMM} in {1 - agreement:.1%} of files, and by {difference:.1e}")
        rows.append(
            {
                **{
                    "row": name,
                    "files": display_name,
                    "images": count,
                    "agreement": agreement,
                    "difference": difference,
                },
                "seconds": [seconds for seconds, _ in times[name]],
                "cpu_s": [cpu_s for _, cpu_s in times[name]],
                "ratios": [timm[0] / own[0] for timm, own in zip(times[TIMM], times[name], strict=True)],
                "cpu_ratios": [timm[1] / own[1] for timm, own in zip(times[TIMM], times[name], strict=True)],
            }
        )
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows as a Markdown table; ratios are of images a second, so more is faster."""
    return format_markdown(
        ["files", "", "images/s", "ratio", "images a second of CPU", "ratio"],
        [
            [
                row["files"],
                row["row"],
                f"{row['images'] / statistics.median(row['seconds']):.0f}",
                format_spread(row["ratios"]),
                f"{row['images'] / statistics.median(row['cpu_s']):.0f}",
                format_spread(row["cpu_ratios"]),
            ]
            for row in rows
        ],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write the results."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description="classify beside timm's inference.py on collections of images.")
    parser.add_argument("--scripts", type=Path, required=True, metavar="FOLDER", help="folder with timm's inference.py")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="CIFAR-10 by prepare.py (default: no small files)")
    parser.add_argument("--small", type=at_least(1), default=2000, metavar="N", help="files (default: %(default)s)")
    parser.add_argument("--photographs", type=at_least(0), default=60, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=at_least(1), default=32)
    parser.add_argument("--workers", type=at_least(1), default=2)
    parser.add_argument("--json", type=new_file, metavar="FILE", help="file for the results, must not exist yet")
    settings = parser.parse_args(words)
    if (
        importlib.util.find_spec("pandas") is None
    ):  # timm's script imports pandas; imported here, no fork spends time on it
        parser.error("timm's inference.py needs pandas; pip install pandas")
    importlib.import_module("pandas")
    with contextlib.suppress(ImportError):  # timm's script does without it
        importlib.import_module("functorch.compile")
    for module in ("outputs", "predictions", "sidecars"):
        importlib.import_module(f"timm_tresnet.collection.{module}")
    results = start_results(format_command(__file__, words), "cpu", settings, unrecorded=("scripts", "data"))
    try:
        with tempfile.TemporaryDirectory() as folder:
            small, large = Path(folder) / "small", Path(folder) / "large"
            small.mkdir()
            large.mkdir()
            if settings.data:
                link_small(settings.data, small, settings.small)
                results["rows"] += measure(small, "small files", (TIMM, CLASSIFY), settings)
            if settings.photographs:
                write_photographs(large, settings.photographs)
                results["rows"] += measure(large, "photographs of 12 megapixels", (TIMM, CLASSIFY, FAST), settings)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"collection.py: {error}", file=sys.stderr)
        return 1
    print(format_table(results["rows"]))
    if settings.json:
        write_results(results, settings.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

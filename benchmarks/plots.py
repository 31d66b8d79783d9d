"""Draw figures of results from their JSON files.

    python benchmarks/plots.py benchmarks/results/FILE.json ... --output benchmarks/results

The figure depends on the script that made a file. paper_tables: accuracy against throughput. ablation: bars.
resolution and transfer: curves. training_memory: peak memory against the batch, one figure for all files of a model.
Each is an SVG with its command and hardware below it. Needs matplotlib (the extra `plots`).

With `--readme NAME`, files of training_memory become README.md's figure instead: NAME.svg and NAME_dark.svg, for light
and dark pages. The SVG's description has the shown values as JSON.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from matplotlib.transforms import Bbox
from schema import load_results, script_of

from timm_tresnet.utils.files import atomic_write

# Okabe and Ito's colours, distinguishable for colour-blind readers, and a marker for each
_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
_MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
_MOST_LINES = 12  # lines of a caption in a figure of the usual height
_STYLE = {
    "figure.figsize": (8, 5),  # inches; 800 px wide at 100 dots an inch
    "figure.facecolor": "white",  # not transparent, so that the text is readable on a dark page
    "font.size": 11,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "timm-tresnet",  # the same file from the same results
}
_DARK = {  # changes for dark pages
    "figure.facecolor": "#0d1117",
    "axes.facecolor": "#0d1117",
    "grid.color": "#30363d",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#e6edf3"),
}
_TRANSFER_DATA = {"mnist": "MNIST's digits, 28 px", "digits": "scikit-learn's digits, 8 px"}  # title of a panel
_README_LINES = {  # row of training_memory -> label, colours on light and on dark, dashes
    "resnet50": ("ResNet-50", "#D55E00", "#E69F00", "-"),
    "built-in": ("timm's tresnet_m", "#555555", "#b1bac4", "-"),
    "activations": ("this tresnet_m", "#0072B2", "#56B4E9", "-"),
    "checkpointing": ("this, checkpointed", "#0072B2", "#56B4E9", "--"),
}


def _median(row: dict[str, Any], field: str) -> float:
    if not row[field]:
        raise ValueError(f"{row['row']} has no complete round in {field}; measure it again without interrupting")
    return statistics.median(row[field])


def _finish(figure: Figure, results: Sequence[dict[str, Any]], notes: str = "") -> Figure:
    """Add a caption with hardware, versions and commands to a figure."""
    first = results[0]
    hardware, settings = first["hardware"], first["settings"]
    machine = hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"
    precision = f"autocast to {settings['amp']}" if settings.get("amp") else "float32"
    layout = "channels-last" if settings["channels_last"] else "NCHW"
    lines = textwrap.wrap(notes, 115)
    lines.append(
        f"{machine}, {precision}, {layout}, torch {first['versions']['torch']}, timm {first['versions']['timm']}, "
        f"{first['date']}"
    )
    for each in results:
        lines += textwrap.wrap(each["command"], 115)
    figure.text(0.01, 0.01, "\n".join(lines), fontsize=7.5, color="#444444", va="bottom")
    if len(lines) > _MOST_LINES:  # a taller figure, so that the caption keeps its share of it
        figure.set_figheight(figure.get_figheight() * len(lines) / _MOST_LINES)
    figure.tight_layout(rect=(0, 0.032 * min(len(lines), _MOST_LINES) + 0.01, 1, 1))
    return figure


def draw_paper_tables(results: dict[str, Any]) -> Figure:
    """Draw published accuracy against throughput in training and in inference."""
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(8, 5.4))
    rows = [row for row in results["rows"] if row["top1"] is not None]
    fields = {"training": "train_images_per_s", "inference": "inference_images_per_s"}
    points = {name: [(_median(row, field), row["top1"]) for row in rows] for name, field in fields.items()}
    for axes, (name, positions) in zip(panels, points.items(), strict=True):
        speeds = [speed for speed, _ in positions]
        for row, speed in zip(rows, speeds, strict=True):
            ours = row["row"].startswith("tresnet")
            more_data = "ImageNet-21k" in row["top1_source"]
            color = _COLORS[0] if ours else _COLORS[1]
            marker = _MARKERS[0] if ours else _MARKERS[2 if row["row"].startswith("built-in") else 1]
            axes.plot(speed, row["top1"], marker, color=color, markersize=8, mfc="white" if more_data else color)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(min(speeds) / 2, max(speeds) * 2)  # room for the names
        axes.set_xlabel(f"{name}, images/s")
    panels[0].set_ylabel("published ImageNet top-1, %")
    figure.suptitle("Accuracy and speed: TResNet (circles) and others")
    notes = (
        "Triangle: timm's built-in TResNet-M. Hollow: weights pretrained on ImageNet-21k. Speeds measured here, top-1 "
        "as published for different trainings (top1_source in the file)."
    )
    _finish(figure, [results], notes)
    for axes, positions in zip(panels, points.values(), strict=True):  # after the layout
        _label_points(axes, [row["row"].replace(":", " ") for row in rows], positions)
    return figure


def _label_points(axes: Axes, labels: Sequence[str], points: Sequence[tuple[float, float]]) -> None:
    """Write each name beside its point or, for lack of room, further away with a line to the point."""
    axes.figure.canvas.draw()  # computes the positions of the points
    renderer = axes.figure.canvas.get_renderer()
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in axes.transData.transform(points)]
    angles = (0, 180, 90, 270, 30, 330, 150, 210)
    for label, point in zip(labels, points, strict=True):
        for distance, angle in itertools.product(range(9, 99, 6), angles):
            text = axes.annotate(
                label,
                point,
                (distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))),
                textcoords="offset points",
                fontsize=7.5,
                ha={90: "center", 270: "center", 0: "left", 30: "left", 330: "left"}.get(angle, "right"),
                va="center",
                arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.6} if distance > 9 else None,
            )
            text.update_positions(renderer)
            box = Text.get_window_extent(text).padded(1)  # without the line
            if not box.count_overlaps(taken) and all(axes.bbox.contains(*corner) for corner in box.corners()):
                taken.append(box)
                break
            text.remove()
        else:
            raise ValueError(f"{label} at {point}: no room for its name; draw fewer networks in one figure")


def collect_peaks(files: Sequence[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Return the peak of a training step in GB (1e9 bytes) by row and batch; the last file with a batch counts."""
    peaks: dict[str, dict[int, float]] = {}
    for results in files:
        batch = results["settings"]["batch_size"]
        for row in results["rows"]:
            if row["peak_mb"] is not None:
                peaks.setdefault(row["row"], {})[batch] = row["peak_mb"] * batch / 1e3
    return {name: dict(sorted(points.items())) for name, points in peaks.items()}


def draw_training_memory(files: Sequence[dict[str, Any]]) -> Figure:
    """Draw the peak memory of a training step against the batch, from files of one model with one batch each."""
    figure, axes = plt.subplots()
    settings = files[0]["settings"]
    peaks = collect_peaks(files)
    for name, color, marker in zip(peaks, _cycle(_COLORS, peaks), _cycle(_MARKERS, peaks), strict=True):
        axes.plot(list(peaks[name]), list(peaks[name].values()), color=color, marker=marker, label=name)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("images in a batch")
    axes.set_ylabel("peak of a training step, GB")
    axes.legend(frameon=False, title=f"{settings['model']}, {settings['image_size']} px")
    axes.set_title("Training memory against the batch")
    notes = "built-in, none: plain PyTorch; activations, expansions: settings of recompute; checkpointing: every block."
    return _finish(figure, files, notes)


def draw_readme(files: Sequence[dict[str, Any]], dark: bool) -> Figure:
    """Draw README.md's figure: `draw_training_memory` with few lines, and names at their ends."""
    figure, axes = plt.subplots(figsize=(8, 4.2))
    settings, peaks = files[0]["settings"], collect_peaks(files)
    for row, (label, on_light, on_dark, dashes) in _README_LINES.items():
        color = on_dark if dark else on_light
        batches, peak = list(peaks[row]), list(peaks[row].values())
        axes.plot(batches, peak, dashes, color=color, marker="o", linewidth=2.5)
        axes.annotate(
            f"{label}, {peak[-1]:.1f} GB",
            (batches[-1], peak[-1]),
            (8, 0),
            textcoords="offset points",
            color=color,
            fontweight="bold",
            va="center",
        )
    axes.set_xlim(0, batches[-1] * 1.5)  # room for the names
    axes.set_xticks([0, *batches])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("images in a batch")
    axes.set_ylabel("GB")
    axes.set_title("Peak memory of a training step", loc="left", fontweight="bold")
    machine = files[0]["hardware"]["gpu"] or f"{files[0]['hardware']['cpu']}, {files[0]['hardware']['threads']} threads"
    where = f"{settings['image_size']} px, {settings['amp'] or 'float32'}, {machine}, PyTorch"
    figure.text(0.99, 0.01, f"{where} {files[0]['versions']['torch']}", fontsize=7.5, ha="right", va="bottom")
    figure.tight_layout()
    return figure


def draw_ablation(results: dict[str, Any]) -> Figure:
    """Draw bars of training speed, inference speed and memory of each variation, as ratios to the whole network."""
    rows = results["rows"]
    figure, panels = plt.subplots(1, 3, sharey=True, figsize=(8, 5))
    reference = rows[0]
    quantities = {
        "training speed": [(row["train_ratios"], None) for row in rows],
        "inference speed": [(row["inference_ratios"], None) for row in rows],
        "kept for backward": [(None, row["kept_mb"] / reference["kept_mb"]) for row in rows],
    }
    heights = range(len(rows), 0, -1)
    for axes, (title, values), color in zip(panels, quantities.items(), _COLORS, strict=False):
        for height, row, (ratios, exact) in zip(heights, rows, values, strict=True):
            middle = statistics.median(ratios) if ratios else exact
            if middle is None:
                raise ValueError(f"{row['row']} has no complete round; measure it again without interrupting")
            reach = [[middle - min(ratios)], [max(ratios) - middle]] if ratios else None
            axes.barh(height, middle, color=color, xerr=reach, error_kw={"elinewidth": 1, "ecolor": "#444444"})
            axes.text(0.03, height, f"{middle:.2f}", va="center", fontsize=8, color="white", fontweight="bold")
        axes.axvline(1, color="#444444", linewidth=1)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(f"ratio to {reference['row']!r}", fontsize=8)
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(list(heights), [textwrap.fill(row["row"], 22) for row in rows], fontsize=8)
    notes = (
        "Each ingredient off or replaced alone; bars are medians, lines the range of the rounds. Accuracy is not shown."
    )
    return _finish(figure, [results], notes)


def draw_resolution(results: dict[str, Any]) -> Figure:
    """Draw training time, inference time and stored bytes against the resolution, with the FLOPs as a line."""
    rows = results["rows"]
    names = list(dict.fromkeys(row["row"] for row in rows))
    figure, panels = plt.subplots(1, 3, figsize=(8, 4.6))
    quantities = {
        "training, ms an image": lambda row: 1e3 / _median(row, "train_images_per_s"),
        "inference, ms an image": lambda row: 1e3 / _median(row, "inference_images_per_s"),
        "kept, MB an image": lambda row: row["kept_mb"],
    }
    for axes, (title, value) in zip(panels, quantities.items(), strict=True):
        for name, color, marker in zip(names, _cycle(_COLORS, names), _cycle(_MARKERS, names), strict=True):
            own = sorted((row for row in rows if row["row"] == name), key=lambda row: row["image_size"])
            sizes = [row["image_size"] for row in own]
            axes.plot(sizes, [value(row) for row in own], color=color, marker=marker, markersize=5, label=name)
            if name == names[-1]:
                line = [value(own[0]) * row["gmacs"] / own[0]["gmacs"] for row in own]
                axes.plot(sizes, line, "--", color="#444444", label=f"FLOPs of {name}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=7)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.tick_params(axis="y", labelsize=8)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("side of the image, px", fontsize=9)
    panels[0].legend(frameon=False, fontsize=7.5)
    notes = f"Dashed: the smallest image's value, growing as the FLOPs do. Batch {results['settings']['batch_size']}."
    return _finish(figure, [results], notes)


def draw_transfer(results: dict[str, Any]) -> Figure:
    """Draw the accuracy of each arm against the number of training images, for each data set."""
    rows, names = results["rows"], results["settings"]["data"]
    figure, panels = plt.subplots(1, len(names), sharey=True, squeeze=False, figsize=(8, 4.6))
    labels = {"transfer": "from pretrained weights", "scratch": "from scratch"}
    for axes, data in zip(panels[0], names, strict=True):
        for index, (arm, label) in enumerate(labels.items()):
            runs: dict[int, list[float]] = {}
            for row in rows:
                if (row["row"], row["data"]) == (arm, data):
                    runs.setdefault(row["images_per_class"], []).append(row["top1"])
            means = [statistics.mean(values) for values in runs.values()]
            reach = [
                [mean - min(values) for mean, values in zip(means, runs.values(), strict=True)],
                [max(values) - mean for mean, values in zip(means, runs.values(), strict=True)],
            ]
            axes.errorbar(
                list(runs), means, reach, color=_COLORS[index], marker=_MARKERS[index], capsize=4, label=label
            )
        counts = results["settings"]["images_per_class"]
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("training images a class")
        axes.set_title(_TRANSFER_DATA[data], fontsize=11)
    panels[0][0].set_ylim(0, 100)
    panels[0][0].set_ylabel("top-1 on held-out images, %")
    panels[0][0].legend(frameon=False)
    seeds = len(results["settings"]["seeds"])
    notes = (
        f"Points are means, lines the range of {seeds} seeds, which draw the training images too. Not about ImageNet."
    )
    return _finish(figure, [results], notes)


def _cycle(values: Sequence[str], names: Collection[str]) -> list[str]:
    return [values[index % len(values)] for index in range(len(names))]


def draw(paths: Sequence[Path]) -> dict[str, Figure]:
    """Draw figures of results files; return them by the name of their file.

    Raises:
        ValueError: if a file is incomplete, or there is no figure for its script; the message names the file.
    """
    single = {
        "paper_tables": draw_paper_tables,
        "ablation": draw_ablation,
        "resolution": draw_resolution,
        "transfer": draw_transfer,
    }
    figures: dict[str, Figure] = {}
    memory: dict[tuple[Any, ...], list[tuple[Path, dict[str, Any]]]] = {}
    for path in paths:
        results = load_results(path)
        script = script_of(results)
        if script == "training_memory":
            settings = results["settings"]
            memory.setdefault((settings["model"], settings["image_size"], settings["amp"]), []).append((path, results))
        elif script in single:
            figures[path.stem] = single[script](results)
        else:
            raise ValueError(f"{path}: needs results of {', '.join([*single, 'training_memory'])}, got {script}")
    for files in memory.values():
        figures[files[0][0].stem] = draw_training_memory([results for _, results in files])
    return figures


def draw_for_readme(paths: Sequence[Path], name: str, output: Path) -> list[Path]:
    """Write README.md's figure for light and for dark pages.

    Args:
        paths: files of training_memory, of one model with one batch each.
        name: name of the light figure, without .svg.
        output: folder for the figures.

    Returns:
        The two files.

    Raises:
        ValueError: if a file is of another script, or lacks a row of the figure.
    """
    files = [load_results(path) for path in paths]
    for path, results in zip(paths, files, strict=True):
        missing = _README_LINES.keys() - {row["row"] for row in results["rows"] if "peak_mb" in row}
        if missing:
            names = ", ".join(sorted(missing))
            raise ValueError(f"{path}: README.md's figure needs rows of training_memory; {names} are missing")
    peaks = collect_peaks(files)
    shown = {row: {str(batch): round(peak, 3) for batch, peak in peaks[row].items()} for row in _README_LINES}
    description = json.dumps({"files": [path.name for path in paths], "peak_gb": shown})
    written = []
    for dark in (False, True):
        with mpl.rc_context(_DARK if dark else {}):
            figure = draw_readme(files, dark)
            written.append(output / f"{name}{'_dark' if dark else ''}.svg")
            _save(figure, written[-1], description)
    return written


def _save(figure: Figure, path: Path, description: str | None = None) -> None:
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, format="svg", metadata={"Date": None, "Description": description})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the given files and write an SVG for each figure."""
    parser = argparse.ArgumentParser(description="Draw figures of results.")
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="JSON files written by scripts of this folder"
    )
    parser.add_argument("--output", type=Path, default=Path(), metavar="FOLDER", help="default: the current folder")
    parser.add_argument("--readme", metavar="NAME", help="draw README.md's figure, as NAME.svg and NAME_dark.svg")
    arguments = parser.parse_args(argv)
    with mpl.rc_context(_STYLE):
        try:
            if arguments.readme:
                written = draw_for_readme(arguments.files, arguments.readme, arguments.output)
            else:
                figures = draw(arguments.files)
                written = [arguments.output / f"{name}.svg" for name in figures]
                for path, figure in zip(written, figures.values(), strict=True):
                    _save(figure, path)
        except (OSError, ValueError) as error:
            sys.exit(f"plots.py: {error}")
    print(*written, sep="\n")


if __name__ == "__main__":
    main()

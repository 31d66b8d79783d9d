"""`timm-tresnet validate` measures weights on annotated images."""

import argparse
import csv
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_tresnet.cli.commands import (
    CommandError,
    choose_machine,
    load_classifier,
    prepare_keep_ratio,
    refuse_compiled_ratios,
    warn_of_assumed,
)
from timm_tresnet.cli.options import (
    FORMS,
    add_engine_options,
    add_keep_ratio,
    add_machine_options,
    add_reading_options,
    at_least,
    default_workers,
    make_reading,
    new_file,
)
from timm_tresnet.utils.errors import summarise
from timm_tresnet.utils.extras import how_to_install
from timm_tresnet.utils.images import printable
from timm_tresnet.utils.tables import format_columns
from timm_tresnet.weights.labels import is_multi_label, label_lookup

ABOUT = {
    "help": "measure weights on annotated images",
    "description": "Measure weights on annotated images. Of taggers: mAP, and precision, recall and F1 by class and "
    "overall at 0.5, at the weights' own thresholds and of the most probable labels. Of classifiers: top-1 and top-5, "
    "as timm's validate.py. Labels are matched by name.",
}
EXAMPLE = "validate --model local-dir:tagger labels.csv --images photos"
_MOST_CURVES = 100  # of single labels in the picture


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument(
        "annotations", type=Path, metavar="ANNOTATIONS", help=f"{FORMS}, or a folder of folders named after labels"
    )
    parser.add_argument("--model", metavar="NAME", help="a model with weights, as --model of classify takes it")
    add_engine_options(parser)
    data = parser.add_argument_group("data")
    add_reading_options(data)
    data.add_argument(
        "--by-order",
        action="store_true",
        help="take the labels, in their order, to be the network's, as timm's validate.py does with folders",
    )
    data.add_argument(
        "--unknown",
        choices=["ignore", "negative"],
        default="ignore",
        help="what becomes of labels that nobody checked: left out, or taken as absent (default: %(default)s)",
    )
    data.add_argument(
        "--as-stored",
        action="store_true",
        help="read images as timm's validate.py and the official code do: not turned as their cameras were held, and "
        "transparent pixels not on white",
    )
    add_keep_ratio(data)
    figures = parser.add_argument_group("figures")
    figures.add_argument("--top-k", type=at_least(1), default=3, metavar="K", help="(default: %(default)s)")
    figures.add_argument(
        "--multi-label", action="store_true", help="each output has a sigmoid, although the weights do not say so"
    )
    figures.add_argument(
        "--json", type=new_file, dest="json_file", metavar="FILE", help="file for all figures, must not exist yet"
    )
    figures.add_argument("--csv", type=new_file, dest="csv_file", metavar="FILE", help="file for a row of each label")
    figures.add_argument(
        "--plot", type=new_file, metavar="FILE", help="picture of precision over recall, .svg, .png or .pdf"
    )
    machine = parser.add_argument_group("machine")
    add_machine_options(machine)


def run(
    words: Sequence[str],
    *,
    annotations: Path,
    model: str | None,
    engine: tuple[str, str] | None,
    trust: bool,
    by_order: bool,
    unknown: str,
    as_stored: bool,
    keep_ratio: bool,
    top_k: int,
    multi_label: bool,
    json_file: Path | None,
    csv_file: Path | None,
    plot: Path | None,
    device: str,
    amp: str | None,
    channels_last: bool,
    compile: bool,
    batch_size: int,
    workers: int | None,
    **reading: Any,
) -> int:
    """Measure, print the figures, and name what was left out."""
    if bool(engine) == bool(model):
        raise CommandError("needs either --model or --engine, which says what to measure")
    name = printable(engine[1] if engine else str(model))
    where = choose_machine(device, amp, channels_last, compile, engine)
    if plot:
        _check_plot(plot)
    refuse_compiled_ratios(keep_ratio, compile)
    network = load_classifier(model or "", engine, trust)
    warn_of_assumed(network)
    multiple = prepare_keep_ratio(network) if keep_ratio else None
    multi_label = multi_label or is_multi_label(network.pretrained_cfg)
    if (csv_file or plot) and not multi_label:
        raise CommandError(f"--csv and --plot are about taggers; {name} gives an image one label")
    import torch
    from tqdm import tqdm

    from timm_tresnet.deployment.running import Runner
    from timm_tresnet.tagging import validation
    from timm_tresnet.tagging.annotations import list_notes, read_annotations

    try:
        annotated = read_annotations(annotations, make_reading(reading, class_folders=True))
        if unknown == "negative":
            examples = tuple(dataclasses.replace(example, absent=None) for example in annotated.examples)
            annotated = dataclasses.replace(annotated, examples=examples)
        matching = validation.match_labels(annotated.names, network, by_order)
        for line in (*list_notes(annotated), *_tell_matching(matching, annotated, network)):
            print(f"timm-tresnet: {line}", file=sys.stderr)
        with tqdm(total=len(annotated.examples), disable=None, unit="image") as bar:  # None: on terminals
            runner = Runner(
                network, where, getattr(torch, amp) if amp else None, channels_last, batch_size if compile else None
            )
            outputs = validation.run_network(
                network,
                annotated,
                matching,
                runner,
                batch_size=batch_size,
                workers=default_workers() if workers is None else workers,
                as_stored=as_stored,
                multiple=multiple,
                advance=bar.update,
            )
        figures = validation.measure(network, outputs, top_k, multi_label)
    except (OSError, RuntimeError, ValueError) as error:
        raise CommandError(f"cannot measure {name}: {summarise(error)}") from error
    unreadable = [printable(path) for path in outputs.unreadable]
    _print_figures(figures, name, annotated.display_name)
    if json_file:
        about = {
            "command": printable(shlex.join(["timm-tresnet", *words])),
            "model": name,
            "annotations": annotated.display_name,
        }
        _write_json(json_file, {**about, **figures, "unknown_labels": matching.unknown, "unreadable": unreadable})
    if csv_file:
        _write_csv(csv_file, figures["per_label"])
    if plot:
        _draw(plot, outputs, figures, name)
    for path in unreadable:
        print(f"timm-tresnet: skipped {path}, which cannot be read", file=sys.stderr)
    return 1 if unreadable else 0


def _check_plot(path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise CommandError(
            f"--plot needs the package {error.name}, which is not installed; {how_to_install('plots')}"
        ) from error
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in kinds:
        raise CommandError(f"--plot needs a file that ends with one of {', '.join(kinds)}, got {printable(path)}")


def _tell_matching(matching: Any, annotated: Any, network: Any) -> list[str]:
    from timm_tresnet.conversion.reading import shorten_names

    lines = []
    if matching.unknown:
        lines.append(
            f"{len(matching.unknown)} of {len(annotated.names)} labels of {annotated.display_name} are unknown to the "
            f"network and left out: {shorten_names(matching.unknown)}"
        )
    if matching.missing:
        missing = list(map(label_lookup(network), matching.missing))
        lines.append(
            f"{len(missing)} of the network's {network.num_classes} labels are not in {annotated.display_name} and not "
            f"measured: {shorten_names(missing)}"
        )
    return lines


def _print_figures(figures: dict[str, Any], model: str, display_name: str) -> None:
    print(
        f"{model}: {figures['images']} images of {display_name}, {figures['measured_labels']} of {figures['labels']} "
        "labels measured"
    )
    print(", ".join(f"{name} {value:.2f}" for name, value in figures["scores"].items()))
    if "decisions" in figures:
        names = list(next(iter(figures["decisions"].values())))
        rows = [[way, *(f"{row[name]:6.2f}" for name in names)] for way, row in figures["decisions"].items()]
        print(format_columns([["", *(name.rjust(6) for name in names)], *rows]))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    from timm_tresnet.utils.files import atomic_write

    with atomic_write(path, overwrite=False) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_csv(path: Path, per_label: Sequence[dict[str, Any]]) -> None:
    from timm_tresnet.utils.files import atomic_write

    with atomic_write(path, overwrite=False) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, list(per_label[0]))
        rows.writeheader()
        rows.writerows(per_label)


def _draw(path: Path, outputs: Any, figures: dict[str, Any], model: str) -> None:
    """Draw precision over recall: of all decisions together and, in grey, of the labels that most images have."""
    from matplotlib.figure import Figure

    from timm_tresnet.tagging.scores import rank
    from timm_tresnet.utils.files import atomic_write

    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    by_images = sorted(figures["per_label"], key=lambda row: -row["images"])
    indices = [row["index"] for row in by_images]
    for index in indices[:_MOST_CURVES]:
        ranking = rank(outputs.logits[:, index], outputs.targets[:, index])
        axes.plot(100 * ranking.recall, 100 * ranking.precision, color="0.8", linewidth=0.7)
    together = rank(outputs.logits[:, indices], outputs.targets[:, indices])
    axes.plot(
        100 * together.recall,
        100 * together.precision,
        color="tab:blue",
        linewidth=2,
        label=f"all decisions, micro AP {figures['scores']['micro AP']:.2f}",
    )
    shown = min(_MOST_CURVES, len(indices))
    axes.plot([], [], color="0.8", label=f"{shown} of {len(indices)} labels, mAP {figures['scores']['mAP']:.2f}")
    axes.set(xlabel="recall, %", ylabel="precision, %", xlim=(0, 100), ylim=(0, 101))
    axes.set_title(model, parse_math=False)
    axes.legend(loc="lower left")
    with atomic_write(path, overwrite=False) as unfinished:
        figure.savefig(unfinished, format=path.suffix.lower().removeprefix("."))

"""Results of `timm-tresnet classify`: written as they come, or printed at the end."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from timm_tresnet.utils.images import printable
from timm_tresnet.utils.tables import format_bar, format_columns
from timm_tresnet.weights.labels import label_lookup

COUNTED = ("images", "there", "errors", "sidecars", "sidecars_there")
_BAR_WIDTH = 20
_FEW_CLASSES = 20  # that are named on one line


class Results:
    """Results of image files: in a file, in text beside images, or kept to be printed.

    Args:
        writer: the file, a `timm_tresnet.collection.outputs.Output`; None for none.
        sidecars: the text, a `timm_tresnet.collection.sidecars.Sidecars`; None for none.

    Attributes:
        kept: results to be printed.
        tally: counts by the names in `COUNTED`.
    """

    def __init__(self, writer: Any, sidecars: Any) -> None:
        self._writer, self._sidecars = writer, sidecars
        self.kept: list[dict[str, Any]] = []
        self.tally: Counter[str] = Counter()

    def add(self, batch: list[Any]) -> None:
        """Take the results of a batch: sidecars first, so that those of every line that is written are there."""
        for path, result in batch:
            self.tally["images"] += 1
            self.tally["errors"] += "error" in result
            if self._sidecars and "predictions" in result:
                written = self._sidecars.write(path, [entry["label"] for entry in result["predictions"]])
                self.tally["sidecars" if written else "sidecars_there"] += 1
            elif self._sidecars and not self._writer:
                _print_skipped(result)
        if self._writer:
            self._writer.write([result for _, result in batch])
        elif not self._sidecars:
            self.kept += [result for _, result in batch]


def show_progress(batches: Iterable[list[Any]], total: int, shown: bool) -> Iterator[list[Any]]:
    """Batches as they come, with a bar on standard error."""
    from tqdm import tqdm

    bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} images, {rate_noinv_fmt}, {remaining} left"
    with tqdm(total=total, disable=not shown, mininterval=0, unit=" images", bar_format=bar_format) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def describe_written(tally: Counter[str], output: Path | None, sidecar: bool) -> str:
    """What was written, in a line or two."""
    lines = []
    if output:
        count, new = tally["images"] + tally["there"], f", {tally['images']} of them new" if tally["there"] else ""
        lines.append(f"{printable(output)}: {count} images{new}, {tally['errors']} with errors")
    if sidecar:
        there = f", {tally['sidecars_there']} were there already" if tally["sidecars_there"] else ""
        lines.append(f"{tally['sidecars']} text files written beside images{there}")
    return "\n".join(lines)


def describe_samples(paths: Sequence[Path], network: Any, name: str) -> str:
    """What the photographs in the package are, and what a network can say of them."""
    describe, count = label_lookup(network), network.num_classes
    named = f": {', '.join(map(describe, range(count)))}" if count <= _FEW_CLASSES else ""
    shown = f"{len(paths)} photographs" if len(paths) > 1 else "photograph"
    return f"The {shown} in the package, by {name}, which knows {count} classes{named}.\n"


def print_predictions(results: list[dict[str, Any]]) -> None:
    """Print a line for each image; on a terminal, one for each of its classes, with a bar."""
    done = [result for result in results if "predictions" in result]
    if not done:
        return
    if sys.stdout.isatty():
        rows = [row for result in done for row in _draw_predictions(result)]
    else:
        rows = [
            [result["image"], *(f"{entry['label']} {entry['probability']:.1%}" for entry in result["predictions"])]
            for result in done
        ]
    print(format_columns(rows))


def print_errors(results: list[dict[str, Any]]) -> None:
    """Print on standard error a line for each image that has no predictions."""
    for result in results:
        if "error" in result:
            _print_skipped(result)


def _print_skipped(result: dict[str, Any]) -> None:
    print(f"timm-tresnet: skipped {result['image']}: {result['error']}", file=sys.stderr)


def _draw_predictions(result: dict[str, Any]) -> list[list[str]]:
    rows = [
        [
            f"{entry['probability']:6.1%}",
            format_bar(entry["probability"], _BAR_WIDTH, sys.stdout.encoding).ljust(_BAR_WIDTH),
            entry["label"],
        ]
        for entry in result["predictions"]
    ]
    first, *others = rows or [["", "", "nothing probable enough"]]
    return [[result["image"], *first], *(["", *row] for row in others)]

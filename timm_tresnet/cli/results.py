"""Write the results of `timm-tresnet classify` as they come, or print them at the end."""

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
_FEW_CLASSES = 20  # fit on one line


class Results:
    """Results of image files, written to a file or to text beside the images, or stored for printing.

    Args:
        writer: writes the file, a `timm_tresnet.collection.outputs.Output`; None for no file.
        sidecars: writes the text, a `timm_tresnet.collection.sidecars.Sidecars`; None for no text.

    Attributes:
        kept: results for printing.
        tally: counts, by the names in `COUNTED`.
    """

    def __init__(self, writer: Any, sidecars: Any) -> None:
        self._writer, self._sidecars = writer, sidecars
        self.kept: list[dict[str, Any]] = []
        self.tally: Counter[str] = Counter()

    def add(self, batch: list[Any]) -> None:
        """Add the results of a batch. Sidecars come first, so every line in the file has its sidecar."""
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
    """Yield batches as they come, with a progress bar on standard error."""
    from tqdm import tqdm

    bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} images, {rate_noinv_fmt}, {remaining} left"
    with tqdm(total=total, disable=not shown, mininterval=0, unit=" images", bar_format=bar_format) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def describe_written(tally: Counter[str], output: Path | None, sidecar: bool) -> str:
    """Return one or two lines about what was written."""
    lines = []
    if output:
        count, new = tally["images"] + tally["there"], f", {tally['images']} of them new" if tally["there"] else ""
        lines.append(f"{printable(output)}: {count} images{new}, {tally['errors']} with errors")
    if sidecar:
        there = f", {tally['sidecars_there']} were there already" if tally["sidecars_there"] else ""
        lines.append(f"{tally['sidecars']} text files written beside images{there}")
    return "\n".join(lines)


def describe_samples(paths: Sequence[Path], network: Any, name: str) -> str:
    """Return a sentence about the package's photographs and the network's classes."""
    describe, count = label_lookup(network), network.num_classes
    named = f": {', '.join(map(describe, range(count)))}" if count <= _FEW_CLASSES else ""
    shown = f"{len(paths)} photographs" if len(paths) > 1 else "photograph"
    return f"The {shown} in the package, by {name}, which knows {count} classes{named}.\n"


def print_predictions(results: list[dict[str, Any]]) -> None:
    """Print a line for each image; on a terminal, a line with a bar for each of its classes."""
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
    """Print a line on standard error for each image without predictions."""
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

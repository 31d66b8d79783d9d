"""Read annotations: which labels each image has, from any of the forms in `timm_tresnet.tagging.forms`."""

import csv
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from timm_tresnet.conversion.reading import shorten_names
from timm_tresnet.tagging.forms import ReadingOptions, Row, choose_reader, name_numbers, read_csv, read_text, rename
from timm_tresnet.utils.images import FORMATS, printable
from timm_tresnet.utils.schema import TEXT, format_value

__all__ = [
    "Annotations",
    "Example",
    "ReadingOptions",
    "read_annotations",
    "read_names",
    "read_numbers",
    "read_other_names",
]

_USUAL = ReadingOptions()


@dataclass(frozen=True)
class Example:
    """An image file and the names of its labels, sorted.

    Args:
        path: the file.
        labels: the labels that the image has.
        absent: labels that the image is known to lack; None if it lacks all other labels.
    """

    path: Path
    labels: tuple[str, ...]
    absent: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Annotations:
    """The content of an annotations file.

    Args:
        display_name: name of the file in messages.
        examples: its images, each once.
        names: its labels, in the order of a network's outputs.
        left_out: number of items left out, by their description.
    """

    display_name: str
    examples: tuple[Example, ...]
    names: tuple[str, ...]
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def partial(self) -> bool:
        """Whether some labels of some images are unknown: neither present nor absent."""
        return any(example.absent is not None for example in self.examples)


def read_annotations(path: Path, options: ReadingOptions = _USUAL) -> Annotations:
    """Read annotations in any form of `timm_tresnet.tagging.forms`.

    COCO's categories are ordered by ascending id, as ASL and ML-Decoder number them. Columns and the labels of a
    dataset card keep their order. All other labels are sorted by name. Rows about the same file are merged; a label
    that is both present and absent becomes unknown.

    Args:
        path: the file or folder.
        options: how to read it.

    Returns:
        The images and labels. Images without any known label are left out and counted, unless `keep_empty` is set.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the form is unknown, there are no images, or files or labels are named that do not exist.
    """
    read, path = choose_reader(path, options.class_folders)
    display_name = printable(path)
    left_out: Counter[str] = Counter()
    try:
        found = name_numbers(read(path, options, left_out), options.names)
        if options.other_names:
            found = rename(found, options.other_names)
        names = options.names or found.names
        _check_names(names)
        folder = options.images or (path if path.is_dir() else path.parent)
        if not options.outside:
            _refuse_outside([row.file for row in found.rows if _leaves(row.file.strip())], folder)
        images = _gather(found.rows, folder)
        if not options.outside:
            home = os.path.realpath(folder)
            _refuse_outside([str(image.relative_to(folder)) for image in images if _is_elsewhere(image, home)], folder)
        known = set(names)
        unknown = {label for each in images.values() for label in each.named if label not in known}
        if unknown and not options.skip_unknown:
            raise ValueError(
                f"has labels that are not among the {len(names)} known labels: {shorten_names(sorted(unknown))}; add "
                "them, or leave them out with --skip-unknown"
            )
        left_out["unknown labels"] += len(unknown)
        left_out["labels both present and absent"] += sum(each.contradictions for each in images.values())
        examples = [each.make_example(file, known) for file, each in images.items()]
        examples = list(_leave_out(examples, options, left_out))
        if not examples:
            raise ValueError(f"has no usable images{_format_counts(left_out, '; left out ')}")
    except ValueError as error:
        raise ValueError(f"{display_name} {error}") from error
    return Annotations(display_name, tuple(examples), tuple(names), +left_out)


def list_notes(annotations: Annotations) -> list[str]:
    """Return sentences about what was left out of annotations, and about labels that look like one."""
    notes = []
    if annotations.left_out:
        notes.append(f"{annotations.display_name}: left out{_format_counts(annotations.left_out, ' ')}")
    similar: dict[str, list[str]] = {}
    for name in annotations.names:
        similar.setdefault(fold_name(name), []).append(name)
    alike = [name for names in similar.values() if len(names) > 1 for name in names]
    if alike:
        notes.append(
            f"{annotations.display_name}: labels that differ in case, spaces or underscores alone are different "
            f"labels: {shorten_names(alike)}; merge them with --other-names FILE if they mean the same"
        )
    return notes


def fold_name(name: str) -> str:
    """Return a name without differences in case, underscores, repeated spaces and the encoding of accents."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().replace("_", " ").split())


def _format_counts(counts: Counter[str], before: str) -> str:
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return before + told if told else ""


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise ValueError("has no labels")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"needs each label once, got more than once: {shorten_names(twice)}")
    odd = [name for name in names if not TEXT.fits(name)]
    if odd:
        raise ValueError(
            f"needs labels to be {TEXT.description}, got {shorten_names([format_value(name) for name in odd])}"
        )


@dataclass
class _Gathered:
    """The merged rows of one image."""

    labels: set[str] = field(default_factory=set)
    absent: set[str] | None = None

    @property
    def named(self) -> set[str]:
        return self.labels | (self.absent or set())

    @property
    def contradictions(self) -> int:
        return len(self.labels & (self.absent or set()))

    def add(self, row: "Row | _Gathered") -> None:
        self.labels.update(row.labels)
        if row.absent is not None:
            self.absent = set() if self.absent is None else self.absent
            self.absent.update(row.absent)

    def make_example(self, path: Path, known: set[str]) -> Example:
        if self.absent is None:
            return Example(path, tuple(sorted(self.labels & known)))
        labels, absent = self.labels - self.absent, self.absent - self.labels
        return Example(path, tuple(sorted(labels & known)), tuple(sorted(absent & known)))


def _gather(rows: Iterable[Row], folder: Path) -> dict[Path, _Gathered]:
    gathered: dict[Path, _Gathered] = {}
    by_name: dict[str, _Gathered] = {}  # creating a Path is slow, and OpenImages has ten rows an image
    for row in rows:
        if row.file not in by_name:
            by_name[row.file] = gathered.setdefault(_locate(folder, row.file), _Gathered())
        by_name[row.file].add(row)
    return _add_suffixes(gathered)


def _locate(folder: Path, name: str) -> Path:
    """Return the path of a file; spaces around its name belong to the table, unless a file with them exists."""
    stripped = name.strip()
    return path if name != stripped and (path := folder / name).is_file() else folder / stripped


def _add_suffixes(gathered: dict[Path, _Gathered]) -> dict[Path, _Gathered]:
    """Add the suffix of the existing file to names without an image suffix, such as OpenImages' ImageID."""
    usual = [suffix for suffixes in FORMATS.values() for suffix in suffixes]
    usual += map(str.upper, usual[:])
    completed: dict[Path, _Gathered] = {}
    for path, image in gathered.items():
        if path.suffix.lower() not in usual and not path.exists():
            for suffix in usual:
                if (full := path.with_name(path.name + suffix)).is_file():
                    path = full
                    usual.insert(0, usual.pop(usual.index(suffix)))  # likely the suffix of all
                    break
        if path in completed:  # other rows about it have its suffix
            completed[path].add(image)
        else:
            completed[path] = image
    return completed


def _refuse_outside(names: Sequence[str], folder: Path) -> None:
    """Refuse images outside the folder: untrusted annotations could otherwise name any file of this machine."""
    outside = list(dict.fromkeys(names))
    if outside:
        raise ValueError(
            f"names {len(outside)} files outside {printable(folder)}, by absolute paths, .. or links: "
            f"{shorten_names(outside)}; if you trust the annotations, allow these files with --outside"
        )


def _leaves(name: str) -> bool:
    path = Path(name)
    return path.is_absolute() or bool(path.drive) or ".." in path.parts


def _is_elsewhere(path: Path, home: str) -> bool:
    if "\0" in str(path):
        return False  # not a file; reported later
    found = os.path.realpath(path)
    return found != home and not found.startswith(home.rstrip(os.sep) + os.sep)


def _leave_out(examples: Sequence[Example], options: ReadingOptions, left_out: Counter[str]) -> Iterator[Example]:
    labelled = [example for example in examples if example.labels or example.absent or options.keep_empty]
    left_out["images without labels"] += len(examples) - len(labelled)
    missing = [example for example in labelled if not example.path.is_file()]
    if missing and not options.skip_missing:
        shown = shorten_names([printable(example.path) for example in missing])
        raise ValueError(
            f"names {len(missing)} of {len(labelled)} files that do not exist, {shown}; say where they are with "
            "--images, or leave them out with --skip-missing"
        )
    left_out["files that do not exist"] += len(missing)
    gone = {example.path for example in missing}
    return (example for example in labelled if example.path not in gone)


def read_names(path: Path) -> tuple[str, ...]:
    """Read label names from a text file, one a line, in the order of a network's outputs.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not text, has no names, or has a name twice.
    """
    try:
        names = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
        _check_names(names)
    except ValueError as error:
        raise ValueError(f"{printable(path)} {error}") from error
    return names


def read_numbers(path: Path, names: Sequence[str]) -> dict[str, float]:
    """Read a number for each label from a CSV file with two columns; the first line may be a header.

    Args:
        path: the file.
        names: the labels; further labels in the file are ignored.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is malformed or lacks a label.
    """
    numbers: dict[str, float] = {}
    try:
        for line, (name, text) in _read_pairs(path):
            try:
                number = float(text)
            except ValueError:
                number = math.nan
            if 0 <= number < math.inf:
                numbers[name] = number
            elif line > 1:
                raise ValueError(f"needs a number from 0 on in line {line}, got {format_value(text)}")
        missing = [name for name in names if name not in numbers]
        if missing:
            raise ValueError(f"has no number for {len(missing)} of {len(names)} labels: {shorten_names(missing)}")
    except ValueError as error:
        raise ValueError(f"{printable(path)} {error}") from error
    return {name: numbers[name] for name in names}


def read_other_names(path: Path) -> dict[str, str]:
    """Read new names of labels from a CSV file with two columns, such as OpenImages' class-descriptions.csv.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is malformed.
    """
    try:
        return dict(pair for _, pair in _read_pairs(path))
    except ValueError as error:
        raise ValueError(f"{printable(path)} {error}") from error


def _read_pairs(path: Path) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yield the number and the two cells of each line."""
    lines = read_csv(read_text(path))
    try:
        for line in filter(None, lines):
            if len(line) != 2:
                raise ValueError(f"needs two columns, got {len(line)} cells in line {lines.line_num}")
            yield lines.line_num, (line[0].strip(), line[1].strip())
    except csv.Error as error:
        raise ValueError(f"is not valid CSV in line {lines.line_num}: {error}") from error

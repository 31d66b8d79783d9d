"""Which labels each image has, as people write it down: COCO's JSON, a CSV file, a dataset folder of the Hub."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm_tresnet.conversion.reading import name_some
from timm_tresnet.utils.images import printable
from timm_tresnet.utils.schema import TEXT, Kind, Table, find_fault, show

SEPARATOR = ";"
_OTHER_SEPARATORS = (",", "|")
_FILE_COLUMNS = ("file", "file_name")
_LABEL_COLUMNS = ("labels", "tags", "label")
_METADATA = "metadata.jsonl"  # https://huggingface.co/docs/datasets/image_dataset

_ID = Kind("a whole number or text", lambda value: type(value) is int or TEXT.fits(value))
_LIST = Kind("a list", lambda value: isinstance(value, list))
_COCO = Table(dict.fromkeys(("images", "annotations", "categories"), _LIST), ("images", "annotations", "categories"))
_COCO_ENTRIES = {  # https://cocodataset.org/#format-data; area, iscrowd, bbox and so on do not matter here
    "images": Table({"id": _ID, "file_name": TEXT}, ("id", "file_name")),
    "annotations": Table({"image_id": _ID, "category_id": _ID}, ("image_id", "category_id")),
    "categories": Table({"id": _ID, "name": TEXT}, ("id", "name")),
}


@dataclass(frozen=True)
class Example:
    """An image file and the names of its labels, sorted."""

    path: Path
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Annotations:
    """What a file of annotations says.

    Args:
        called: how messages name the file.
        examples: its images, each once.
        names: its labels, in the order in which a network is to have them.
        left_out: how many of what was left out, by what it was.
    """

    called: str
    examples: tuple[Example, ...]
    names: tuple[str, ...]
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Reading:
    """How annotations are read.

    Args:
        images: folder that file names are relative to; None for the one in which the annotations are.
        separator: between the labels in a cell of a CSV file; None for `SEPARATOR`.
        column: of CSV and metadata.jsonl, the column with the labels; None for one that is named labels, tags or label.
        names: the labels that there are, in order; None for those in the file.
        skip_missing: leave out images whose files do not exist.
        skip_unknown: leave out labels not among names, and COCO's annotations of unknown images and categories.
        keep_empty: keep images that have none of the labels.
    """

    images: Path | None = None
    separator: str | None = None
    column: str | None = None
    names: tuple[str, ...] | None = None
    skip_missing: bool = False
    skip_unknown: bool = False
    keep_empty: bool = False


def read_annotations(path: Path, reading: Reading = Reading()) -> Annotations:
    """Read annotations: COCO's from .json, `file,labels` from .csv, metadata.jsonl of a Hub dataset from its folder.

    COCO's labels are its categories by ascending id, as ASL and ML-Decoder number them; others are sorted by name. The
    labels of rows about the same file are put together.

    Args:
        path: the file, or a folder that holds a metadata.jsonl.
        reading: how to read it.

    Returns:
        The images and labels. Images without labels are left out and counted unless they are to be kept.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is none of these, holds no images, names files that do not exist or labels that are unknown.
    """
    read, path = _choose_reader(path)
    called = printable(path)
    left_out: Counter[str] = Counter()
    try:
        pairs, found = read(path, reading, left_out)
        names = reading.names or found
        _check_names(names)
        labels = _gather(pairs, reading.images or path.parent)
        known = set(names)
        unknown = Counter(label for each in labels.values() for label in each if label not in known)
        if unknown and not reading.skip_unknown:
            raise ValueError(
                f"has labels that are not among the {len(names)} known ones: {name_some(sorted(unknown))}; add them, "
                "or leave them out with --skip-unknown"
            )
        left_out["labels that are unknown"] += len(unknown)
        examples = [Example(file, tuple(sorted(each & known))) for file, each in labels.items()]
        examples = list(_leave_out(examples, reading, left_out))
        if not examples:
            raise ValueError(f"has no images to train on or to measure with{_tell(left_out, ' but ')}")
    except ValueError as error:
        raise ValueError(f"{called} {error}") from error
    return Annotations(called, tuple(examples), tuple(names), +left_out)


def describe_left_out(annotations: Annotations) -> str | None:
    """What was left out of annotations, in a sentence; None if nothing was."""
    return f"{annotations.called}: left out{_tell(annotations.left_out, ' ')}" if annotations.left_out else None


def _tell(counts: Counter[str], before: str) -> str:
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return before + told if told else ""


_Reader = Callable[[Path, Reading, Counter[str]], tuple[list[tuple[str, list[str]]], tuple[str, ...]]]


def _choose_reader(path: Path) -> tuple[_Reader, Path]:
    if path.is_dir():
        inside = path / _METADATA
        if not inside.exists():
            below = sorted(str(each.parent.relative_to(path)) for each in path.glob(f"*/{_METADATA}"))
            hint = f"; there is one in {name_some(below)}" if below else ""
            raise ValueError(f"{printable(path)} needs to hold a {_METADATA}, as dataset folders of the Hub do{hint}")
        return _read_metadata, inside
    readers: dict[str, _Reader] = {".json": _read_coco, ".csv": _read_csv, ".jsonl": _read_metadata}
    if path.suffix.lower() not in readers:
        raise ValueError(
            f"{printable(path)} needs to be COCO's .json, a .csv of file and labels, or a folder with {_METADATA}"
        )
    return readers[path.suffix.lower()], path


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"needs to be text in UTF-8: {error}") from error


def _read_coco(
    path: Path, reading: Reading, left_out: Counter[str]
) -> tuple[list[tuple[str, list[str]]], tuple[str, ...]]:
    content = _parse_json(_read_text(path))
    fault = find_fault(content, _COCO) or next(filter(None, _find_faulty_entries(content)), None)
    if fault:
        raise ValueError(f"{fault}; COCO's annotations have images, annotations and categories")
    images = {entry["id"]: (entry["file_name"], []) for entry in content["images"]}
    ascending = sorted(content["categories"], key=lambda entry: (isinstance(entry["id"], str), entry["id"]))
    categories = {entry["id"]: entry["name"].strip() for entry in ascending}
    if len(images) < len(content["images"]) or len(categories) < len(content["categories"]):
        raise ValueError("has an id twice among its images or its categories")
    for index, entry in enumerate(content["annotations"]):
        image, category = images.get(entry["image_id"]), categories.get(entry["category_id"])
        if image is not None and category is not None:
            image[1].append(category)
        elif reading.skip_unknown:
            left_out["annotations of unknown images or categories"] += 1
        else:
            what = "image_id" if image is None else "category_id"
            raise ValueError(
                f"needs annotations[{index}].{what} to be the id of one of the others, got {show(entry[what])}; "
                "--skip-unknown leaves such annotations out"
            )
    return list(images.values()), tuple(categories.values())


def _find_faulty_entries(content: dict[str, list[Any]]) -> Iterator[str | None]:
    for part, table in _COCO_ENTRIES.items():
        for index, entry in enumerate(content[part]):
            yield find_fault(entry, table, f"{part}[{index}]")


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from error


def _read_csv(
    path: Path, reading: Reading, left_out: Counter[str]
) -> tuple[list[tuple[str, list[str]]], tuple[str, ...]]:
    rows = csv.reader(_read_text(path).splitlines(keepends=True), strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        file, labels = _find_column(header, _FILE_COLUMNS, None), _find_column(header, _LABEL_COLUMNS, reading.column)
        cells = []
        for row in rows:
            if row and len(row) != len(header):
                raise ValueError(
                    f"has {len(row)} cells in line {rows.line_num}, and {len(header)} in its first; put a cell that "
                    f'holds commas in quotes, as in photo.jpg,"red, round{reading.separator or SEPARATOR}cat"'
                )
            if row:
                cells.append((row[file], row[labels].strip()))
    except csv.Error as error:
        raise ValueError(f"is no CSV in line {rows.line_num}: {error}") from error
    _check_separator([cell for _, cell in cells], reading.separator)
    pairs = [(name, _split(cell, reading.separator or SEPARATOR)) for name, cell in cells]
    return pairs, _collect_names(pairs)


def _find_column(header: Sequence[str], usual: Sequence[str], wanted: str | None) -> int:
    for name in (wanted,) if wanted else usual:
        if name in header:
            return header.index(name)
    raise ValueError(
        f"needs a first line that names its columns, one of them {' or '.join((wanted,) if wanted else usual)}, got "
        f"{show(','.join(header))}"
    )


def _check_separator(cells: Sequence[str], separator: str | None) -> None:
    """Refuse to guess: without the usual separator, a label with a comma looks like two labels."""
    lists = [cell for cell in cells if cell.startswith("[")]
    if separator or lists or any(SEPARATOR in cell for cell in cells):
        return
    for other in _OTHER_SEPARATORS:
        example = next((cell for cell in cells if other in cell), None)
        if example is not None:
            raise ValueError(
                f"has labels such as {show(example)}: say --separator {other!r} if these are several labels, or "
                f"--separator {SEPARATOR!r} if it is one"
            )


def _split(cell: str, separator: str) -> list[str]:
    if cell.startswith("["):
        return _as_names(_parse_json(cell), "a cell that begins with [")
    return [name.strip() for name in cell.split(separator) if name.strip()]


def _as_names(value: Any, called: str) -> list[str]:
    """Names of labels: text, a number, or a list of these."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(_ID.fits(each) for each in values):
        raise ValueError(f"needs {called} to be a label or a list of labels, each {_ID.words}, got {show(value)}")
    return [name for name in (str(each).strip() for each in values) if name]


def _read_metadata(
    path: Path, reading: Reading, left_out: Counter[str]
) -> tuple[list[tuple[str, list[str]]], tuple[str, ...]]:
    pairs = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = _parse_json(line)
            fault = find_fault(entry, Table({"file_name": TEXT}, ("file_name",)))
            if fault:
                raise ValueError(fault)
            column = (
                next((name for name in _LABEL_COLUMNS if name in entry), None) if not reading.column else reading.column
            )
            if column not in entry:
                wanted = reading.column or " or ".join(_LABEL_COLUMNS)
                raise ValueError(
                    f"needs a column {wanted}, got {name_some(sorted(entry))}; name the one with labels with --column"
                )
            pairs.append((entry["file_name"], _as_names(entry[column], column)))
        except ValueError as error:
            raise ValueError(f"{error} (line {number})") from error
    return pairs, _collect_names(pairs)


def _collect_names(pairs: Iterable[tuple[str, list[str]]]) -> tuple[str, ...]:
    return tuple(sorted({name for _, names in pairs for name in names}))


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise ValueError("has no labels")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"needs labels that differ, got twice: {name_some(twice)}")
    odd = [name for name in names if not TEXT.fits(name)]
    if odd:
        raise ValueError(f"needs labels to be {TEXT.words}, got {name_some([show(name) for name in odd])}")


def _gather(pairs: Iterable[tuple[str, list[str]]], folder: Path) -> dict[Path, set[str]]:
    gathered: dict[Path, set[str]] = {}
    for name, labels in pairs:
        gathered.setdefault(folder / name.strip(), set()).update(labels)
    return gathered


def _leave_out(examples: Sequence[Example], reading: Reading, left_out: Counter[str]) -> Iterator[Example]:
    labelled = [example for example in examples if example.labels or reading.keep_empty]
    left_out["images without labels"] += len(examples) - len(labelled)
    missing = [example for example in labelled if not example.path.is_file()]
    if missing and not reading.skip_missing:
        shown = name_some([printable(example.path) for example in missing])
        raise ValueError(
            f"names {len(missing)} of {len(labelled)} files that do not exist, {shown}; say where they are with "
            "--images, or leave them out with --skip-missing"
        )
    left_out["files that do not exist"] += len(missing)
    gone = {example.path for example in missing}
    return (example for example in labelled if example.path not in gone)


def read_names(path: Path) -> tuple[str, ...]:
    """Names of labels in a text file, one a line, in the order in which a network is to have them.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not text, has none, or one twice.
    """
    try:
        names = tuple(line.strip() for line in _read_text(path).splitlines() if line.strip())
        _check_names(names)
    except ValueError as error:
        raise ValueError(f"{printable(path)} {error}") from error
    return names

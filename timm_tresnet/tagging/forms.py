"""Read each form of annotations into rows: COCO, CSV, Hub dataset folders, text files beside images, class folders."""

import ast
import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from yaml import YAMLError

from timm_tresnet.conversion.reading import shorten_names
from timm_tresnet.tagging.exports import Pairs, is_label_studio, read_cvat, read_label_studio
from timm_tresnet.utils.errors import summarise
from timm_tresnet.utils.images import FORMATS, find_images, printable
from timm_tresnet.utils.schema import TEXT, Kind, Table, find_fault, format_value
from timm_tresnet.utils.tables import allow_large_cells

SEPARATOR = ";"
_PLAIN_SEPARATORS = (";", ",", "|")  # few labels contain one
_OTHER_SEPARATORS = (*_PLAIN_SEPARATORS, " ", "/", "+")
_FILE_COLUMNS: tuple[str, ...] = ("file", "file_name", "filename", "filepath", "path", "image", "image_name")
_FILE_COLUMNS += ("image_path", "imageid", "image_id")
_LABEL_COLUMNS = ("labels", "tags", "label", "labelname")
_CONFIDENCE = "confidence"  # OpenImages: 1 for a label that was verified as present, 0 for one verified as absent
_BLANK = {"", "nan", "na", "n/a", "<na>", "null", "none"}  # empty cells, as pandas and R write them
_STATES = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False} | dict.fromkeys(
    (*_BLANK, "-1", "-1.0")
)
_RECURRENCE = 1.5  # parts of combinations recur at least this many times as often as the combinations
_METADATA = ("metadata.jsonl", "metadata.csv")  # https://huggingface.co/docs/datasets/image_dataset
_BOX = 5  # numbers in a line of a YOLO file: class, centre (2), size (2)

_ID = Kind("a whole number or text", lambda value: type(value) is int or TEXT.fits(value))
_LIST = Kind("a list", lambda value: isinstance(value, list))
_COCO = Table(dict.fromkeys(("images", "annotations", "categories"), _LIST), ("images", "annotations", "categories"))
_COCO_ENTRIES = {  # https://cocodataset.org/#format-data; area, iscrowd, bbox and so on are ignored
    "images": Table({"id": _ID, "file_name": TEXT, "coco_url": TEXT, "neg_category_ids": _LIST}, ("id",)),
    "annotations": Table({"image_id": _ID, "category_id": _ID}, ("image_id", "category_id")),
    "categories": Table({"id": _ID, "name": TEXT}, ("id", "name")),
}


@dataclass(frozen=True)
class ReadingOptions:
    """How annotations are read.

    Args:
        images: folder that file names are relative to; None for the folder of the annotations.
        separator: separator of labels in a cell or a text file; None for the form's usual one.
        column: the column with the labels; None for the one named labels, tags or label.
        names: the known labels, in order; None for the labels in the file.
        skip_missing: leave out images whose files do not exist.
        skip_unknown: leave out labels not among names, and COCO annotations of unknown images and categories.
        keep_empty: keep images without labels.
        file_column: the column with the file names; None for the one named file, image or similar.
        other_names: new name of each label that is to be renamed.
        class_folders: read a folder of folders as class folders: each image has the folder's name as its only label.
        outside: allow images outside the folder: absolute paths, `..`, and links that lead outside.
    """

    images: Path | None = None
    separator: str | None = None
    column: str | None = None
    names: tuple[str, ...] | None = None
    skip_missing: bool = False
    skip_unknown: bool = False
    keep_empty: bool = False
    file_column: str | None = None
    other_names: Mapping[str, str] | None = None
    class_folders: bool = False
    outside: bool = False


@dataclass(frozen=True)
class Row:
    """One entry of annotations; an image can have several.

    Args:
        file: name of the image's file, possibly without its suffix.
        labels: labels that the image has.
        absent: labels that the image is known to lack; None if it lacks all other labels.
    """

    file: str
    labels: tuple[str, ...]
    absent: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Rows:
    """The entries of an annotations file.

    Args:
        rows: one or several for each image.
        names: the labels, in the form's own order.
        classes: names of the classes if labels are class numbers from 0 on; None if the form does not name them.
    """

    rows: list[Row]
    names: tuple[str, ...]
    classes: tuple[str, ...] | None = None


_Reader = Callable[[Path, ReadingOptions, Counter[str]], Rows]


def choose_reader(path: Path, class_folders: bool = False) -> tuple[_Reader, Path]:
    """Choose the reader for annotations; return it and the file or folder that it reads.

    Args:
        path: the file or folder that the user named.
        class_folders: whether class folders are allowed.

    Raises:
        ValueError: if the form is unknown.
    """
    readers: dict[str, _Reader] = {
        ".json": _read_json,
        ".xml": _read_cvat,
        ".csv": _read_table,
        ".tsv": _read_table,
        ".jsonl": _read_metadata,
    }
    if path.is_dir():
        inside = next((path / name for name in _METADATA if (path / name).exists()), None)
        if inside is not None:
            return readers[inside.suffix], inside
        images = list(find_images([path]))
        if any(image.with_suffix(".txt").exists() for image in images):
            return _read_sidecars, path
        if class_folders and any(image.parent != path for image in images):
            return _read_class_folders, path
        below = sorted(str(each.parent.relative_to(path)) for name in _METADATA for each in path.glob(f"*/{name}"))
        hint = f"; there is one in {shorten_names(below)}" if below else ", or a .txt with labels beside each image"
        raise ValueError(f"{printable(path)} needs to contain {_METADATA[0]}, as dataset folders of the Hub do{hint}")
    if path.suffix.lower() not in readers:
        raise ValueError(
            f"{printable(path)} needs to be COCO's or Label Studio's .json, CVAT's .xml, a .csv of file and labels, or "
            f"a folder with {_METADATA[0]} or with a .txt beside each image"
        )
    return readers[path.suffix.lower()], path


def read_text(path: Path) -> str:
    """Read a text file in UTF-8.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not UTF-8. The message follows the file's name.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"needs to be text in UTF-8: {error}") from error


def read_csv(text: str, delimiter: str = ",") -> Any:
    """Read the rows of a CSV file; `str.splitlines` would also split at characters such as U+2028 in file names."""
    allow_large_cells()
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from error


def _read_json(path: Path, options: ReadingOptions, left_out: Counter[str]) -> Rows:
    """Read COCO's annotations, an object, or Label Studio's, a list."""
    content = _parse_json(read_text(path))
    if isinstance(content, list):
        return _read_label_studio(content, path, options, left_out)
    return _read_coco(content, options, left_out)


def _read_label_studio(entries: Any, path: Path, options: ReadingOptions, left_out: Counter[str]) -> Rows:
    folder = options.images or path.parent
    return _make_rows(read_label_studio(entries, folder, options.file_column, _FILE_COLUMNS, options.column, left_out))


def _read_cvat(path: Path, options: ReadingOptions, left_out: Counter[str]) -> Rows:
    pairs, names = read_cvat(read_text(path), options.images or path.parent)
    return Rows(_make_rows(pairs).rows, names)


def _make_rows(pairs: Pairs) -> Rows:
    rows = [Row(file, labels) for file, labels in pairs]
    return Rows(rows, _collect_names(rows))


def _read_coco(content: Any, options: ReadingOptions, left_out: Counter[str]) -> Rows:
    """Read COCO or LVIS annotations. LVIS also lists categories that were verified as absent from an image."""
    fault = find_fault(content, _COCO) or next(filter(None, _find_faulty_entries(content)), None)
    if fault:
        raise ValueError(f"{fault}; COCO's annotations have images, annotations and categories")
    labels: dict[Any, list[str]] = {entry["id"]: [] for entry in content["images"]}
    ascending = sorted(content["categories"], key=lambda entry: (isinstance(entry["id"], str), entry["id"]))
    categories = {entry["id"]: entry["name"].strip() for entry in ascending}
    if len(labels) < len(content["images"]) or len(categories) < len(content["categories"]):
        raise ValueError("has two images or two categories with the same id")
    for index, entry in enumerate(content["annotations"]):
        of_image, category = labels.get(entry["image_id"]), categories.get(entry["category_id"])
        if of_image is not None and category is not None:
            of_image.append(category)
        elif options.skip_unknown:
            left_out["annotations of unknown images or categories"] += 1
        else:
            what = "image_id" if of_image is None else "category_id"
            raise ValueError(
                f"needs annotations[{index}].{what} to be the id of an entry of "
                f"{'images' if of_image is None else 'categories'}, got {format_value(entry[what])}; leave such "
                "annotations out with --skip-unknown"
            )
    partial = any("neg_category_ids" in entry for entry in content["images"])
    rows = [
        Row(
            _name_coco_file(entry),
            tuple(labels[entry["id"]]),
            tuple(categories[each] for each in entry.get("neg_category_ids", ())) if partial else None,
        )
        for entry in content["images"]
    ]
    return Rows(rows, tuple(categories.values()))


def _find_faulty_entries(content: dict[str, list[Any]]) -> Iterator[str | None]:
    for part, table in _COCO_ENTRIES.items():
        for index, entry in enumerate(content[part]):
            yield find_fault(entry, table, f"{part}[{index}]")
    known = {entry["id"] for entry in content["categories"]}
    for index, entry in enumerate(content["images"]):
        if "file_name" not in entry and "coco_url" not in entry:
            yield f"needs images[{index}].file_name, which is missing"
        for each in entry.get("neg_category_ids", ()):
            if not _ID.fits(each) or each not in known:
                yield f"needs images[{index}].neg_category_ids to be ids of categories, got {format_value(each)}"


def _name_coco_file(entry: dict[str, Any]) -> str:
    """Return an image's file name. LVIS has none; the last two parts of its URL are COCO's folder and file."""
    name: str = entry.get("file_name") or "/".join(entry["coco_url"].split("/")[-2:])
    return name


def _read_table(path: Path, options: ReadingOptions, left_out: Counter[str]) -> Rows:
    """Read a CSV file: a column of labels, perhaps with a column of confidences, or one column for each label."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = read_csv(read_text(path), delimiter)
    try:
        header = [name.strip() for name in next(lines, [])]
        if len(header) == 1 and any(other in header[0] for other in ";\t,"):
            raise ValueError(
                f"needs commas between its columns, or tabs if it is a .tsv, got {format_value(header[0])}"
            )
        table = []
        for line in lines:
            if not any(map(str.strip, line)):  # spreadsheets leave commas below the last row
                continue
            if len(line) != len(header):
                raise ValueError(
                    f"has {len(line)} cells in line {lines.line_num}, and {len(header)} in its first; put a cell that "
                    f'holds commas in quotes, as in photo.jpg,"red, round{options.separator or SEPARATOR}cat"'
                )
            table.append(line)
    except csv.Error as error:
        raise ValueError(f"is not valid CSV in line {lines.line_num}: {error}") from error
    if is_label_studio(header):
        entries = [dict(zip(header, line, strict=True)) for line in table]
        return _read_label_studio(entries, path, options, left_out)
    file = _find_column(header, _FILE_COLUMNS, options.file_column)
    labels = _find_column(header, _LABEL_COLUMNS, options.column)
    if file is None:
        raise _miss_column(header, _FILE_COLUMNS[:2], options.file_column, "--file-column")
    table = [[cell if index == file else cell.strip() for index, cell in enumerate(line)] for line in table]
    if labels is None and options.column is None:
        rows = _read_one_hot(header, table, file, options, left_out)
        if rows is not None:
            return rows
    if labels is None:
        raise _miss_column(header, _LABEL_COLUMNS[:3], options.column, "--column")
    cells = _split_cells([line[labels] for line in table], options.separator, SEPARATOR)
    confidence = _find_column(header, (_CONFIDENCE,), None)
    if confidence is None:
        labelled = [Row(line[file], names) for line, names in zip(table, cells, strict=True)]
    else:
        labelled = list(_weigh_rows(table, cells, file, confidence))
    return Rows(labelled, _collect_names(labelled), _read_classes(path, header[labels]))


def _find_column(header: Sequence[str], usual: Sequence[str], wanted: str | None) -> int | None:
    if wanted:
        return header.index(wanted) if wanted in header else None
    lower = [name.lower() for name in header]
    return next((lower.index(name) for name in usual if name in lower), None)


def _miss_column(header: Sequence[str], usual: Sequence[str], wanted: str | None, flag: str) -> ValueError:
    one_hot = "" if wanted or flag != "--column" else ", or a column of 0 and 1 for each label"
    return ValueError(
        f"needs a first line that names its columns, one of them {' or '.join((wanted,) if wanted else usual)}"
        f"{one_hot}, got {format_value(','.join(header))}; {flag} names another"
    )


def _weigh_rows(
    table: Sequence[Sequence[str]], cells: Sequence[tuple[str, ...]], file: int, confidence: int
) -> Iterator[Row]:
    """Yield rows with a confidence of 1 (present) or 0 (absent).

    Without a 0, the file does not distinguish unknown from absent labels; every label without a 1 is then absent.
    """
    states = []
    for line in table:
        state = _STATES.get(line[confidence].lower())
        if state is None:
            raise ValueError(
                f"needs each {_CONFIDENCE} to be 0 or 1, got {format_value(line[confidence])}; leave out unverified "
                "labels, or rename the column"
            )
        states.append(state)
    partial = not all(states)
    for line, names, state in zip(table, cells, states, strict=True):
        yield Row(line[file], names if state else (), (() if state else names) if partial else None)


def _read_one_hot(
    header: Sequence[str], table: Sequence[Sequence[str]], file: int, options: ReadingOptions, left_out: Counter[str]
) -> Rows | None:
    """Read columns of 1 (present), 0 (absent) and -1 or an empty cell (unknown); None if there are no such columns.

    If no cell is 0, -1 and empty cells mean absent: some files have 1 and -1 (CelebA), or 1 and empty cells. Given
    labels without a column are unknown, as are labels on which two rows of one file disagree.
    """
    called = [(options.other_names or {}).get(name, name) for name in header]
    columns: list[int] = []
    others: list[int] = []
    for index, name in enumerate(called):
        if index != file and (name in options.names if options.names else name):  # pandas' index has none
            cells = {line[index].lower() for line in table}
            is_label = cells <= _STATES.keys() and (options.names or not cells <= _BLANK)
            (columns if is_label else others).append(index)
    if not table or not (columns or (options.names and others)):
        return None
    if options.names and others:
        raise ValueError(
            "needs 1, 0, -1 or nothing in each cell of a label's column, got others in "
            f"{shorten_names([header[index] for index in others])}"
        )
    if others:
        names = shorten_names([header[index] for index in others])
        left_out[f"columns with values other than 0 and 1 ({names})"] += len(others)
    states = [{header[index]: _STATES[line[index].lower()] for index in columns} for line in table]
    no_zeros = not any(state is False for line in states for state in line.values())
    complete = set(options.names or ()) <= {called[index] for index in columns} and (
        no_zeros or not any(state is None for line in states for state in line.values())
    )
    first: dict[str, dict[str, bool | None]] = {}
    differing = {
        line[file] for line, state in zip(table, states, strict=True) if first.setdefault(line[file], state) != state
    }
    lacking = (False, None) if no_zeros else (False,)
    rows = []
    for line, of_line in zip(table, states, strict=True):
        known = not complete or (not no_zeros and line[file] in differing)
        absent = tuple(name for name, state in of_line.items() if state in lacking) if known else None
        rows.append(Row(line[file], tuple(name for name, state in of_line.items() if state), absent))
    return Rows(rows, tuple(header[index] for index in columns))


def _split_cells(cells: Sequence[str], separator: str | None, usual: str | None) -> list[tuple[str, ...]]:
    """Split each cell into labels; a cell is a JSON list, or labels with separators.

    Raises:
        ValueError: if no separator is given and labels seem to have another separator than the usual one.
    """
    if separator is None:
        _check_separator(cells, usual)
    return [_split(cell, separator or usual) for cell in cells]


def _check_separator(cells: Sequence[str], usual: str | None) -> None:
    """Refuse cells whose separator is unclear; with a wrong separator, several labels would become one.

    A comma or similar in place of the usual separator is enough to refuse. Many labels contain spaces, so a space
    counts only if splitting at it gives fewer distinct labels, as it does for combinations of a few labels, or if
    labels look like combinations of many.
    """
    plain = [cell for cell in cells if not cell.startswith("[")]
    usual_count = sum(usual in cell for cell in plain) if usual else 0
    seldom = usual is not None and not usual_count and len(plain) == len(cells)
    whole = {name for cell in plain for name in _split(cell, usual)}
    for other in _OTHER_SEPARATORS:
        having = [cell for cell in plain if other in cell]
        if other == usual or not having or len(having) <= 2 * usual_count:
            continue
        fewer = len({name for cell in plain for name in _split(cell, other)}) < len(whole)
        if fewer or (seldom and other in _PLAIN_SEPARATORS) or _look_combined(plain, usual, other):
            raise ValueError(
                f"has labels such as {format_value(having[0])}: use --separator {other!r} if these are several labels, "
                f"or --separator {usual or SEPARATOR!r} if this is one label"
            )


def _look_combined(cells: Sequence[str], usual: str | None, other: str) -> bool:
    """Return whether labels that contain another separator look like combinations, even if splitting gives more labels.

    Danbooru's tags have underscores instead of spaces. Combinations of many labels rarely recur; their parts do.
    """
    if other not in (" ", *_PLAIN_SEPARATORS):
        return False
    whole = Counter(name for cell in cells for name in _split(cell, usual))
    having = [name for name in whole if other in name]
    if other == " " and any("_" in name for name in having):
        return True
    parts = Counter(part for cell in cells for part in set(_split(cell, other)))
    once = sum(whole[name] == 1 for name in having)
    recurrence = [count.total() / max(len(count), 1) for count in (whole, parts)]
    return 2 * once > len(having) and recurrence[1] >= _RECURRENCE * recurrence[0]


def _split(cell: str, separator: str | None) -> tuple[str, ...]:
    if cell.startswith("["):
        return _as_names(_parse_list(cell), "a cell that begins with [")
    names = cell.split(separator) if separator else [cell]
    return tuple(name.strip() for name in names if name.strip())


def _parse_list(cell: str) -> Any:
    """Parse a list in JSON or Python syntax; pandas writes the latter."""
    try:
        return _parse_json(cell)
    except ValueError:
        try:
            value = ast.literal_eval(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
        if not isinstance(value, list) or not all(isinstance(each, str | int) for each in value):
            raise
        return value


def _as_names(value: Any, display_name: str) -> tuple[str, ...]:
    """Return label names from a JSON value: text, a number, or a list of these."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(_ID.fits(each) for each in values):
        raise ValueError(
            f"needs {display_name} to be a label or a list of labels, each {_ID.description}, got {format_value(value)}"
        )
    return tuple(name for name in (str(each).strip() for each in values) if name)


def _read_metadata(path: Path, options: ReadingOptions, left_out: Counter[str]) -> Rows:
    """Read metadata.jsonl of a Hub dataset folder; a string is one label unless a separator is given."""
    column, entries = options.column or "", []
    wanted_file = options.file_column or "file_name"
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = _parse_json(line)
            fault = find_fault(entry, Table({wanted_file: TEXT}, (wanted_file,)))
            if fault:
                raise ValueError(fault)
            column = options.column or next((name for name in _LABEL_COLUMNS if name in entry), "")
            if column not in entry:
                wanted = options.column or " or ".join(_LABEL_COLUMNS[:3])
                raise ValueError(
                    f"needs a column {wanted}, got {shorten_names(sorted(entry))}; name the label column with --column"
                )
            entries.append((entry[wanted_file], entry[column], _as_names(entry[column], column)))
        except ValueError as error:
            raise ValueError(f"{error} (line {number})") from error
    strings = iter(_split_cells([value for _, value, _ in entries if isinstance(value, str)], options.separator, None))
    rows = [Row(file, next(strings) if isinstance(value, str) else names) for file, value, names in entries]
    return Rows(rows, _collect_names(rows), _read_classes(path, column))


def _read_classes(path: Path, column: str) -> tuple[str, ...] | None:
    """Read the class names of a column from the card of its dataset folder; None if the card has none."""
    if path.name not in _METADATA:
        return None
    card = next((each for each in (path.with_name("README.md"), path.parents[1] / "README.md") if each.exists()), None)
    if card is None:
        return None
    try:
        described = (metadata_load(card) or {}).get("dataset_info")
    except (ValueError, YAMLError) as error:
        raise ValueError(f"has a dataset card, {printable(card)}, that cannot be read: {summarise(error)}") from error
    for configuration in described if isinstance(described, list) else [described]:
        for feature in configuration.get("features") or () if isinstance(configuration, dict) else ():
            if isinstance(feature, dict) and feature.get("name") == column:
                names = _find_class_label(feature)
                if names is not None:
                    return names
    return None


def _find_class_label(feature: Any) -> tuple[str, ...] | None:
    """Return the class names of a ClassLabel feature, or of a list of them; `datasets` writes {"0": name, ...}."""
    if not isinstance(feature, dict):
        return None
    label = feature.get("class_label")
    if isinstance(label, dict):
        names = label.get("names")
        if isinstance(names, dict) and {str(key) for key in names} == {str(index) for index in range(len(names))}:
            return tuple(str(names[key]) for key in sorted(names, key=int))
        return tuple(map(str, names)) if isinstance(names, list) else None
    found = (_find_class_label(feature.get(part)) for part in ("dtype", "sequence", "list", "feature"))
    return next((names for names in found if names is not None), None)


def _read_sidecars(path: Path, options: ReadingOptions, left_out: Counter[str]) -> Rows:
    """Read a .txt beside each image: labels separated by commas or newlines, or YOLO boxes."""
    images = list(find_images([path]))
    texts = {image: image.with_suffix(".txt") for image in images}
    left_out["images without a .txt"] += sum(not text.exists() for text in texts.values())
    contents = {str(image.relative_to(path)): read_text(text) for image, text in texts.items() if text.exists()}
    boxes = [line.split() for content in contents.values() for line in content.splitlines() if line.strip()]
    if boxes and all(map(_is_box, boxes)):
        rows = [
            Row(file, tuple(line.split()[0] for line in content.splitlines() if line.strip()))
            for file, content in contents.items()
        ]
    else:
        lines = [(file, line.strip()) for file, content in contents.items() for line in content.splitlines() or [""]]
        cells = _split_cells([line for _, line in lines], options.separator, ",")
        rows = [Row(file, names) for (file, _), names in zip(lines, cells, strict=True)]
    return Rows(rows, _collect_names(rows))


def _is_box(words: Sequence[str]) -> bool:
    return len(words) >= _BOX and words[0].isdecimal() and all(_is_share(word) for word in words[1:])


def _is_share(word: str) -> bool:
    try:
        return 0 <= float(word) <= 1
    except ValueError:
        return False


def _read_class_folders(path: Path, options: ReadingOptions, left_out: Counter[str]) -> Rows:
    """Read class folders: a folder for each label, or a folder `validation` that contains them."""
    _, found = read_class_folders(path, "validation", left_out)
    rows = [row for row in found.rows if row.labels[0]]
    left_out["images outside class folders"] += len(found.rows) - len(rows)
    return Rows(rows, tuple(name for name in found.names if name))


def read_class_folders(path: Path, split: str, left_out: Counter[str]) -> tuple[Path, Rows]:
    """Read class folders with timm's reader, so that timm's scripts count the same images and classes.

    Args:
        path: folder with a folder for each label, or with a folder such as `validation` or `val` that has them.
        split: which of those folders, "train" or "validation"; timm accepts similar names.
        left_out: counts images in formats that timm's reader skips.

    Returns:
        The folder that contains the class folders, and the rows. Files are relative to path; names are in timm's order,
        in which numbers are compared as numbers. An image outside class folders has the label "".

    Raises:
        ValueError: if there are no images.
    """
    import timm.data

    try:
        reader = timm.data.create_dataset("", str(path), split=split).reader
    except RuntimeError as error:  # no images
        raise ValueError(f"{printable(path)}: {error}") from error
    root = Path(reader.root)
    skipped = {suffix for each in FORMATS.values() for suffix in each} - set(timm.data.get_img_extensions())
    for found in root.rglob("*"):
        if found.suffix.lower() in skipped:
            left_out[f"{found.suffix.lower()} files, which timm's reader skips"] += 1
    names = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
    rows = [Row(str(Path(file).relative_to(path)), (names[index],)) for file, index in reader.samples]
    return root, Rows(rows, tuple(names))


def _collect_names(rows: Iterable[Row]) -> tuple[str, ...]:
    """Return all label names, sorted; numbers are sorted by value."""
    names = {name for row in rows for name in (*row.labels, *(row.absent or ()))}
    return tuple(sorted(names, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name)))


def name_numbers(found: Rows, names: tuple[str, ...] | None) -> Rows:
    """Replace class numbers from 0 on by class names.

    Args:
        found: the rows.
        names: names of the classes, in order, if the form does not name them; None if unknown.

    Returns:
        The renamed rows; the same rows if not all labels are numbers, or no names are known.

    Raises:
        ValueError: if a number is too large.
    """
    listed = found.classes or names
    if not listed or not all(name.isdecimal() for name in found.names) or any(name.isdecimal() for name in listed):
        return found
    beyond = [name for name in found.names if int(name) >= len(listed)]
    if beyond:
        raise ValueError(f"has class numbers beyond the {len(listed)} names: {shorten_names(beyond)}")
    return _rename(found, {name: listed[int(name)] for name in found.names}, tuple(listed))


def rename(found: Rows, names: Mapping[str, str]) -> Rows:
    """Rename labels; labels without a new name keep their own."""
    renamed = tuple(dict.fromkeys(names.get(name, name) for name in found.names))
    return _rename(found, {name: names.get(name, name) for name in found.names}, renamed)


def _rename(found: Rows, new: Mapping[str, str], names: tuple[str, ...]) -> Rows:
    rows = [
        replace(
            row,
            labels=tuple(new[name] for name in row.labels),
            absent=None if row.absent is None else tuple(new[name] for name in row.absent),
        )
        for row in found.rows
    ]
    return Rows(rows, names)

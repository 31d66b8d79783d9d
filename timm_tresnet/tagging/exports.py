"""Exports of annotation tools: Label Studio's JSON, JSON-MIN and CSV, and CVAT's XML for images."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

from timm_tresnet.conversion.reading import shorten_names
from timm_tresnet.utils.images import FORMATS
from timm_tresnet.utils.schema import Kind, Table, find_fault, format_value

# https://labelstud.io/guide/task_format and label_studio_sdk.converter: what a task and an annotation are, and the
# columns that JSON-MIN and CSV add to data and labels
_OBJECTS = Kind(
    "a list of objects", lambda value: isinstance(value, list) and all(isinstance(each, dict) for each in value)
)
_TASK = Table({"data": Table({}), "annotations": _OBJECTS, "completions": _OBJECTS}, ("data",))
_RESULT = Table({"result": _OBJECTS.or_null()})
_ADDED = {"id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement", "history"}
_SURE = {"annotator", "annotation_id", "lead_time"}  # what no table of others has together
_UPLOADED = re.compile(r"[0-9a-f]{8}-")  # before the name of a file that was uploaded to Label Studio
_CHOICES, _TAXONOMY = "choices", "taxonomy"
_SUFFIXES = [suffix for suffixes in FORMATS.values() for suffix in suffixes]  # CVAT's frames of videos have none

Pairs = list[tuple[str, tuple[str, ...]]]  # files and their labels


def is_label_studio(columns: Iterable[str]) -> bool:
    """Whether the columns of a table are those of Label Studio's CSV or TSV."""
    return _SURE <= set(columns)


def read_label_studio(
    entries: Any,
    folder: Path,
    file_column: str | None,
    usual: Sequence[str],
    column: str | None,
    left_out: Counter[str],
) -> Pairs:
    """Read Label Studio's tasks, or the flat entries of JSON-MIN and of a table.

    Labels are choices, taxonomies and those of boxes, polygons and so on. Annotations that were cancelled do not count,
    and a task without any others is left out: an image without labels is one that somebody looked at.

    Args:
        entries: tasks, or flat entries.
        folder: with the images, for addresses whose beginnings are other than here.
        file_column: name of the images' addresses; None for one of the usual ones.
        usual: usual names of these, in small letters.
        column: name of the labels' control; None for the only one.
        left_out: gets a count of tasks that nobody annotated.

    Raises:
        ValueError: if entries are neither; says what is missing, as it stands behind the name of the file.
    """
    fault = find_fault(entries, _OBJECTS)
    if fault:
        raise ValueError(f"{fault}, as Label Studio exports them (JSON or JSON-MIN)")
    are_tasks = any("annotations" in entry or "completions" in entry for entry in entries)
    if not are_tasks and not all(is_label_studio(entry) for entry in entries):
        raise ValueError(
            "is a list that is no export of Label Studio's: neither tasks with annotations (JSON) nor entries with "
            f"{', '.join(sorted(_SURE))} (JSON-MIN)"
        )
    read = _read_tasks(entries) if are_tasks else _read_entries(entries, file_column, usual, column)
    found = [(data, labels) for data, labels in read if labels is not None]
    left_out["tasks that nobody annotated"] += len(entries) - len(found)
    controls = sorted({name for _, labels in found for name in labels if labels[name]})
    if column is None and len(controls) > 1:
        raise ValueError(f"has labels of several controls, {shorten_names(controls)}; name one of them with --column")
    if not controls or (column and column not in controls):
        others = f", but of {shorten_names(controls)}" if controls else ""
        raise ValueError(f"has no labels{f' of {column}' if column else ''}{others}")
    chosen = column or controls[0]
    named = [(_choose_file(data, file_column, usual), labels.get(chosen, ())) for data, labels in found]
    return list(_find_files(named, folder))


# An image's data, and the labels of each control; None if nobody annotated it.
_Found = tuple[dict[str, Any], dict[str, tuple[str, ...]] | None]


def _read_tasks(tasks: Sequence[dict[str, Any]]) -> Iterator[_Found]:
    for index, task in enumerate(tasks):
        fault = find_fault(task, _TASK, f"[{index}]")
        if fault:
            raise ValueError(fault)
        annotations = task.get("annotations", task.get("completions", []))
        done = [each for each in annotations if not each.get("was_cancelled") and not each.get("skipped")]
        of_controls: dict[str, tuple[str, ...]] = {}
        for each in done:
            fault = find_fault(each, _RESULT, f"[{index}].annotations")
            if fault:
                raise ValueError(fault)
            for result in each.get("result") or ():
                labels = _read_value(result.get("value"))
                if labels is not None:
                    name = str(result.get("from_name"))
                    of_controls[name] = (*of_controls.get(name, ()), *labels)
        yield task["data"], of_controls if done else None


def _read_entries(
    entries: Sequence[dict[str, Any]], file_column: str | None, usual: Sequence[str], column: str | None
) -> Iterator[_Found]:
    """Entries of JSON-MIN or of a table, in which the labels of a control are one more column."""
    for index, entry in enumerate(entries):
        data = {name: value for name, value in entry.items() if name not in _ADDED or name == file_column}
        file = _find_column(data, file_column, usual)
        of_controls = {}
        for name in [column] if column else [name for name in data if name != file]:
            labels = _read_value(_parse_cell(entry.get(name)))
            if labels is not None:
                of_controls[name] = labels
            elif column:
                raise ValueError(
                    f"needs [{index}].{name} to hold labels or choices, got {format_value(entry.get(name))}"
                )
        yield data, of_controls if entry["annotation_id"] not in (None, "") else None


def _parse_cell(value: Any) -> Any:
    """What a cell of a table holds: JSON, if it is not the only choice."""
    if isinstance(value, str) and value.startswith(("{", "[")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _read_value(value: Any) -> tuple[str, ...] | None:
    """Labels of a control: one as text, those of an object or of a list of both; None if it has none to give."""
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return (value.strip(),)
    if isinstance(value, list):
        parts = [_read_value(each) for each in value]
        return None if None in parts else tuple(label for part in parts for label in part or ())
    if not isinstance(value, dict):
        return None
    for name, listed in value.items():
        if name == _TAXONOMY and isinstance(listed, list):
            return tuple("/".join(map(str, path)) for path in listed if isinstance(path, list))
        if (name == _CHOICES or name.endswith("labels")) and isinstance(listed, list):
            return tuple(str(label).strip() for label in listed)
    return None


def _find_column(data: dict[str, Any], wanted: str | None, usual: Sequence[str]) -> str | None:
    if wanted:
        return wanted if wanted in data else None
    lower = {name.lower(): name for name in data}
    return next((lower[name] for name in usual if name in lower), None)


def _choose_file(data: dict[str, Any], wanted: str | None, usual: Sequence[str]) -> str:
    name = _find_column(data, wanted, usual)
    if name is None or not isinstance(data[name], str):
        raise ValueError(
            f"needs the addresses of images in {wanted or ' or '.join(usual)}, got {shorten_names(sorted(data))}; "
            "--file-column names another"
        )
    return str(data[name])


def _find_files(named: Pairs, folder: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Replace addresses by names of files in a folder."""
    addresses: dict[str, str] = {}
    for address, labels in named:
        file = find_file(_list_names(address), folder)
        if (folder / file).is_file() and addresses.setdefault(file, address) != address:
            raise ValueError(
                f"has two images, {format_value(addresses[file])} and {format_value(address)}, for one file, {file}; "
                "name the folder that holds both with --images"
            )
        yield file, labels


def _list_names(address: str) -> list[str]:
    """Names that the file of an address may have here: its ends, the longest first; last without what uploading adds.

    Addresses are of the web, of a bucket, or Label Studio's own: /data/upload/PROJECT/1b2c3d4e-NAME and
    /data/local-files/?d=NAME.
    """
    parsed = urlsplit(address)
    local = parse_qs(parsed.query).get("d")
    parts = [part for part in (local[0] if local else unquote(parsed.path)).split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        return [address]
    names = ["/".join(parts[start:]) for start in range(len(parts))]
    uploaded = _UPLOADED.match(parts[-1])
    return [*names, parts[-1][uploaded.end() :]] if uploaded else names


def find_file(names: Sequence[str], folder: Path) -> str:
    """The first of several names that is a file in a folder, perhaps with a suffix added; if none is, the last."""
    full = (name + suffix for suffix in ("", *_SUFFIXES) for name in names if "\0" not in name)
    return next((name for name in full if (folder / name).is_file()), names[-1])


def read_cvat(text: str, folder: Path) -> tuple[Pairs, tuple[str, ...]]:
    """Read CVAT's "CVAT for images 1.1": annotations.xml of a task, a job or a project.

    Labels are those of tags, boxes and other shapes; of skeletons, not those of their points.

    Args:
        text: of the file.
        folder: with the images, perhaps in the folders of CVAT's archive.

    Returns:
        Files and labels, and the names of all labels in their order.

    Raises:
        ValueError: if it is no such file; what is missing in front is its name.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # which can be made to expand without end
        raise ValueError("has a document type, which no export of CVAT's has")
    try:
        root = ElementTree.fromstring(text.encode())
    except ElementTree.ParseError as error:
        raise ValueError(f"is not XML: {error}") from error
    images = root.findall("image")
    if root.tag != "annotations" or not images:
        held = "tracks of a video" if root.find("track") is not None else f"<{root.tag}> without images"
        raise ValueError(f'holds {held}; export "CVAT for images 1.1" from CVAT')
    listed = [label for label in root.iterfind("meta/*/labels/label") if label.find("parent") is None]
    names = [(label.findtext("name") or "").strip() for label in listed]
    pairs = []
    for image in images:
        name, subset = image.get("name"), image.get("subset")
        if not name:
            raise ValueError("needs a name of each image")
        places = [f"images/{subset}/{name}", f"{subset}/{name}"] if subset else []
        labels = (shape.get("label", "").strip() for shape in image)
        pairs.append((find_file([*places, f"images/{name}", name], folder), tuple(filter(None, labels))))
    used = sorted({label for _, labels in pairs for label in labels} - set(names))
    return pairs, tuple(dict.fromkeys([*filter(None, names), *used]))

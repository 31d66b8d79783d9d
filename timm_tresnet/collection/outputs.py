"""Results files that are written batch by batch and can be resumed.

A `.jsonl` or `.csv` file is appended to. With several processes, each process writes a part; a `.parquet` file, which
is unreadable until its footer is written, is first written as parts too. `join_parts` joins the parts. FILE.json,
beside the results, records the settings that produced them.
"""

import contextlib
import csv
import glob
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from timm_tresnet.utils.errors import summarise
from timm_tresnet.utils.extras import how_to_install
from timm_tresnet.utils.files import atomic_write
from timm_tresnet.utils.images import printable
from timm_tresnet.utils.tables import allow_large_cells

try:
    import fcntl
except ImportError:  # Windows; there, concurrent writers are not detected
    fcntl = None  # type: ignore[assignment]

FORMATS = (".jsonl", ".csv", ".parquet")
_COLUMNS = ("image", "labels", "probabilities", "error")
_SEPARATOR = ";"
_ROW_GROUP = 4096  # rows of a .parquet file held in memory at once
_BLOCK = 2**16  # bytes
_MADE_BY = "made_by"  # settings that must be equal when a run is resumed
_Row = dict[str, Any]


class Output:
    """A results file, or this process's part of it.

    Args:
        path: the file; its suffix is one of `FORMATS`.
        made_by: name and JSON value of each setting that the results depend on.
        about: further content of FILE.json.
        resume: continue an existing file.
        process: number of this process, from 0.
        processes: number of processes that write to the file.

    Attributes:
        done: how many results each image already has in the file and its parts.
        errors: how many of those results are errors.

    Raises:
        FileExistsError: if the file exists and resume is not set.
        ValueError: if the suffix is unknown, or the existing file is damaged or was made with other settings.
        OSError: if a file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        made_by: Mapping[str, Any],
        about: Mapping[str, Any] | None = None,
        resume: bool = False,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.path, self._made_by, self._about = path, dict(made_by), dict(about or {})
        self._parts = [self._name_part(number, processes) for number in range(processes)]
        self._is_whole = processes == 1 and path.suffix != ".parquet"
        self._written = path if self._is_whole else self._parts[process]
        self._descriptor = -1
        self.done: Counter[str] = Counter()
        self.errors = 0
        if path.suffix not in FORMATS:
            raise ValueError(f"an output needs to end in one of {', '.join(FORMATS)}, got {printable(path)}")
        if path.suffix == ".parquet":
            _import_pyarrow()
        self._check_there(resume)

    def _name_part(self, number: int, processes: int) -> Path:
        suffix = ".csv" if self.path.suffix == ".csv" else ".jsonl"
        return self.path.with_name(f"{self.path.stem}.{number}-of-{processes}{suffix}")

    @property
    def note(self) -> Path:
        """FILE.json, which records the settings that produced the results."""
        return self.path.with_name(f"{self.path.name}.json")

    def _check_there(self, resume: bool) -> None:
        pattern = f"{glob.escape(self.path.stem)}.*-of-*{self._parts[0].suffix}"
        others = sorted(set(self.path.parent.glob(pattern)) - set(self._parts))
        if others:
            raise ValueError(
                f"{printable(others[0])} was written with another number of processes; resume with that number, or "
                "remove the parts"
            )
        there = [path for path in (self.path, *self._parts) if os.path.lexists(path)]
        if not there and not os.path.lexists(self.note):
            return
        if not resume:
            raise FileExistsError(
                f"{printable([*there, self.note][0])} already exists; continue it with --resume, or name a new file"
            )
        odd = [path for path in there if not path.is_file()]
        if odd:
            raise ValueError(f"{printable(odd[0])} is not a regular file and cannot be resumed")
        try:
            noted = dict(json.loads(self.note.read_text(encoding="utf-8"))[_MADE_BY])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"to resume {printable(self.path)}, its settings file {printable(self.note)} is needed: "
                f"{summarise(error)}"
            ) from error
        differing = [
            f"{name} {json.dumps(noted.get(name))}, now {json.dumps(value)}"
            for name, value in json.loads(json.dumps(self._made_by)).items()
            if noted.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"{printable(self.path)} was made with other settings: {'; '.join(differing)}; name a new file"
            )

    def prepare(self) -> None:
        """Write FILE.json if it is missing, and remove parts that were already joined into the file.

        Such parts are left when a process is killed before it removes them. One process calls this before any process
        opens the file.
        """
        if not self.note.exists():
            with atomic_write(self.note) as unfinished:
                content = {**self._about, _MADE_BY: self._made_by}
                unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        parts = [path for path in self._parts if path.exists() and self.path.exists()]
        joined = Counter(name for name, _ in _read_names(self.path)) if parts else Counter()
        for path in parts:
            with path.open("r+b") as file:
                _lock(file.fileno(), path)
                _cut(file)
                if Counter(name for name, _ in _read_names(path)) <= joined:
                    path.unlink()

    def __enter__(self) -> "Output":
        """Open this process's file or part, cut off an unfinished last line, and read which images are done."""
        self._descriptor = os.open(self._written, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _lock(self._descriptor, self._written)
            with self._written.open("r+b") as file:
                _cut(file)
            header = _format_csv([_COLUMNS]) if self._written.suffix == ".csv" else b""
            if not os.fstat(self._descriptor).st_size and header:
                self._append(header)
            for path in (self.path, *self._parts):
                if path.exists():
                    self._read_done(path)
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def _read_done(self, path: Path) -> None:
        for name, has_error in _read_names(path):
            self.done[name] += 1
            self.errors += has_error

    def make_filter(self) -> Callable[[Path], bool]:
        """Return a function that says of each file in turn whether it is done.

        Where several files have the same printed name, the first ones count as done.
        """
        left = self.done.copy()

        def is_done(path: Path) -> bool:
            if not left:
                return False
            name = printable(path)
            if left[name] < 1:  # reading a Counter adds no key
                return False
            left[name] -= 1
            return True

        return is_done

    def write(self, rows: Sequence[_Row]) -> None:
        """Append results, one a line: all of them or, if writing fails, none.

        Raises:
            OSError: if they cannot be written; a full disk, for example.
        """
        if self._written.suffix == ".csv":
            self._append(_format_csv(map(_to_cells, rows)))
        else:
            self._append("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())

    def _append(self, content: bytes) -> None:
        size = os.fstat(self._descriptor).st_size
        left = memoryview(content)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except BaseException as error:
            os.ftruncate(self._descriptor, size)
            if isinstance(error, OSError):
                raise type(error)(error.errno, error.strerror, str(self._written)) from error
            raise

    def join_parts(self, batch_size: int) -> None:
        """Join all parts into the file and remove them. One process calls this after all have closed their parts.

        Args:
            batch_size: images in a batch; batches were dealt out in turn, so rows end up in the order of the images.

        Raises:
            OSError: if the file cannot be written.
            ValueError: if a part is missing.
        """
        if self._is_whole:
            return
        missing = [path for path in self._parts if not path.exists()]
        if missing:
            raise ValueError(
                f"{printable(missing[0])} is not on this machine, so the parts were not joined; copy all parts to one "
                "machine and run the same command with --resume"
            )
        with contextlib.ExitStack() as stack, atomic_write(self.path) as unfinished:
            files = [stack.enter_context(path.open("rb")) for path in self._parts]
            if self.path.suffix == ".csv":
                for file in files:
                    file.readline()
            lines = _interleave(files, batch_size)
            if self.path.suffix == ".parquet":
                _write_parquet(unfinished, itertools.chain(_read_parquet(self.path), map(json.loads, lines)))
            else:
                with unfinished.open("wb") as joined:
                    earlier = self.path.open("rb") if self.path.exists() else None
                    if earlier:
                        joined.writelines(stack.enter_context(earlier))
                    elif self.path.suffix == ".csv":
                        joined.write(_format_csv([_COLUMNS]))
                    joined.writelines(lines)
        for path in self._parts:
            path.unlink()


def _lock(descriptor: int, path: Path) -> None:
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process writes to {printable(path)}") from error
        except OSError:  # a file system without locks
            pass


def _cut(file: BinaryIO) -> None:
    """Cut off an unfinished last line."""
    size = end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _BLOCK)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        end = start + found + 1
        if found >= 0:
            break
    if end < size:
        file.truncate(end)


def _interleave(files: Sequence[Iterable[bytes]], count: int) -> Iterator[bytes]:
    """Yield count lines of each file in turn until all files end."""
    left = [iter(file) for file in files]
    while left:
        taken = [list(itertools.islice(lines, count)) for lines in left]
        yield from itertools.chain(*taken)
        left = [lines for lines, some in zip(left, taken, strict=True) if some]


def _to_cells(row: _Row) -> list[str]:
    """Cells of a CSV row; `train-tagger` and `validate` read this form."""
    found = row.get("predictions", ())
    labels = [entry["label"] for entry in found]
    if any(_SEPARATOR in label or label.startswith("[") for label in labels):
        joined = json.dumps(labels, ensure_ascii=False)
    else:
        joined = _SEPARATOR.join(labels)
    return [row["image"], joined, _SEPARATOR.join(str(entry["probability"]) for entry in found), row.get("error", "")]


def _format_csv(rows: Iterable[Sequence[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _read_names(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the image name of each result, and whether the result is an error."""
    if path.suffix == ".parquet":
        for row in _read_parquet(path, ["image", "error"]):
            yield row["image"], row["error"] is not None
        return
    with path.open("rb") as file:
        if path.suffix == ".csv":
            file.readline()
            allow_large_cells()
        for number, line in enumerate(file, start=1):
            try:
                if path.suffix == ".csv":
                    ((name, _, _, error),) = csv.reader([line.decode()], strict=True)
                    yield name, bool(error)
                else:
                    row = json.loads(line)
                    yield row["image"], "error" in row
            except (ValueError, KeyError, TypeError, csv.Error) as error:
                raise ValueError(f"{printable(path)} is damaged in row {number}: {summarise(error)}") from error


def _import_pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            f".parquet needs the package {error.name}, which is not installed; {how_to_install('parquet')}"
        ) from error
    return pyarrow


def _read_parquet(path: Path, columns: list[str] | None = None) -> Iterator[_Row]:
    """Yield the rows of a results file; none if the file does not exist."""
    if not path.exists():
        return
    pyarrow = _import_pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROW_GROUP, columns=columns):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{printable(path)} is damaged: {summarise(error)}") from error


def _write_parquet(path: Path, rows: Iterator[_Row]) -> None:
    pyarrow = _import_pyarrow()
    entry = {"label": pyarrow.string(), "index": pyarrow.int32(), "probability": pyarrow.float32()}
    predictions = pyarrow.list_(pyarrow.struct(list(entry.items())))
    schema = pyarrow.schema({"image": pyarrow.string(), "predictions": predictions, "error": pyarrow.string()})
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while group := list(itertools.islice(rows, _ROW_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))

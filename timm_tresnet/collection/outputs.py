"""Files of results that are written batch by batch, and gone on with after a stop.

A `.jsonl` or `.csv` file is written as it goes. Several processes write a part each, and so does one that makes a
`.parquet` file, which is nothing before its end is written; `join_parts` makes one file of them. Beside the file,
FILE.json says what made it.
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
from timm_tresnet.utils.files import whole
from timm_tresnet.utils.images import printable

try:
    import fcntl
except ImportError:  # Windows, where two that write to one file at once are on their own
    fcntl = None  # type: ignore[assignment]

FORMATS = (".jsonl", ".csv", ".parquet")
_COLUMNS = ("image", "labels", "probabilities", "error")
_SEPARATOR = ";"
_ROW_GROUP = 4096  # rows of a .parquet file that are in memory at once
_BLOCK = 2**16  # bytes
_MADE_BY = "made_by"  # what has to be the same for others to be added
_Row = dict[str, Any]


class Output:
    """A file of results, or one of the parts that become it.

    Args:
        path: the file, in one of `FORMATS`.
        made_by: what results depend on, by its name, as JSON has it.
        about: what else FILE.json says.
        resume: go on with what is there.
        process: that this is, of several that write to the same file.
        processes: how many these are.

    Attributes:
        done: how often each image is in the file or a part already.
        errors: how many of these have an error.

    Raises:
        FileExistsError: if the file exists, and resume is not set.
        ValueError: if path is in no format, or what is there was made otherwise, or is damaged.
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
        """The file that says what made this one."""
        return self.path.with_name(f"{self.path.name}.json")

    def _check_there(self, resume: bool) -> None:
        pattern = f"{glob.escape(self.path.stem)}.*-of-*{self._parts[0].suffix}"
        others = sorted(set(self.path.parent.glob(pattern)) - set(self._parts))
        if others:
            raise ValueError(
                f"{printable(others[0])} is there, a part by another number of processes; go on with as many, or "
                "remove the parts"
            )
        there = [path for path in (self.path, *self._parts) if os.path.lexists(path)]
        if not there and not os.path.lexists(self.note):
            return
        if not resume:
            raise FileExistsError(
                f"{printable([*there, self.note][0])} exists already; go on with it by --resume, or name a new file"
            )
        odd = [path for path in there if not path.is_file()]
        if odd:
            raise ValueError(f"{printable(odd[0])} is no file to go on with")
        try:
            noted = dict(json.loads(self.note.read_text(encoding="utf-8"))[_MADE_BY])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{printable(self.note)}, which says what made {printable(self.path)}, is needed to go on with that: "
                f"{summarise(error)}"
            ) from error
        differing = [
            f"{name} {json.dumps(noted.get(name))}, now {json.dumps(value)}"
            for name, value in json.loads(json.dumps(self._made_by)).items()
            if noted.get(name) != value
        ]
        if differing:
            raise ValueError(f"{printable(self.path)} was made otherwise, by {'; '.join(differing)}; name a new file")

    def prepare(self) -> None:
        """Say what makes the file, if nothing does yet: one process, before any of them opens it.

        Parts that are in the file already, since a process was killed before it removed them, are removed.
        """
        if not self.note.exists():
            with whole(self.note) as unfinished:
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
        """Open what this process writes, cut off a line that a killed one has not ended, and read what is done."""
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
        """What says of each file in turn whether it is done; of files that are named alike, the first ones are."""
        left = self.done.copy()

        def is_done(path: Path) -> bool:
            name = printable(path)
            if left[name] < 1:  # which adds nothing to a Counter
                return False
            left[name] -= 1
            return True

        return is_done

    def write(self, rows: Sequence[_Row]) -> None:
        """Add results, a line each, all of them or none.

        Raises:
            OSError: if there is no room for them, say.
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
        """Make one file of all parts, and remove them: one process, when all have left their part.

        Args:
            batch_size: with which files were dealt out, so that rows are in the order of the files.

        Raises:
            OSError: if it cannot be written.
            ValueError: if a part is missing.
        """
        if self._is_whole:
            return
        missing = [path for path in self._parts if not path.exists()]
        if missing:
            raise ValueError(
                f"{printable(missing[0])} is not on this machine, so that the parts stay as they are; bring them "
                "together and run the same command with --resume"
            )
        with contextlib.ExitStack() as stack, whole(self.path) as unfinished:
            files = [stack.enter_context(path.open("rb")) for path in self._parts]
            if self.path.suffix == ".csv":
                for file in files:
                    file.readline()
            lines = _take_turns(files, batch_size)
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
    """Cut off what is behind the last whole line."""
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


def _take_turns(files: Sequence[Iterable[bytes]], count: int) -> Iterator[bytes]:
    """As many lines of each file in turn, until all are at their end."""
    left = [iter(file) for file in files]
    while left:
        taken = [list(itertools.islice(lines, count)) for lines in left]
        yield from itertools.chain(*taken)
        left = [lines for lines, some in zip(left, taken, strict=True) if some]


def _to_cells(row: _Row) -> list[str]:
    """Cells as `train-tagger` and `validate` read them."""
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
    """Names of the images in a file of results, and whether they have errors."""
    if path.suffix == ".parquet":
        for row in _read_parquet(path, ["image", "error"]):
            yield row["image"], row["error"] is not None
        return
    with path.open("rb") as file:
        if path.suffix == ".csv":
            file.readline()
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
    """Rows of a file of results; none if it does not exist."""
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

"""Read files of bounded size; write files and folders atomically."""

import contextlib
import errno
import glob
import os
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows; there, concurrent writers are not kept apart
    fcntl = None  # type: ignore[assignment]

_UNFINISHED = ".partial"
_REPLACED = ".replaced"  # the earlier file or folder, until the new one has its name
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # which come without a file's name when a file is written


def read_bounded(path: Path, max_bytes: int, display_name: str | None = None) -> bytes:
    """Return the content of a regular file of bounded size.

    Args:
        path: the file.
        max_bytes: largest size.
        display_name: name of the file in messages; None for its path.

    Raises:
        OSError: if the file does not exist or may not be read.
        ValueError: if it is too large, or not a regular file. Reading a pipe would block.
    """
    display_name = display_name or str(path)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{display_name} is not a file")
    if status.st_size > max_bytes:
        raise ValueError(f"{display_name} needs to be at most {max_bytes} bytes long, got {status.st_size}")
    with path.open("rb") as file:
        return file.read(max_bytes)


@contextmanager
def atomic_write(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """Write a file or folder under a temporary name; rename it to path when the block ends without an error.

    The temporary name is in a hidden folder beside path, `.NAME-….partial`. At the end of the block, everything in that
    folder is moved beside path, path itself last. If two processes finish together, all files are from one of them.
    A killed process leaves its hidden folder; the next call removes it. A process killed while it replaces a folder, or
    a file with companion files, may leave nothing under the name.

    Args:
        path: the final name.
        overwrite: replace an existing file or folder; an empty folder is always replaced.

    Yields:
        The path to write to. Companion files can be written beside it.

    Raises:
        FileExistsError: if path has come to exist and overwrite is not set; the message names the complete result.
        OSError: if it cannot be written; it names the final file, not the one in the hidden folder.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with _lock_folder(path.parent):
            _remove_leftovers(path)
            try:
                made = tempfile.TemporaryDirectory(
                    dir=path.parent, prefix=f".{path.name}-", suffix=_UNFINISHED, ignore_cleanup_errors=True
                )
            except OSError as error:
                error.filename = str(path)
                raise
            folder = Path(stack.enter_context(made))
            stack.enter_context(_lock_folder(folder))  # marks the folder as in use
        try:
            yield folder / path.name
        except OSError as error:
            if isinstance(error.filename, str):
                error.filename = error.filename.replace(str(folder), str(path.parent))
            elif error.errno in _NO_ROOM:
                error.filename = str(path)
            raise
        with _lock_folder(path.parent), _uninterrupted():
            if not overwrite and path.exists() and not _is_empty_folder(path):
                left = folder.with_suffix(".complete")
                os.replace(folder / path.name, left)
                raise FileExistsError(
                    f"{path} was created meanwhile and is not overwritten; the new result is in {left}"
                )
            _move_entries(folder, path)


def _move_entries(folder: Path, path: Path) -> None:
    """Move a folder's entries beside path, path last; companion files never appear beside an older path."""
    others = [entry for entry in folder.iterdir() if entry.name != path.name]
    replaced = folder / _REPLACED
    if path.is_dir() or (others and path.exists()):
        os.replace(path, replaced)
    try:
        for entry in [*others, folder / path.name]:
            os.replace(entry, path.with_name(entry.name))
    except BaseException:
        if replaced.exists() and not path.exists():
            os.replace(replaced, path)
        raise


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Have Ctrl-C wait for the end, so that of files that belong together all get their place."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is None or threading.current_thread() is not threading.main_thread():  # where it is not Python's to wait
        yield
        return
    came: list[object] = []
    signal.signal(signal.SIGINT, lambda *signalled: came.append(signalled))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def _lock_folder(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock on a folder, at most until the process ends.

    Yields whether the lock is held: False if another process holds it, or the file system has no locks.
    """
    with contextlib.ExitStack() as stack:
        held = False
        with contextlib.suppress(OSError, AttributeError):
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        yield held


def _remove_leftovers(path: Path) -> None:
    """Remove hidden folders of killed processes: those that no process holds a lock on."""
    for left in path.parent.glob(f".{glob.escape(path.name)}-*{_UNFINISHED}"):
        with _lock_folder(left, wait=False) as abandoned:
            if abandoned:
                shutil.rmtree(left, ignore_errors=True)

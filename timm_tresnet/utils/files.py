"""Files and folders that appear whole or not at all."""

import contextlib
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where two that write to one place at once are on their own
    fcntl = None  # type: ignore[assignment]

_UNFINISHED = ".partial"
_REPLACED = ".replaced"  # what had the name before


def read_bounded(path: Path, most: int, called: str | None = None) -> bytes:
    """What a file holds, if it is one, and no larger than it may be.

    Args:
        path: the file.
        most: how many bytes it may have.
        called: how messages name it; None for its path.

    Raises:
        OSError: if there is no such file, or it may not be read.
        ValueError: if it is not a file (a pipe would keep us waiting), or too large.
    """
    called = called or str(path)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{called} is not a file")
    if status.st_size > most:
        raise ValueError(f"{called} needs to be at most {most} bytes long, got {status.st_size}")
    with path.open("rb") as file:
        return file.read(most)


@contextmanager
def whole(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """Have a file or folder written under another name, and renamed to its own when it is complete.

    What is written is in a hidden folder beside path, `.NAME-….partial`. When the block ends without an error, all that
    is in it takes its place beside path, path itself last; until then nothing is there. Of two that end at once, the
    files of one are there. A process that is killed leaves the hidden folder, which the next one removes; if it
    was about to replace a folder, or a file and what belongs to it, nothing may be left under the name.

    Args:
        path: the final name.
        overwrite: replace a file or folder of that name; an empty folder is replaced in any case.

    Yields:
        Where to write. Files that belong to it can be written beside it.

    Raises:
        FileExistsError: if path has come to exist and overwrite is not set; says where the complete one is.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with _alone(path.parent):
            _remove_leftovers(path)
            made = tempfile.TemporaryDirectory(
                dir=path.parent, prefix=f".{path.name}-", suffix=_UNFINISHED, ignore_cleanup_errors=True
            )
            folder = Path(stack.enter_context(made))
            stack.enter_context(_alone(folder))  # while it is used
        yield folder / path.name
        with _alone(path.parent):
            if not overwrite and path.exists() and not _is_empty_folder(path):
                left = folder.with_suffix(".complete")
                os.replace(folder / path.name, left)
                raise FileExistsError(
                    f"{path} came to exist meanwhile and is left as it is; what was made is in {left}"
                )
            _place(folder, path)


def _place(folder: Path, path: Path) -> None:
    """Give what is in a folder its final place; what belongs to path never stands beside another's."""
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
def _alone(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a folder's lock, which ends with the process; False if another has it or the file system has no locks."""
    with contextlib.ExitStack() as stack:
        held = False
        with contextlib.suppress(OSError, AttributeError):
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        yield held


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes have left, which is what nobody holds."""
    for left in path.parent.glob(f".{glob.escape(path.name)}-*{_UNFINISHED}"):
        with _alone(left, wait=False) as abandoned:
            if abandoned:
                shutil.rmtree(left, ignore_errors=True)

"""Turn other packages' exceptions into one-line messages."""

import errno
import os
from typing import Any

from timm_tresnet.utils.terminal import escape

_SHOWN = 600  # characters
_REASONS = {  # messages for errors of the operating system; {} is the file's name
    errno.ENOENT: "there is no {}",
    errno.EACCES: "{} cannot be accessed: permission denied",
    errno.EPERM: "{} cannot be accessed: the operation is not permitted",
    errno.EISDIR: "{} is a folder, a file is needed",
    errno.ENOTDIR: "{} is not a folder, or a parent of it is not",
    errno.EROFS: "{} is on a read-only disk",
    errno.ENOSPC: "the disk is full, no room for {}",
    errno.EDQUOT: "the disk quota is used up, no room for {}",
    errno.EFBIG: "{} would exceed the largest possible file size",
}


def summarise(error: BaseException) -> str:
    """Return an error's message in one line of bounded length.

    The type's name precedes the message, except for types whose messages usually explain themselves.
    """
    text = escape(" ".join((_explain(error) or str(error)).split()))
    if not text or not isinstance(error, ImportError | OSError | RuntimeError | ValueError):
        text = ": ".join(filter(None, (type(error).__name__, text)))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _explain(error: BaseException) -> str | None:
    """Return a sentence in place of "[Errno 2] ..."; None if the error did not come from the operating system."""
    if not isinstance(error, OSError) or error.errno is None or not error.strerror:
        return None
    reason = _REASONS.get(error.errno)
    if error.filename is None:
        return reason.format("the file") if reason else _lower(error.strerror)
    name = _name(error.filename)
    return reason.format(name) if reason else f"{name}: {_lower(error.strerror)}"


def _name(file: Any) -> str:
    from pathlib import Path

    from timm_tresnet.utils.images import printable  # which imports this module

    return "the file" if isinstance(file, int) else printable(Path(os.fsdecode(file)))


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]

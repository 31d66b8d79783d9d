"""What foreign code says when it fails, in our sentences."""

import errno
import os
from typing import Any

from timm_tresnet.utils.terminal import escape

_SHOWN = 600  # characters
_REASONS = {  # of errors of the operating system, with the name of the file
    errno.ENOENT: "there is no {}",
    errno.EACCES: "{} may not be used: permission denied",
    errno.EPERM: "{} may not be used: the operation is not permitted",
    errno.EISDIR: "{} is a folder, where a file is needed",
    errno.ENOTDIR: "{} is no folder, or lies in what is none",
    errno.EROFS: "{} lies on a disk that can only be read",
    errno.ENOSPC: "the disk is full, no room for {}",
    errno.EDQUOT: "the quota of the disk is used up, no room for {}",
    errno.EFBIG: "{} would be larger than files may be",
}


def summarise(error: BaseException) -> str:
    """What an error says, in one line of bounded length; behind its type unless that is one that explains itself."""
    text = escape(" ".join((_explain(error) or str(error)).split()))
    if not text or not isinstance(error, ImportError | OSError | RuntimeError | ValueError):
        text = ": ".join(filter(None, (type(error).__name__, text)))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _explain(error: BaseException) -> str | None:
    """A sentence in place of "[Errno 2] ..."; None for errors that the operating system did not raise."""
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

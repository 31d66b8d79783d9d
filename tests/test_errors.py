import errno

import pytest

from timm_tresnet.utils.errors import summarise


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("needs a\n  number"), "needs a number"),
        (OSError("no such file"), "no such file"),
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError("no \x1b]0;title\x07"), r"no \x1b]0;title\x07"),
        (ValueError(), "ValueError"),
        (AttributeError("  "), "AttributeError"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"), "there is no a/b"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", b"a/\xff"), r"there is no a/\xff"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a cannot be accessed: permission denied"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "a is a folder, a file is needed"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full, no room for the file"),
        (OSError(errno.ENOSPC, "No space left on device", 7), "the disk is full, no room for the file"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "a"), "a: too many levels of symbolic links"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "connection refused"),
        (OSError(errno.EIO, ""), "[Errno 5]"),
    ],
    ids=[
        "lines",
        "explains_itself",
        "type_says_more",
        "terminal",
        "no_text",
        "blank",
        "missing",
        "bytes",
        "permission",
        "folder",
        "full",
        "descriptor",
        "loop",
        "refused",
        "no_words",
    ],
)
def test_error_is_said_in_one_line(error, text):
    assert summarise(error) == text


def test_long_error_is_cut():
    text = summarise(ValueError("x" * 10_000))
    assert len(text) < 700
    assert text.endswith("...")

"""Processes that are killed at a chosen moment: just before their k-th call that changes the file system."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

_CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")


def run_killed(work: Callable[[], object], moment: int) -> bool:
    """Run work in a fork of this process, which is killed before its change number `moment`.

    Changes are calls that open a file to write, make, rename or remove something, as Python's audit hooks report them.

    Returns:
        Whether it was killed; else it came to its end.
    """
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            _kill_at(moment)
            work()
            os._exit(0)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status):
        raise RuntimeError("the work itself failed")
    return os.WIFSIGNALED(status)


def run_in_fork(work: Callable[[], int], output: Path) -> int:
    """Run work in a fork of this process, what it prints going to a file.

    Returns:
        What it returns, as an exit status; 70 where it fails.
    """
    child = os.fork()
    if not child:
        status = 70
        with (
            contextlib.suppress(BaseException),
            open(output, "w") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            status = work()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill_at(moment: int) -> None:
    left = moment

    def watch(event: str, arguments: tuple) -> None:
        nonlocal left
        if event in _CHANGES and (event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)

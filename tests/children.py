"""Children of a process that has imported PyTorch and torchvision, which takes seconds, and that forks for each.

It has imported neither timm nor the client of the Hub, so these read the environment that the child gets.
"""

import multiprocessing
import os
import runpy
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "torchvision"])


def start_child(
    source: str | Path, arguments: Sequence[str], environment: Mapping[str, str], folder: Path, output: Path
) -> BaseProcess:
    """Start code or a script in which no warning may pass, as `python -W error` does.

    Args:
        source: the code, or the path of a script.
        arguments: what is in its sys.argv[1:].
        environment: all variables that it has.
        folder: where it runs.
        output: folder for the files stdout and stderr, with what it printed.

    Returns:
        The process.
    """
    process = _SERVER.Process(target=_run, args=(source, arguments, environment, folder, output))
    process.start()
    return process


def wait_for_all(processes: Sequence[BaseProcess], limit_s: float) -> list[int | None]:
    """Wait for processes that wait for each other: one that fails ends all, and so does the limit.

    Returns:
        Their exit statuses, 0 for success.
    """
    end = time.monotonic() + limit_s
    while running := [process.sentinel for process in processes if process.exitcode is None]:
        wait(running, max(end - time.monotonic(), 0))
        if any(process.exitcode for process in processes) or time.monotonic() > end:
            for process in processes:
                process.kill()
                process.join()
    return [process.exitcode for process in processes]


def _run(
    source: str | Path, arguments: Sequence[str], environment: Mapping[str, str], folder: Path, output: Path
) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    warnings.resetwarnings()
    warnings.simplefilter("error")
    # What PyTorch 2.5 says of a folder that it made.
    warnings.filterwarnings("ignore", "Implicitly cleaning up", ResourceWarning)
    sys.argv = ["-c" if isinstance(source, str) else str(source), *arguments]
    if isinstance(source, str):
        exec(compile(source, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(str(source), run_name="__main__")

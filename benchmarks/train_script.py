"""timm's unchanged train.py, as scripts of this folder run it many times, and the rows that come of it."""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from timm_tresnet.bench.results import write_results


def add_scripts_option(parser: argparse.ArgumentParser) -> None:
    """Add the option for the folder that train.py is in."""
    scripts = os.environ.get("TIMM_SCRIPTS")
    parser.add_argument(
        "--scripts",
        type=Path,
        default=scripts and Path(scripts),
        metavar="FOLDER",
        help="with timm's train.py (default: TIMM_SCRIPTS)",
    )


def check_scripts(parser: argparse.ArgumentParser, settings: argparse.Namespace) -> None:
    """End the process if train.py is not where the option says."""
    if settings.scripts is None or not (settings.scripts / "train.py").is_file():
        parser.error("--scripts needs a folder with timm's train.py, as a clone of its repository has")


def start_command(settings: argparse.Namespace) -> list[str]:
    """How the command begins; -P takes the installed timm, not the copy beside the script."""
    return [sys.executable, "-P", str(settings.scripts / "train.py")]


def run_training(command: Sequence[str]) -> None:
    """Run a command.

    Raises:
        RuntimeError: if it fails; with what it said last.
    """
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with status {process.returncode}:\n{process.stderr[-2000:]}")


def collect(
    rows: Iterable[dict[str, Any]],
    results: dict[str, Any],
    path: Path | None,
    script: str,
    format_table: Callable[[Sequence[dict[str, Any]]], str],
) -> int:
    """Take up rows as they come, print them as a table and write the results, also those that an end leaves.

    Args:
        rows: what is trained while they are asked for.
        results: gets the rows.
        path: file for the results, or None.
        script: its `__file__`.
        format_table: of the script.

    Returns:
        The exit status: 0 if all rows came, 1 after an error, 130 after Ctrl-C.
    """
    status = 0
    try:
        for row in rows:
            results["rows"].append(row)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"{Path(script).name}: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted: these are the networks that were trained to the end", file=sys.stderr)
        status = 130
    if results["rows"]:
        print(format_table(results["rows"]))
        if path:
            write_results(results, path)
    return status

"""Run timm's unchanged train.py many times, and collect rows of results."""

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
    """Add the option for train.py's folder."""
    scripts = os.environ.get("TIMM_SCRIPTS")
    parser.add_argument(
        "--scripts",
        type=Path,
        default=scripts and Path(scripts),
        metavar="FOLDER",
        help="folder with timm's train.py (default: TIMM_SCRIPTS)",
    )


def check_scripts(parser: argparse.ArgumentParser, settings: argparse.Namespace) -> None:
    """End the process if the option's folder has no train.py."""
    if settings.scripts is None or not (settings.scripts / "train.py").is_file():
        parser.error("--scripts needs a folder with timm's train.py, such as a clone of its repository")


def start_command(settings: argparse.Namespace) -> list[str]:
    """Return the start of the command; -P selects the installed timm, not the copy beside the script."""
    return [sys.executable, "-P", str(settings.scripts / "train.py")]


def run_training(command: Sequence[str]) -> None:
    """Run a command.

    Raises:
        RuntimeError: if it fails; the message has the end of its output.
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
    """Collect rows, print them as a table and write the results, even partial ones after an error or Ctrl-C.

    Args:
        rows: iterator that trains the networks and yields their rows.
        results: the results; rows are added.
        path: file for the results, or None.
        script: the script's `__file__`.
        format_table: formats the rows.

    Returns:
        The exit status: 0 if all rows are complete, 1 after an error, 130 after Ctrl-C.
    """
    status = 0
    try:
        for row in rows:
            results["rows"].append(row)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"{Path(script).name}: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted: only networks with finished training are shown", file=sys.stderr)
        status = 130
    if results["rows"]:
        print(format_table(results["rows"]))
        if path:
            write_results(results, path)
    return status

"""Command lines of the scripts in this folder."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from timm_tresnet.bench.comparison import check_options
from timm_tresnet.cli.options import add_comparison_options


def parse_comparison(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Add the options of a comparison to a script's options, parse and check them; a mistake ends the process."""
    add_comparison_options(parser)
    settings = parser.parse_args(words)
    check_or_exit(parser, settings)
    return settings


def check_or_exit(parser: argparse.ArgumentParser, settings: argparse.Namespace) -> None:
    """Check options, see `check_options`; a mistake ends the process."""
    try:
        check_options(settings)
    except ValueError as error:
        parser.error(str(error))


def format_command(script: str, words: Sequence[str]) -> str:
    """Return the command line for the results, from the script's `__file__` and its arguments."""
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *words])

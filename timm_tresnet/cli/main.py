"""The `timm-tresnet` command: classify images, list variants, show a demo, convert, train, export and measure."""

import argparse
import functools
import importlib.metadata
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from timm_tresnet.cli.commands import (
    CommandError,
    benchmark,
    classify,
    convert,
    demo,
    export,
    recipe,
    train,
    train_tagger,
    validate,
)
from timm_tresnet.cli.commands import list as listing
from timm_tresnet.utils.errors import summarise
from timm_tresnet.utils.names import suggest
from timm_tresnet.utils.tables import format_columns
from timm_tresnet.utils.terminal import escape

_COMMANDS = {
    "classify": classify,
    "list": listing,
    "demo": demo,
    "convert": convert,
    "train": train,
    "recipe": recipe,
    "train-tagger": train_tagger,
    "validate": validate,
    "export": export,
    "benchmark": benchmark,
}
_PASSING_ON = {"recipe": "train.py"}  # what is behind -- is meant for that program


class _ShowVersions(argparse.Action):
    """Prints the versions that the report of an error needs; the packages themselves are not imported for it."""

    def __call__(self, parser: argparse.ArgumentParser, *values: object) -> None:
        print(", ".join(map(_name_version, ("timm-tresnet", "timm", "torch"))))
        parser.exit()


def _name_version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:  # timm from a clone, say
        return f"{package} of unknown version"


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line, with an example for each command."""
    examples = [f"timm-tresnet {command.EXAMPLE}" for command in _COMMANDS.values()]
    parser = _make_one(argparse.ArgumentParser, examples, prog="timm-tresnet", description="TResNet models for timm.")
    about: dict[str, Any] = {"nargs": 0, "default": argparse.SUPPRESS, "help": "print the versions and exit"}
    parser.add_argument("--version", action=_ShowVersions, **about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        make = functools.partial(commands.add_parser, name)
        command.add_options(_make_one(make, [f"timm-tresnet {command.EXAMPLE}"], **command.ABOUT))
    return parser


def _make_one(
    make: Callable[..., argparse.ArgumentParser], examples: Sequence[str], description: str, **about: Any
) -> argparse.ArgumentParser:
    width = shutil.get_terminal_size().columns - 2  # as argparse has it
    return make(
        description=textwrap.fill(description, width),
        epilog="\n  ".join(["example:" if len(examples) == 1 else "examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,  # which leaves the lines of the examples as they are
        **about,
    )


def _list_commands() -> str:
    """A line for each command."""
    rows = [[f"  {name}", command.ABOUT["help"]] for name, command in _COMMANDS.items()]
    more = "timm-tresnet COMMAND --help says more, with an example"
    return f"usage: timm-tresnet COMMAND ...\n\n{format_columns(rows)}\n\n{more}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        Exit status: 0 if all went well, 1 if an image or a checkpoint could not be used, 2 for a mistake in the
        arguments.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files and classes can be what it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = make_parser()
    if not words:
        print(_list_commands())
        return 0
    if not words[0].startswith("-") and words[0] not in _COMMANDS:
        known = suggest(words[0], _COMMANDS) or f"; choose from {', '.join(_COMMANDS)}"
        parser.error(f"there is no command {words[0]!r}{known}")
    own = words[: words.index("--")] if words and words[0] in _PASSING_ON and "--" in words else words
    options, unknown = parser.parse_known_args(own)
    if unknown:
        hint = f"; flags of {_PASSING_ON[words[0]]} go behind --" if words[0] in _PASSING_ON else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    arguments = vars(options)
    command = _COMMANDS[arguments.pop("command")]
    try:
        status = command.run(words, **arguments)
        print(end="", flush=True)
    except CommandError as error:
        print(f"timm-tresnet: {escape(str(error), lines=True)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own flush at its end
        return 1
    except OSError as error:  # of a file that a command did not expect to fail
        print(f"timm-tresnet: {summarise(error)}", file=sys.stderr)
        return 2
    return status

"""The `timm-tresnet` command: its parser, and how errors end it."""

import argparse
import errno
import importlib.metadata
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

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
_PASSING_ON = {"recipe": "train.py"}  # command -> program that gets the words after --
_INTERRUPTED = 130  # exit status, as shells have it


class _ShowVersions(argparse.Action):
    """Prints the versions for a bug report, without importing the packages."""

    def __call__(self, parser: argparse.ArgumentParser, *values: object) -> None:
        print(", ".join(map(_name_version, ("timm-tresnet", "timm", "torch"))))
        parser.exit()


def _name_version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:  # timm from a clone, say
        return f"{package} of unknown version"


class _Parser(argparse.ArgumentParser):
    """Begins its help with examples, and ends an error with the next step instead of every option.

    Args:
        examples: command lines that it parses.
        description: of the command.
        **about: further arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, examples: Sequence[str], description: str, **about: Any) -> None:
        width = shutil.get_terminal_size().columns - 2  # as argparse has it
        super().__init__(
            description=textwrap.fill(description, width),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **about,
        )
        self.examples = examples
        self.commands: dict[str, _Parser] = {}

    def format_help(self) -> str:
        title = "example:" if len(self.examples) == 1 else "examples:"
        return "\n  ".join([title, *self.examples]) + "\n\n" + super().format_help()

    def error(self, message: str) -> NoReturn:
        steps = [f"example: {self.examples[0]}"] if len(self.examples) == 1 else []
        steps.append(f"`{self.prog} --help` lists the {'commands' if self.commands else 'options'}")
        self.exit(2, "\n".join([f"{self.prog}: error: {message}", *steps, ""]))


def make_parser() -> _Parser:
    """Parser of the whole command line, with an example for each command."""
    examples = {name: f"timm-tresnet {command.EXAMPLE}" for name, command in _COMMANDS.items()}
    parser = _Parser([*examples.values()], "TResNet models for timm.", prog="timm-tresnet")
    about: dict[str, Any] = {"nargs": 0, "default": argparse.SUPPRESS, "help": "print the versions and exit"}
    parser.add_argument("--version", action=_ShowVersions, **about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        parser.commands[name] = commands.add_parser(name, examples=[examples[name]], **command.ABOUT)
        command.add_options(parser.commands[name])
    return parser


def _list_commands() -> str:
    """A line for each command."""
    rows = [[f"  {name}", command.ABOUT["help"]] for name, command in _COMMANDS.items()]
    more = "`timm-tresnet COMMAND --help` lists the options, with an example"
    return f"usage: timm-tresnet COMMAND ...\n\n{format_columns(rows)}\n\n{more}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        Exit status: 0 if all went well, 1 if an image or a checkpoint could not be used, 2 for a mistake in the
        arguments or a file that cannot be read or written, 130 after Ctrl-C.
    """
    try:
        try:
            return _run_command(sys.argv[1:] if argv is None else list(argv))
        finally:
            print(end="", flush=True)  # here, since what fails at the interpreter's end is a trace
    except CommandError as error:
        print(f"timm-tresnet: {escape(str(error), lines=True)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("timm-tresnet: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has ended, such as `head`
        _discard_output()
        return 1
    except OSError as error:  # of a file that a command did not expect to fail, or of standard output
        _discard_output()
        if error.filename is None and error.errno == errno.ENOSPC:
            error.filename = "standard output"
        print(f"timm-tresnet: {summarise(error)}", file=sys.stderr)
        return 2


def _discard_output() -> None:
    """Discard what standard output does not accept: the interpreter would try again at its end."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run_command(words: list[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # which may be unable to encode a file name
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
        hint = f"; write flags of {_PASSING_ON[words[0]]} after --" if words[0] in _PASSING_ON else ""
        parser.commands[options.command].error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    arguments = vars(options)
    return _COMMANDS[arguments.pop("command")].run(words, **arguments)

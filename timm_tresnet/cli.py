"""The `timm-tresnet` command: classify images, list variants, convert checkpoints, export and measure networks."""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from timm_tresnet.commands import CommandError, benchmark, classify, convert, export
from timm_tresnet.commands import list as listing

_COMMANDS = {"classify": classify, "list": listing, "convert": convert, "export": export, "benchmark": benchmark}


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
    parser = argparse.ArgumentParser(prog="timm-tresnet", description="TResNet models for timm.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in _COMMANDS.items():
        command.add_options(commands.add_parser(name, **command.ABOUT))
    options = vars(parser.parse_args(words))
    command = _COMMANDS[options.pop("command")]
    try:
        status = command.run(words, **options)
        print(end="", flush=True)
    except CommandError as error:
        print(f"timm-tresnet: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own flush at its end
        return 1
    return status

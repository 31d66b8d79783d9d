"""`timm-tresnet demo` opens a page that shows what networks find on photographs, and where."""

import argparse
from collections.abc import Sequence

from timm_tresnet.cli.commands import CommandError
from timm_tresnet.cli.options import add_keep_ratio
from timm_tresnet.utils.errors import summarise
from timm_tresnet.utils.extras import how_to_install

ABOUT = {
    "help": "open a page for trying networks on photographs",
    "description": "Serve a page on this machine: drop a photograph, choose weights, see the classes, a heat map and "
    "the time, side by side with other weights. Works offline with the models in the package; others are downloaded "
    "once they are chosen. Needs the extra `demo`.",
}
EXAMPLE = "demo --port 7860"
_LOOPBACK = "127.0.0.1"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        dest="models",
        help="weights to choose from, as --model of `timm-tresnet classify`; may be repeated (default: those in the "
        "package and on the Hub)",
    )
    parser.add_argument(
        "--host", default=_LOOPBACK, help="address to listen at (default: %(default)s, which only this machine reaches)"
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    add_keep_ratio(parser)


def run(words: Sequence[str], *, models: Sequence[str] | None, host: str, port: int | None, keep_ratio: bool) -> int:
    """Serve the page until it is interrupted."""
    try:
        from timm_tresnet.demo.page import build_demo, list_weights, serve_demo
    except ImportError as error:
        raise CommandError(f"demo needs further packages ({error}); {how_to_install('demo')}") from error
    embedded, on_hub = list_weights()
    beside = models[1] if models and len(models) > 1 else None
    try:
        serve_demo(build_demo(models or [*embedded, *on_hub], beside, keep_ratio), host, port)
    except OSError as error:  # no such address, or no free port
        raise CommandError(f"cannot serve the demo: {summarise(error)}") from error
    return 0

"""The commands of `timm-tresnet`, a module each.

A command has ABOUT, what its parser says of it; EXAMPLE, what can be typed behind `timm-tresnet`;
`add_options(parser)`; and `run(words, **options)`, which gets the words of the whole command line and the options by
name, and returns the exit status.
"""

import sys
from typing import Any


class CommandError(Exception):
    """Says what keeps a command from running; ends it with exit status 2."""


def warn_of_assumed(network: Any) -> None:
    """Say on standard error what is assumed about a network's images, if anything is."""
    from timm_tresnet.weights.preprocessing import explain_assumed

    explained = explain_assumed(network)
    if explained:
        print(f"timm-tresnet: {explained}", file=sys.stderr)


def require_channels(network: Any, name: str) -> None:
    """Refuse a network that takes other images than files hold.

    Raises:
        CommandError: if it takes neither grey nor RGB images.
    """
    from timm_tresnet.utils.images import CHANNELS

    if network.in_chans not in CHANNELS:
        some = " or ".join(map(str, CHANNELS))
        raise CommandError(f"{name} takes {network.in_chans} channels, images are read in {some}")


def load_model(name: str) -> Any:
    """A TResNet with its weights, in eval mode, by a name as `timm_tresnet.weights.loading.load_network` takes it."""
    from timm_tresnet.weights.loading import load_network

    try:
        return load_network(name)
    except ValueError as error:
        raise CommandError(str(error)) from error

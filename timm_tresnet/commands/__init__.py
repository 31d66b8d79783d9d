"""The commands of `timm-tresnet`, a module each.

A command has ABOUT, what its parser says of it; `add_options(parser)`; and `run(words, **options)`, which gets the
words of the whole command line and the options by name, and returns the exit status.
"""

from typing import Any


class CommandError(Exception):
    """Says what keeps a command from running; ends it with exit status 2."""


def load_model(name: str) -> Any:
    """A model with its weights, in eval mode, from a name for `timm.create_model`."""
    import timm
    from safetensors import SafetensorError

    try:
        return timm.create_model(name, pretrained=True).eval()
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:  # unknown, unreachable or damaged
        raise CommandError(f"cannot load the model {name}: {error}") from error

"""What foreign code says when it fails, in our sentences."""

_SHOWN = 600  # characters


def summarise(error: BaseException) -> str:
    """What an error says, in one line of bounded length; behind its type unless that is one that explains itself."""
    text = " ".join(str(error).split())
    if not text or not isinstance(error, OSError | RuntimeError | ValueError):
        text = ": ".join(filter(None, (type(error).__name__, text)))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

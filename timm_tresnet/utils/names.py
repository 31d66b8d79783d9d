"""Names that were typed, and those that were meant."""

import difflib
from collections.abc import Iterable


def suggest(typed: str, known: Iterable[str], most: int = 1) -> str:
    """A question about the closest names, to be put behind a sentence; "" if none is close."""
    close = difflib.get_close_matches(typed.lower(), list(known), n=most)
    if not close:
        return ""
    *others, last = close
    return f"; did you mean {', '.join(others)} or {last}?" if others else f"; did you mean {last}?"

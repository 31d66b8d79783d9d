"""Suggest the known names closest to a mistyped one."""

import difflib
from collections.abc import Iterable


def suggest(typed: str, known: Iterable[str], limit: int = 1) -> str:
    """Return "; did you mean ...?" with the closest names, to append to a message; "" if none is close."""
    close = difflib.get_close_matches(typed.lower(), list(known), n=limit)
    if not close:
        return ""
    *others, last = close
    return f"; did you mean {', '.join(others)} or {last}?" if others else f"; did you mean {last}?"

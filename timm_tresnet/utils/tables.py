"""Tables in text, whose rows may end early; no line end behind them."""

import itertools
import math
from collections.abc import Sequence

_EIGHTHS = " ▏▎▍▌▋▊▉█"  # of a character, filled from the left


def format_markdown(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *([*row, *[""] * (len(titles) - len(row))] for row in rows)]
    cells = ([" ".join(str(cell).splitlines()).replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def format_columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows with their columns aligned."""
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    )


def format_bar(share: float, width: int, encoding: str | None = None) -> str:
    """A bar as long as a share of width characters.

    Args:
        share: from 0 to 1.
        width: of the whole, in characters.
        encoding: what the bar has to be written in; where that has no block characters, it is of "#". None: any.

    Returns:
        At most width characters; what is more than nothing is shown.
    """
    eighths = math.ceil(share * width * 8)
    whole, rest = divmod(eighths, 8)
    try:
        _EIGHTHS.encode(encoding or "utf-8")
    except (LookupError, UnicodeEncodeError):
        return "#" * math.ceil(eighths / 8)
    return _EIGHTHS[8] * whole + (_EIGHTHS[rest] if rest else "")

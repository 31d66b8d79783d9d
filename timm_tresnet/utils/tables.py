"""Text tables. Rows may have fewer cells than there are columns; the text has no final newline."""

import csv
import itertools
import math
from collections.abc import Sequence

_EIGHTHS = " ▏▎▍▌▋▊▉█"  # characters filled from the left by 0 to 8 eighths

_LARGEST_CELL = 2**31 - 1  # characters; Python's default, 131072, is less than the labels of ImageNet-21K together


def allow_large_cells() -> None:
    """Let Python's csv module read cells of any length."""
    csv.field_size_limit(_LARGEST_CELL)


def format_markdown(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [titles, ["---"] * len(titles), *([*row, *[""] * (len(titles) - len(row))] for row in rows)]
    cells = ([" ".join(str(cell).splitlines()).replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def format_columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows with aligned columns."""
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    )


def format_bar(share: float, width: int, encoding: str | None = None) -> str:
    """Return a bar whose length shows a share.

    Args:
        share: from 0 to 1.
        width: length of a full bar, in characters.
        encoding: encoding of the output; "#" is used if it has no block characters. None for UTF-8.

    Returns:
        At most width characters; a share above 0 gives at least one.
    """
    eighths = math.ceil(share * width * 8)
    whole, rest = divmod(eighths, 8)
    try:
        _EIGHTHS.encode(encoding or "utf-8")
    except (LookupError, UnicodeEncodeError):
        return "#" * math.ceil(eighths / 8)
    return _EIGHTHS[8] * whole + (_EIGHTHS[rest] if rest else "")

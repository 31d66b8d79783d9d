"""Tables in text."""

import itertools
from collections.abc import Sequence


def format_markdown(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown, without a line end behind it."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def format_columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows, which may end early, with their columns aligned."""
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    )

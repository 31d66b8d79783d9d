"""Tags of an image in a text file beside it, as trainers of diffusion models take them."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_WORD = re.compile(r"[^\W_]{2}")  # what emoticons such as ^_^ and o_o lack


@dataclass(frozen=True)
class Sidecars:
    """Writes photo.txt beside photo.jpg.

    Args:
        replace_underscores: write spaces for underscores, but in emoticons.
        escape_parentheses: write a backslash before parentheses, which user interfaces take for weights otherwise.
        prefix: what comes before the tags, as if it were one of them.
        overwrite: replace files that are there already.
    """

    replace_underscores: bool = False
    escape_parentheses: bool = False
    prefix: str = ""
    overwrite: bool = False

    def is_done(self, image: Path) -> bool:
        """Whether nothing is to be written for an image."""
        return not self.overwrite and os.path.lexists(image.with_suffix(".txt"))

    def write(self, image: Path, tags: Iterable[str]) -> bool:
        """Write a file whole or not at all.

        Returns:
            False if one is there already and stays as it is.

        Raises:
            OSError: if it cannot be written.
        """
        path = image.with_suffix(".txt")
        unfinished = path.with_name(f".{path.name}.partial")
        unfinished.unlink(missing_ok=True)  # what a killed process has left, or a link that leads elsewhere
        if self.is_done(image):
            return False
        try:
            with unfinished.open("x", encoding="utf-8") as file:
                file.write(self.format(tags) + "\n")
            return self._place(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def _place(self, unfinished: Path, path: Path) -> bool:
        if not self.overwrite:
            try:
                os.link(unfinished, path)  # unlike a renamed file, never takes the place of one that has come to exist
                return True
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                if os.path.lexists(path):
                    return False
        os.replace(unfinished, path)
        return True

    def format(self, tags: Iterable[str]) -> str:
        """Tags with commas between them."""
        first = [self.prefix.rstrip(", ")] if self.prefix.rstrip(", ") else []
        return ", ".join([*first, *map(self._format_tag, tags)])

    def _format_tag(self, tag: str) -> str:
        if self.replace_underscores and _WORD.search(tag):
            tag = tag.replace("_", " ")
        return re.sub(r"([()])", r"\\\1", tag) if self.escape_parentheses else tag

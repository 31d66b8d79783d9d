"""Tags in a text file beside each image, the format that trainers of diffusion models read."""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_LONGEST_NAME = 255  # bytes, of a file in most file systems
_WORD = re.compile(r"[^\W_]{2}")  # two letters or digits in a row; emoticons such as ^_^ and o_o have none


@dataclass(frozen=True)
class Sidecars:
    """Writes photo.txt beside photo.jpg.

    Args:
        replace_underscores: write spaces for underscores, except in emoticons.
        escape_parentheses: write a backslash before parentheses, which prompts otherwise read as emphasis.
        prefix: text before the tags, separated like a tag.
        overwrite: replace existing text files.
    """

    replace_underscores: bool = False
    escape_parentheses: bool = False
    prefix: str = ""
    overwrite: bool = False

    def is_done(self, image: Path) -> bool:
        """Whether the image's text file exists and is not to be overwritten."""
        return not self.overwrite and os.path.lexists(image.with_suffix(".txt"))

    def write(self, image: Path, tags: Iterable[str]) -> bool:
        """Write the image's text file, complete or not at all.

        Returns:
            Whether the file was written; False if it exists and is not to be overwritten.

        Raises:
            OSError: if the file cannot be written.
        """
        path = image.with_suffix(".txt")
        unfinished = path.with_name(_name_unfinished(path.name))
        unfinished.unlink(missing_ok=True)  # left by a killed process, or a link to another place
        if self.is_done(image):
            return False
        try:
            with unfinished.open("x", encoding="utf-8") as file:
                file.write(self.format(tags) + "\n")
            return self._rename(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def _rename(self, unfinished: Path, path: Path) -> bool:
        if not self.overwrite:
            try:
                os.link(unfinished, path)  # unlike a rename, fails if the file has come to exist
                return True
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                if os.path.lexists(path):
                    return False
        os.replace(unfinished, path)
        return True

    def format(self, tags: Iterable[str]) -> str:
        """Return the prefix and the tags, separated by commas."""
        first = [self.prefix.rstrip(", ")] if self.prefix.rstrip(", ") else []
        return ", ".join([*first, *map(self._format_tag, tags)])

    def _format_tag(self, tag: str) -> str:
        if self.replace_underscores and _WORD.search(tag):
            tag = tag.replace("_", " ")
        return re.sub(r"([()])", r"\\\1", tag) if self.escape_parentheses else tag


def _name_unfinished(name: str) -> str:
    """Return the name of a file until it is complete: always the same, so that the next process removes a leftover."""
    unfinished = f".{name}.partial"
    if len(os.fsencode(unfinished)) <= _LONGEST_NAME:
        return unfinished
    return f".{hashlib.sha256(os.fsencode(name)).hexdigest()}.partial"

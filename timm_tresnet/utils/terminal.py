"""What a terminal is shown of strangers' text: names of tensors, labels and files, and what errors quote of them."""

import unicodedata

_OBEYED = {"Cc", "Cs", "Zl", "Zp"}  # control characters, halves of surrogate pairs, separators of lines and paragraphs
_TURNING = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}  # change the order in which others are shown


def escape(text: str, lines: bool = False) -> str:
    r"""Text in which what a terminal obeys is written as Python writes it, such as `\\x1b`.

    Args:
        text: of anybody.
        lines: whether line ends stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        each.encode("unicode_escape").decode() if _is_obeyed(each) and not (lines and each == "\n") else each
        for each in text
    )


def _is_obeyed(character: str) -> bool:
    return unicodedata.category(character) in _OBEYED or unicodedata.bidirectional(character) in _TURNING

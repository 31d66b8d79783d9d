"""Escape untrusted text for terminals: names of tensors, labels and files, and error messages that quote them."""

import unicodedata

_OBEYED = {"Cc", "Cs", "Zl", "Zp"}  # control characters, halves of surrogate pairs, separators of lines and paragraphs
_TURNING = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}  # change the display order of text


def escape(text: str, lines: bool = False) -> str:
    r"""Return text with control characters as Python escapes, such as `\\x1b`.

    Args:
        text: untrusted text.
        lines: whether newlines stay as they are.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        each.encode("unicode_escape").decode() if _is_obeyed(each) and not (lines and each == "\n") else each
        for each in text
    )


def _is_obeyed(character: str) -> bool:
    return unicodedata.category(character) in _OBEYED or unicodedata.bidirectional(character) in _TURNING

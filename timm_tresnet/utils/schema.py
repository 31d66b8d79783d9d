"""Read a JSON file and check it against a table of value kinds, before anything uses it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_tresnet.utils.files import read_bounded
from timm_tresnet.utils.terminal import escape

LARGEST_FILE = 2**26  # bytes; names and descriptions of ImageNet-21k's classes are 2**21
_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Args:
        description: description of the kind; in messages it follows "to be".
        fits: whether a value from a JSON file is of this kind.
    """

    description: str
    fits: Callable[[Any], bool]

    def or_null(self) -> "Kind":
        """This kind, or null."""
        return Kind(f"{self.description} or null", lambda value: value is None or self.fits(value))

    def or_else(self, other: "Kind") -> "Kind":
        """This kind or another."""
        return Kind(f"{self.description} or {other.description}", lambda value: self.fits(value) or other.fits(value))


@dataclass(frozen=True)
class Table:
    """A JSON object.

    Args:
        fields: the kind of each field by name; a field can be a table itself.
        required: names of the required fields.
        unknown_reason: why other names are refused; in messages it follows the name and a comma. None to allow them.
    """

    fields: Mapping[str, "Kind | Table"]
    required: tuple[str, ...] = ()
    unknown_reason: str | None = None


def format_value(value: Any) -> str:
    """Return a value as JSON, shortened for a message."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple) and any(isinstance(each, dict | list) for each in value):
        return f"a list of {len(value)}"
    shown = json.dumps(value, default=lambda each: type(each).__name__)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def integer(minimum: int, maximum: int) -> Kind:
    """Integers from minimum to maximum."""
    return Kind(
        f"an integer from {minimum} to {maximum}", lambda value: type(value) is int and minimum <= value <= maximum
    )


def number(minimum: float, maximum: float, above: bool = False) -> Kind:
    """Finite numbers from minimum to maximum; if above is set, without minimum itself."""
    words = f"a number above {minimum} and up to {maximum}" if above else f"a number from {minimum} to {maximum}"
    return Kind(
        words,
        lambda value: type(value) in (int, float) and minimum <= value <= maximum and not (above and value == minimum),
    )


def choice(*choices: str | int | bool | None) -> Kind:
    """One of the given values; the type must match too, so 1 is not true."""
    words = ", ".join(map(format_value, choices))
    return Kind(
        f"one of {words}" if len(choices) > 1 else words,
        lambda value: any(type(value) is type(each) and value == each for each in choices),
    )


def list_of(kind: Kind, minimum: int, maximum: int) -> Kind:
    """Lists with minimum to maximum entries, each of a kind."""
    count = f"{minimum}" if minimum == maximum else f"{minimum} to {maximum}"
    return Kind(
        f"a list of {count}, each {kind.description}",
        lambda value: (
            isinstance(value, list | tuple) and minimum <= len(value) <= maximum and all(map(kind.fits, value))
        ),
    )


def map_of(kind: Kind) -> Kind:
    """Objects whose values are all of a kind."""
    return Kind(
        f"an object, each value {kind.description}",
        lambda value: isinstance(value, dict) and all(TEXT.fits(key) and kind.fits(value[key]) for key in value),
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and escape(value) == value


TEXT = Kind("text without control characters", _is_text)
FLAG = choice(True, False)


def find_fault(value: Any, kind: Kind | Table, name: str = "") -> str | None:
    """Return what is wrong with a value; None if it is valid. The message follows the name of the file.

    Args:
        value: content of the file, or a part of it.
        kind: the kind that it must have.
        name: name of that part; "" for the whole content.
    """
    if isinstance(kind, Kind):
        return (
            None
            if kind.fits(value)
            else f"needs {name or 'its content'} to be {kind.description}, got {format_value(value)}"
        )
    if not isinstance(value, dict):
        return f"needs {name or 'its content'} to be an object, got {format_value(value)}"
    prefix = f"{name}." if name else ""
    missing = [each for each in kind.required if each not in value]
    if missing:
        return f"needs {prefix}{missing[0]}, which is missing"
    for each, part in value.items():
        if each in kind.fields:
            fault = find_fault(part, kind.fields[each], prefix + each)
        else:
            fault = kind.unknown_reason and f"has {format_value(prefix + each)}, {kind.unknown_reason}"
        if fault:
            return fault
    return None


def read_json(path: Path, display_name: str | None = None) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        display_name: name of the file in messages; None for its path.

    Returns:
        The decoded content.

    Raises:
        OSError: if the file does not exist or may not be read.
        ValueError: if it is not a regular file, too large, or not JSON in UTF-8.
    """
    content = read_bounded(path, LARGEST_FILE, display_name)
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{display_name or path} is not JSON: {error}") from error

"""Facts that this package stores in the `notes` of timm's pretrained config.

The config's fields are fixed. Only `notes` reaches `model.pretrained_cfg` from the registry, the Hub and from folders.
"""

from collections.abc import Mapping
from typing import Any

MULTI_LABEL = "multi-label"
THRESHOLDS = "thresholds: "  # then a JSON list with one for each label, or one number for all
NAMED_BY = "class names: "  # then the source of the class names
ASSUMED = "assumed: "  # then the names of assumed preprocessing fields


def read_notes(pretrained_cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the notes of a pretrained config; the field can be a sequence, one string or None."""
    notes = pretrained_cfg.get("notes") or ()
    return (notes,) if isinstance(notes, str) else tuple(notes)


def drop_notes(pretrained_cfg: Mapping[str, Any], *beginnings: str) -> tuple[str, ...] | None:
    """Return the notes of a pretrained config without those with one of the prefixes; None if no note remains."""
    return tuple(note for note in read_notes(pretrained_cfg) if not note.startswith(beginnings)) or None

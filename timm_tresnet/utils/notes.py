"""What this package says in the notes of timm's pretrained config.

The config's fields are fixed, and only the notes reach `model.pretrained_cfg` from the registry, the Hub and a folder
alike.
"""

from collections.abc import Mapping
from typing import Any

MULTI_LABEL = "multi-label"
THRESHOLDS = "thresholds: "  # before a JSON list with one for each label, or one for all
NAMED_BY = "class names: "  # before where the names of the classes are from
ASSUMED = "assumed: "  # before the names of fields of the preprocessing


def read_notes(pretrained_cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes of a pretrained config, which may also be one text or None."""
    notes = pretrained_cfg.get("notes") or ()
    return (notes,) if isinstance(notes, str) else tuple(notes)


def drop_notes(pretrained_cfg: Mapping[str, Any], *beginnings: str) -> tuple[str, ...] | None:
    """Notes of a pretrained config without those that begin so; None if none is left."""
    return tuple(note for note in read_notes(pretrained_cfg) if not note.startswith(beginnings)) or None

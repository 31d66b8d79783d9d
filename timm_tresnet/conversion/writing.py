"""Write a folder of converted weights atomically."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save

from timm_tresnet.conversion.card import make_card
from timm_tresnet.conversion.description import Conversion
from timm_tresnet.conversion.reading import shorten_names
from timm_tresnet.utils.files import atomic_write
from timm_tresnet.weights.config import check_config

_FILES = ("model.safetensors", "config.json", "README.md")


def write_folder(
    conversion: Conversion,
    folder: str | Path,
    *,
    overwrite: bool = False,
    repo_id: str | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write model.safetensors, config.json and README.md: all of them or none.

    They are written to a hidden folder beside the final one, which is then renamed, see
    `timm_tresnet.utils.files.atomic_write`.

    Args:
        conversion: the converted checkpoint.
        folder: the folder to write; must be missing or empty.
        overwrite: replace the folder of an earlier conversion.
        repo_id: Hub repository to name in the model card, OWNER/NAME.
        check: called with the hidden folder before it is renamed; raises to reject it.

    Raises:
        FileExistsError: if the folder is not empty and overwrite is not set, or it has other files than a conversion's.
        OSError: if a file cannot be written.
        ValueError: if loading would refuse config.json; the message names the field.
    """
    config = _config(conversion)
    check_config(config)
    folder = Path(folder).absolute()
    check_free(folder, overwrite)
    with atomic_write(folder, overwrite) as partial:
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(save(conversion.state_dict, metadata={"format": "pt"}))
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (partial / "config.json").write_text(text + "\n", encoding="utf-8")
        card = make_card(conversion.facts, conversion.architecture, conversion.num_classes, repo_id)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if check is not None:
            check(partial)
        check_free(folder, overwrite)  # again, since writing took a while


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that must not be overwritten.

    Raises:
        FileExistsError: if the folder is not empty and overwrite is not set, or it has other files than a conversion's.
    """
    if not folder.exists():
        return
    held = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else None
    if held is None:
        raise FileExistsError(f"{folder} is a file; name a folder to write to")
    if held and not overwrite:
        raise FileExistsError(f"{folder} has {shorten_names(held)}; name another folder, or overwrite it")
    foreign = [name for name in held if name not in _FILES]
    if foreign:
        raise FileExistsError(f"{folder} has {shorten_names(foreign)}, which are not overwritten; name another folder")


def _config(conversion: Conversion) -> dict[str, Any]:
    """Return config.json in timm's form."""
    config: dict[str, Any] = {"architecture": conversion.architecture, "num_classes": conversion.num_classes}
    if conversion.model_args:
        config["model_args"] = conversion.model_args
    return config | {"pretrained_cfg": conversion.pretrained_cfg} | conversion.labels

"""A folder of converted weights, all or nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save

from timm_tresnet.conversion.card import make_card
from timm_tresnet.conversion.description import Conversion
from timm_tresnet.conversion.reading import name_some
from timm_tresnet.utils.files import whole
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
    """Write model.safetensors, config.json and README.md, all or nothing.

    They are written into a hidden folder beside the final one, which is then renamed, as
    `timm_tresnet.utils.files.whole` does.

    Args:
        conversion: what to write.
        folder: where to; must not exist or be empty.
        overwrite: replace a folder that holds an earlier conversion.
        repo_id: Hub repository that the model card is to name.
        check: is called with the hidden folder before it is renamed, and raises if it is not good enough.

    Raises:
        FileExistsError: if the folder holds something and overwrite is not set, or something that is no conversion.
        OSError: if it cannot be written.
        ValueError: if config.json would be one that is refused when it is loaded; names the field.
    """
    config = _config(conversion)
    check_config(config)
    folder = Path(folder).absolute()
    check_free(folder, overwrite)
    with whole(folder, overwrite) as partial:
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(save(conversion.state_dict, metadata={"format": "pt"}))
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (partial / "config.json").write_text(text + "\n", encoding="utf-8")
        card = make_card(conversion.facts, conversion.architecture, conversion.num_classes, repo_id)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if check is not None:
            check(partial)
        check_free(folder, overwrite)  # again: this took a while


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that must not be written.

    Raises:
        FileExistsError: if it holds something and overwrite is not set, or something that no conversion writes.
    """
    if not folder.exists():
        return
    held = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else None
    if held is None:
        raise FileExistsError(f"{folder} is a file; name a folder to write to")
    if held and not overwrite:
        raise FileExistsError(f"{folder} holds {name_some(held)}; name another folder, or overwrite it")
    foreign = [name for name in held if name not in _FILES]
    if foreign:
        raise FileExistsError(f"{folder} holds {name_some(foreign)}, which no conversion writes; name another folder")


def _config(conversion: Conversion) -> dict[str, Any]:
    """config.json as timm reads it."""
    config: dict[str, Any] = {"architecture": conversion.architecture, "num_classes": conversion.num_classes}
    if conversion.model_args:
        config["model_args"] = conversion.model_args
    return config | {"pretrained_cfg": conversion.pretrained_cfg} | conversion.labels

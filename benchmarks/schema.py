"""Fields of the files in results/, and a reader that checks them."""

import json
from pathlib import Path
from typing import Any

_COMMON = {"command", "date", "hardware", "versions", "settings", "rows"}
_COMPARISON = {
    *("row", "image_size", "params_m", "gmacs", "activations_m", "kept_mb", "largest_batch", "largest_batch_how"),
    *("train_images_per_s", "train_ratios", "inference_images_per_s", "inference_ratios"),
}
ROW_FIELDS = {  # script -> required fields of each row
    "ablation": _COMPARISON,
    "ablation_accuracy": {"row", "seed", "top1", "epochs"},
    "collection": {"row", "files", "images", "seconds", "cpu_s", "ratios", "cpu_ratios", "agreement", "difference"},
    "fewer_bytes": {"row", "mode", "ms", "other_ms", "ratios", "apart"},
    "inference": {"row", "batch_size", "precision", "images_per_s", "ratios"},
    "int8_accuracy": {"row", "top1", "agreement", "images"},
    "launches": {"row", "step_ms", "step_ratio", "forward_ms", "backward_ms"},
    "on_gpu": {"row", "step", "kind", "seconds"},
    "paper_tables": _COMPARISON | {"top1", "top1_source"},
    "resolution": _COMPARISON,
    "tagging": {"row", "seed", "mAP", "CF1", "OF1", "epochs"},
    "training_memory": {"row", "kept_mb", "kept_ratio", "peak_mb", "peak_ratio"},
    "transfer": {"row", "data", "images_per_class", "seed", "lr", "epochs", "top1", "top1_last", "images"},
}


def script_of(results: dict[str, Any]) -> str:
    """Return the name of the script that made results, from their command."""
    return Path(results["command"].split()[1]).stem


def load_results(path: Path) -> dict[str, Any]:
    """Read a file of results.

    Args:
        path: a file that a script of this folder wrote with `--json`.

    Raises:
        ValueError: if it is not JSON, not from a script of this folder, or lacks fields; the message names them.
    """
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(results, dict):
        raise ValueError(f"{path} needs an object with {', '.join(sorted(_COMMON))}, got {type(results).__name__}")
    _check(path, "the results", results, _COMMON)
    script = script_of(results) if len(str(results["command"]).split()) > 1 else ""
    if script not in ROW_FIELDS:
        raise ValueError(
            f"{path} needs results of {', '.join(sorted(ROW_FIELDS))}; its command is {results['command']!r}"
        )
    for number, row in enumerate(results["rows"]):
        _check(path, f"row {number}", row, ROW_FIELDS[script])
    return results


def _check(path: Path, where: str, values: dict[str, Any], fields: set[str]) -> None:
    missing = sorted(fields - values.keys())
    if missing:
        raise ValueError(f"{path}: {where} lacks {', '.join(missing)}; make the file again with its script")

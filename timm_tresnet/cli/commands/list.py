"""`timm-tresnet list` shows the variants and their weights."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from timm_tresnet.utils.tables import format_columns

ABOUT = {
    "help": "list the variants and their weights",
    "description": "List the variants and their weights: size, input, accuracy, and where the weights are.",
}
EXAMPLE = "list --json"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")


def run(words: Sequence[str], *, as_json: bool) -> int:
    """Print a line for every variant and weight tag."""
    rows = describe_weights()
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    header = ["model", "params (M)", "GMACs", "input", "ImageNet top-1", "weights"]
    table = [
        [
            row["model"],
            f"{row['params_m']:.2f}",
            f"{row['gmacs']:.2f}",
            "x".join(map(str, row["input_size"][1:])),
            "" if row["imagenet_top1"] is None else f"{row['imagenet_top1']:.2f}",
            row["weights"],
        ]
        for row in rows
    ]
    print(format_columns([header, *table]))
    return 0


def describe_weights() -> list[dict[str, Any]]:
    """Describe every variant and weight tag of the plugin; imports neither PyTorch nor timm.

    Returns:
        For each a dict with "model" (variant.tag), "params_m" (millions), "gmacs" (billions of multiply-adds for one
        image of "input_size", (C, H, W)), "num_classes", "imagenet_top1" (percent; None where unknown) and "weights":
        "in the package", "cached", "on the Hub: ORG/NAME", "to convert from FILE" or "none".
    """
    from timm_tresnet.bench.sizes import count_size
    from timm_tresnet.variants import ARCHITECTURES, IMAGENET_TOP1, WEIGHTS, name_weights
    from timm_tresnet.weights.catalogue import load_catalogue

    catalogue = load_catalogue()
    rows = []
    for name in name_weights():
        config = WEIGHTS[name]
        public = catalogue.get(name)
        arguments = {**ARCHITECTURES[name.partition(".")[0]], **(public.network_arguments if public else {})}
        in_chans, image_size, _ = config["input_size"]
        params, macs = count_size(arguments, image_size, config["num_classes"], in_chans)
        rows.append(
            {
                "model": name,
                "params_m": params / 1e6,
                "gmacs": macs / 1e9,
                "input_size": config["input_size"],
                "num_classes": config["num_classes"],
                "imagenet_top1": IMAGENET_TOP1.get(name),
                "weights": _locate_weights(name, config, public),
            }
        )
    return rows


def _locate_weights(name: str, config: dict[str, Any], public: Any) -> str:
    from huggingface_hub import try_to_load_from_cache

    if "file" in config:
        return "in the package"
    if "hf_hub_id" not in config:
        return f"to convert from {public.files[0]}" if public else "none"
    repo_id = config["hf_hub_id"] + name if config["hf_hub_id"] == "timm/" else config["hf_hub_id"]
    cached = try_to_load_from_cache(repo_id, config["hf_hub_filename"])
    return "cached" if isinstance(cached, str) else f"on the Hub: {repo_id}"

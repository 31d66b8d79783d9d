"""`timm-tresnet list` shows the variants and their weights."""

import argparse
import functools
import json
import math
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
    """Describe every variant and weight tag of the plugin.

    Returns:
        For each a dict with "model" (variant.tag), "params_m" (millions), "gmacs" (billions of multiply-adds for one
        image of "input_size", (C, H, W)), "num_classes", "imagenet_top1" (percent; None where unknown) and "weights":
        "in the package", "cached", "on the Hub: ORG/NAME", "to convert from FILE" or "none".
    """
    import timm
    from timm.models import get_pretrained_cfg

    from timm_tresnet.tresnet import IMAGENET_TOP1
    from timm_tresnet.weights.catalogue import load_catalogue

    catalogue = load_catalogue()
    rows = []
    for name in timm.list_models(module="tresnet", include_tags=True):
        config = get_pretrained_cfg(name)
        public = catalogue.get(name)
        arguments = public.network_arguments if public else {}
        params, macs = _measure_size(name.partition(".")[0], config.input_size[-1], config.num_classes, arguments)
        rows.append(
            {
                "model": name,
                "params_m": params / 1e6,
                "gmacs": macs / 1e9,
                "input_size": config.input_size,
                "num_classes": config.num_classes,
                "imagenet_top1": IMAGENET_TOP1.get(name),
                "weights": _locate_weights(config, public),
            }
        )
    return rows


def _measure_size(variant: str, image_size: int, num_classes: int, arguments: dict[str, Any]) -> tuple[int, int]:
    from timm_tresnet.bench.measuring import count_flops
    from timm_tresnet.models.heads import HEAD_ARGUMENTS, choose_head

    params, macs, width = _measure_backbone(variant, image_size)
    options = {name: value for name, value in arguments.items() if name in HEAD_ARGUMENTS}
    make_head = choose_head(options.pop("head", "linear"), **options)
    head = make_head(width, num_classes=num_classes, pool_type="fast", device="meta").eval()
    side = math.ceil(image_size / 32)  # of the last feature map
    return params + sum(p.numel() for p in head.parameters()), macs + count_flops(head, side, width) // 2


@functools.cache  # most weights share theirs with another one, and each takes half a second
def _measure_backbone(variant: str, image_size: int) -> tuple[int, int, int]:
    import timm

    from timm_tresnet.bench.measuring import count_flops

    model = timm.create_model(variant, num_classes=0, device="meta").eval()
    params = sum(parameter.numel() for parameter in model.parameters())
    return params, count_flops(model, image_size) // 2, model.num_features


def _locate_weights(config: Any, public: Any) -> str:
    from huggingface_hub import try_to_load_from_cache

    if config.file:
        return "in the package"
    if not config.hf_hub_id:
        return f"to convert from {public.files[0]}" if public else "none"
    cached = try_to_load_from_cache(config.hf_hub_id, config.hf_hub_filename)
    return "cached" if isinstance(cached, str) else f"on the Hub: {config.hf_hub_id}"

"""The `timm-tresnet` command: classify images, list the variants and their weights."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_SAMPLES = Path(__file__).parent / "samples"
_EMBEDDED = "test_tresnet"
_BATCH_SIZE = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        Exit status: 0 if all went well, 1 if an image could not be read, 2 for a mistake in the arguments.
    """
    parser = argparse.ArgumentParser(prog="timm-tresnet", description="TResNet models for timm.")
    commands = parser.add_subparsers(dest="command", required=True)

    classify = commands.add_parser(
        "classify",
        help="say what is on images",
        description="Say what is on images. Without IMAGE, classifies the sample photographs in the package.",
    )
    classify.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="image files, or folders of them")
    classify.add_argument(
        "--model",
        default=_EMBEDDED,
        metavar="NAME",
        help="a model with weights: a name from `timm-tresnet list`, hf-hub:ORG/NAME or local-dir:FOLDER "
        "(default: %(default)s, ten CIFAR-10 classes, works offline)",
    )
    classify.add_argument("--top-k", default=3, type=_positive, metavar="K", help="how many classes (default: 3)")
    classify.add_argument("--json", action="store_true", help="print JSON")
    classify.set_defaults(run=_classify)

    listing = commands.add_parser("list", help="list the variants and their weights")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=_list)

    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"needs at least 1, got {value}")
    return value


def _fail(message: str) -> int:
    print(f"timm-tresnet: {message}", file=sys.stderr)
    return 2


# ---- classify


def _classify(arguments: argparse.Namespace) -> int:
    import timm
    from safetensors import SafetensorError

    paths = list(_find_images(arguments.images or [_SAMPLES]))
    if not paths:
        return _fail(f"no images in {', '.join(map(str, arguments.images))}")
    try:
        model = timm.create_model(arguments.model, pretrained=True).eval()
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:  # unknown, unreachable or damaged
        return _fail(f"cannot load the model {arguments.model}: {error}")

    with _progress(len(paths)) as advance:
        results = classify_images(model, paths, arguments.top_k, advance)
    if arguments.json:
        print(json.dumps(results, indent=2))
    else:
        _print_predictions(results)
        if not arguments.images:
            print(
                f"\nThese are the photographs in the package; {_EMBEDDED} knows the ten classes of CIFAR-10 and takes "
                "everything for one of them.\nFor the 1000 classes of ImageNet, with weights from the Hugging Face "
                "Hub:\n    timm-tresnet classify --model tresnet_m.miil_in21k_ft_in1k IMAGE..."
            )
    unreadable = [result for result in results if "error" in result]
    for result in unreadable:
        print(f"timm-tresnet: skipped {result['image']}: {result['error']}", file=sys.stderr)
    return 1 if unreadable else 0


def _find_images(paths: Sequence[Path]) -> Iterator[Path]:
    from timm.data import is_img_extension

    for path in paths:
        if path.is_dir():
            yield from sorted(
                file for file in path.rglob("*") if file.is_file() and is_img_extension(file.suffix.lower())
            )
        else:
            yield path


def classify_images(
    model: Any, paths: Sequence[Path], top_k: int, advance: Callable[[int], None] = lambda count: None
) -> list[dict[str, Any]]:
    """Classify image files with the preprocessing that the model's weights were made for.

    Args:
        model: a model from `timm.create_model`, in eval mode.
        paths: image files.
        top_k: how many classes to report for each.
        advance: is told after each batch how many images that were.

    Returns:
        For each path, in order, a dict with "image" and either "predictions", a list of dicts with "label", "index" and
        "probability", most probable first, or, where the file cannot be read, "error".
    """
    import timm.data

    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    describe = _label_lookup(model)
    results = []
    for start in range(0, len(paths), _BATCH_SIZE):
        batch = paths[start : start + _BATCH_SIZE]
        results += _classify_batch(model, batch, top_k, transform, describe)
        advance(len(batch))
    return results


def _classify_batch(
    model: Any, paths: Sequence[Path], top_k: int, transform: Callable[..., Any], describe: Callable[[int], str]
) -> list[dict[str, Any]]:
    import torch
    from PIL import Image, ImageOps

    results: list[dict[str, Any]] = []
    inputs = []
    for path in paths:
        result: dict[str, Any] = {"image": str(path)}
        try:
            with Image.open(path) as image:
                inputs.append(transform(ImageOps.exif_transpose(image).convert("RGB")))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's decoders
            result["error"] = str(error) or type(error).__name__
        results.append(result)
    if inputs:
        with torch.inference_mode():
            probabilities = model(torch.stack(inputs)).softmax(-1)
        top = probabilities.topk(min(top_k, probabilities.shape[-1]))
        rows = zip(top.values.tolist(), top.indices.tolist(), strict=True)
        for result in results:
            if "error" not in result:
                values, indices = next(rows)
                result["predictions"] = [
                    {"label": describe(index), "index": index, "probability": probability}
                    for probability, index in zip(values, indices, strict=True)
                ]
    return results


def _label_lookup(model: Any) -> Callable[[int], str]:
    """Names of the classes: from the weights' config, else from timm's lists for ImageNet, else numbers."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    config = model.pretrained_cfg
    names = config.get("label_names")
    if names:
        descriptions = config.get("label_descriptions") or {}
        return lambda index: descriptions.get(names[index], names[index])
    subset = infer_imagenet_subset(model)
    if subset:
        return ImageNetInfo(subset).index_to_description
    return lambda index: f"class {index}"


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Counter on a terminal's stderr, for more than one batch."""
    visible = sys.stderr.isatty() and total > _BATCH_SIZE
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if visible:
            print(f"\r{done}/{total} images", end="", file=sys.stderr, flush=True)

    yield advance
    if visible:
        print(file=sys.stderr)


def _print_predictions(results: list[dict[str, Any]]) -> None:
    rows = [
        [result["image"], *(f"{entry['label']} {entry['probability']:.1%}" for entry in result["predictions"])]
        for result in results
        if "predictions" in result
    ]
    if rows:
        _print_table(rows)


# ---- list


def _list(arguments: argparse.Namespace) -> int:
    rows = describe_weights()
    if arguments.json:
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
    _print_table([header, *table])
    return 0


def describe_weights() -> list[dict[str, Any]]:
    """Describe every variant and weight tag of the plugin.

    Returns:
        For each a dict with "model" (variant.tag), "params_m" (millions), "gmacs" (billions of multiply-adds for one
        image of "input_size", (C, H, W)), "num_classes", "imagenet_top1" (percent; None where unknown) and "weights":
        "in the package", "cached", "on the Hub: ORG/NAME" or "none".
    """
    import timm
    from timm.models import get_pretrained_cfg

    from timm_tresnet.tresnet import IMAGENET_TOP1

    rows = []
    for name in timm.list_models(module="tresnet", include_tags=True):
        config = get_pretrained_cfg(name)
        params, macs = _measure_size(name.partition(".")[0], config.num_classes, tuple(config.input_size))
        rows.append(
            {
                "model": name,
                "params_m": params / 1e6,
                "gmacs": macs / 1e9,
                "input_size": config.input_size,
                "num_classes": config.num_classes,
                "imagenet_top1": IMAGENET_TOP1.get(name),
                "weights": _locate_weights(config),
            }
        )
    return rows


def _measure_size(variant: str, num_classes: int, input_size: tuple[int, ...]) -> tuple[int, int]:
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = timm.create_model(variant, num_classes=num_classes, device="meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *input_size, device="meta"))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


def _locate_weights(config: Any) -> str:
    from huggingface_hub import try_to_load_from_cache

    if config.file:
        return "in the package"
    if not config.hf_hub_id:
        return "none"
    cached = try_to_load_from_cache(config.hf_hub_id, config.hf_hub_filename)
    return "cached" if isinstance(cached, str) else f"on the Hub: {config.hf_hub_id}"


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) if column < len(row) else 0 for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

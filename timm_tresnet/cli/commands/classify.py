"""`timm-tresnet classify` says what is on images."""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timm_tresnet.cli.commands import CommandError, load_model, require_channels, warn_of_assumed
from timm_tresnet.cli.options import at_least, between
from timm_tresnet.utils.errors import summarise
from timm_tresnet.utils.images import find_images, find_samples, printable, read_image
from timm_tresnet.utils.tables import format_bar, format_columns
from timm_tresnet.weights.labels import describe_labels, is_multi_label, label_lookup, read_thresholds

ABOUT = {
    "help": "say what is on images",
    "description": "Say what is on images. Without IMAGE, classifies photographs in the package.",
}
EXAMPLE = "classify --top-k 5 photo.jpg folder/"
_EMBEDDED = "test_tresnet"
_BATCH_SIZE = 32
_THRESHOLD = 0.5  # of labels that have none of their own
_BAR_WIDTH = 20
_FEW_CLASSES = 20  # that are named on one line


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument(
        "--model",
        default=_EMBEDDED,
        metavar="NAME",
        help="a model with weights: a name from `timm-tresnet list`, hf-hub:ORG/NAME or local-dir:FOLDER "
        "(default: %(default)s, ten CIFAR-10 classes, works offline)",
    )
    parser.add_argument(
        "--engine",
        nargs=2,
        metavar=("ENGINE", "ARTIFACT"),
        help="run a file that `timm-tresnet export` wrote, in the engine torch, onnx or openvino, instead of a model",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="load an ARTIFACT of the engine torch, which can run anything on this machine; those of the others cannot",
    )
    parser.add_argument("--top-k", default=3, type=at_least(1), metavar="K", help="how many classes (default: 3)")
    parser.add_argument(
        "--threshold",
        type=between(0, 1),
        metavar="P",
        help="for models with any number of labels an image: print every label at least this probable, instead of the "
        f"top K (default: what the model says for each label, else {_THRESHOLD})",
    )
    parser.add_argument(
        "--as-stored",
        action="store_true",
        help="read images as timm's train.py and validate.py do: not turned as their cameras were held, and "
        "transparent pixels not on white",
    )
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")


def run(
    words: Sequence[str],
    *,
    images: Sequence[Path],
    model: str,
    engine: tuple[str, str] | None,
    trust: bool,
    top_k: int,
    threshold: float | None,
    as_stored: bool,
    as_json: bool,
) -> int:
    """Classify, print what was found, and name the files that cannot be read."""
    from tqdm import tqdm

    paths = list(find_images(images))
    if images and not paths:
        raise CommandError(f"no images in {', '.join(map(printable, images))}")
    network = _load_artifact(*engine, trust) if engine else load_model(model)
    if not images:
        paths = list(find_images([find_samples(network.pretrained_cfg)]))
    if network.num_classes == 0:
        raise CommandError(f"{engine[1] if engine else model} is a backbone without classes")
    require_channels(network, engine[1] if engine else model)

    warn_of_assumed(network)
    source = describe_labels(network)
    if source:
        print(f"timm-tresnet: class names: {source}", file=sys.stderr)
    few = len(paths) <= _BATCH_SIZE
    bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} images"
    with tqdm(total=len(paths), disable=few or None, mininterval=0, bar_format=bar_format) as bar:  # None: on terminals
        try:
            results = classify_images(network, paths, top_k, bar.update, threshold, as_stored)
        except RuntimeError as error:
            if not engine:
                raise
            raise CommandError(str(error)) from error
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        if not images:
            print(_describe_samples(paths, network, engine[1] if engine else model))
            results = [{**result, "image": path.name} for path, result in zip(paths, results, strict=True)]
        _print_predictions(results)
        if not images and not engine:
            print(
                "\nFor the 1000 classes of ImageNet, with weights from the Hugging Face Hub:\n"
                "    timm-tresnet classify --model tresnet_m.miil_in21k_ft_in1k IMAGE..."
            )
    unreadable = [result for result in results if "error" in result]
    for result in unreadable:
        print(f"timm-tresnet: skipped {result['image']}: {result['error']}", file=sys.stderr)
    return 1 if unreadable else 0


def _load_artifact(engine: str, artifact: str, trust: bool) -> Any:
    from timm_tresnet import ExportedModel

    try:
        return ExportedModel(artifact, engine, trust=trust)
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(f"cannot load {artifact}: {summarise(error)}") from error


def classify_images(
    model: Any,
    paths: Sequence[Path],
    top_k: int,
    advance: Callable[[int], None] = lambda count: None,
    threshold: float | None = None,
    as_stored: bool = False,
) -> list[dict[str, Any]]:
    """Classify image files with the preprocessing that the model's weights were made for.

    Args:
        model: a model from `timm.create_model`, in eval mode, or a `timm_tresnet.ExportedModel`.
        paths: image files.
        top_k: how many classes to report for each.
        advance: is told after each batch how many images that were.
        threshold: of a model whose images have any number of labels, every label at least this probable is reported;
            None for what the weights' config says for each label, or 0.5.
        as_stored: read images as timm's scripts do.

    Returns:
        For each path, in order, a dict with "image" and either "predictions", a list of dicts with "label", "index" and
        "probability", most probable first, or, where the file cannot be read or the logits are not finite, "error".
    """
    import timm.data

    from timm_tresnet.weights.preprocessing import resolve_preprocessing

    transform = timm.data.create_transform(**resolve_preprocessing(model))
    describe = label_lookup(model)
    if is_multi_label(model.pretrained_cfg):
        choose = functools.partial(_choose_probable, thresholds=_choose_thresholds(model, threshold))
    else:
        choose = functools.partial(_choose_top, count=top_k)
    results = []
    for start in range(0, len(paths), _BATCH_SIZE):
        batch = paths[start : start + _BATCH_SIZE]
        results += _classify_batch(model, batch, choose, transform, describe, as_stored)
        advance(len(batch))
    return results


def _choose_thresholds(model: Any, threshold: float | None) -> list[float]:
    """For each label the probability from which on an image has it."""
    own = read_thresholds(model.pretrained_cfg, model.num_classes)
    if threshold is None and own is not None:
        return own
    return [_THRESHOLD if threshold is None else threshold] * model.num_classes


def _choose_top(logits: Any, count: int) -> list[tuple[int, float]]:
    """Index and probability of the most probable classes of one image, of which one is right."""
    top = logits.softmax(-1).topk(min(count, len(logits)))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def _choose_probable(logits: Any, thresholds: Sequence[float]) -> list[tuple[int, float]]:
    """Index and probability of every label of one image that is probable enough for it, most probable first."""
    probabilities, indices = logits.sigmoid().sort(descending=True)
    pairs = zip(indices.tolist(), probabilities.tolist(), strict=True)
    return [(index, probability) for index, probability in pairs if probability >= thresholds[index]]


def _classify_batch(
    model: Any,
    paths: Sequence[Path],
    choose: Callable[[Any], list[tuple[int, float]]],
    transform: Callable[..., Any],
    describe: Callable[[int], str],
    as_stored: bool,
) -> list[dict[str, Any]]:
    import torch

    results: list[dict[str, Any]] = []
    inputs = []
    for path in paths:
        result: dict[str, Any] = {"image": printable(path)}
        try:
            inputs.append(transform(read_image(path, as_stored, in_chans=model.in_chans)))
        except ValueError as error:
            result["error"] = str(error)
        results.append(result)
    if inputs:
        with torch.inference_mode():
            rows = iter(model(torch.stack(inputs)))
        for result in [result for result in results if "error" not in result]:
            logits = next(rows)
            if not logits.isfinite().all():
                result["error"] = "the network's logits for it are not finite"
                continue
            result["predictions"] = [
                {"label": describe(index), "index": index, "probability": probability}
                for index, probability in choose(logits)
            ]
    return results


def _describe_samples(paths: Sequence[Path], network: Any, name: str) -> str:
    describe, count = label_lookup(network), network.num_classes
    named = f": {', '.join(map(describe, range(count)))}" if count <= _FEW_CLASSES else ""
    shown = f"{len(paths)} photographs" if len(paths) > 1 else "photograph"
    return f"The {shown} in the package, by {name}, which knows {count} classes{named}.\n"


def _print_predictions(results: list[dict[str, Any]]) -> None:
    """Print a line for each image; on a terminal, one for each of its classes, with a bar."""
    done = [result for result in results if "predictions" in result]
    if not done:
        return
    if sys.stdout.isatty():
        rows = [row for result in done for row in _draw_predictions(result)]
    else:
        rows = [
            [result["image"], *(f"{entry['label']} {entry['probability']:.1%}" for entry in result["predictions"])]
            for result in done
        ]
    print(format_columns(rows))


def _draw_predictions(result: dict[str, Any]) -> list[list[str]]:
    rows = [
        [
            f"{entry['probability']:6.1%}",
            format_bar(entry["probability"], _BAR_WIDTH, sys.stdout.encoding).ljust(_BAR_WIDTH),
            entry["label"],
        ]
        for entry in result["predictions"]
    ]
    first, *others = rows or [["", "", "nothing probable enough"]]
    return [[result["image"], *first], *(["", *row] for row in others)]

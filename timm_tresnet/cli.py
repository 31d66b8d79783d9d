"""The `timm-tresnet` command: classify images, list variants, convert checkpoints, export and measure networks."""

import argparse
import contextlib
import functools
import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from timm_tresnet.images import SAMPLES, find_images, read_image
from timm_tresnet.labels import is_multi_label, label_lookup
from timm_tresnet.options import add_options, at_least, image_size

_EMBEDDED = "test_tresnet"
_BATCH_SIZE = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        Exit status: 0 if all went well, 1 if an image or a checkpoint could not be used, 2 for a mistake in the
        arguments.
    """
    parser = argparse.ArgumentParser(prog="timm-tresnet", description="TResNet models for timm.")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_classify, _add_list, _add_convert, _add_export, _add_benchmark):
        add(commands)
    arguments = parser.parse_args(argv)
    arguments.words = sys.argv[1:] if argv is None else list(argv)
    try:
        status = arguments.run(arguments)
        print(end="", flush=True)
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own flush at its end
        return 1
    return status


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"needs a number from 0 to 1, got {value}")
    return value


def _batch(text: str) -> int | None:
    return None if text == "dynamic" else at_least(1)(text)


def _fail(message: str) -> int:
    print(f"timm-tresnet: {message}", file=sys.stderr)
    return 2


# ---- classify


def _add_classify(commands: Any) -> None:
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
    classify.add_argument(
        "--engine",
        nargs=2,
        metavar=("ENGINE", "ARTIFACT"),
        help="run a file that `timm-tresnet export` wrote, in the engine torch, onnx or openvino, instead of a model",
    )
    classify.add_argument("--top-k", default=3, type=at_least(1), metavar="K", help="how many classes (default: 3)")
    classify.add_argument(
        "--threshold",
        default=0.5,
        type=_probability,
        metavar="P",
        help="for models with any number of labels an image: print every label at least this probable, instead of the "
        "top K (default: %(default)s)",
    )
    classify.add_argument("--json", action="store_true", help="print JSON")
    classify.set_defaults(run=_classify)


def _classify(arguments: argparse.Namespace) -> int:
    paths = list(find_images(arguments.images or [SAMPLES]))
    if not paths:
        return _fail(f"no images in {', '.join(map(str, arguments.images))}")
    try:
        model = _load_artifact(*arguments.engine) if arguments.engine else _load_model(arguments.model)
    except _CannotLoad as error:
        return _fail(str(error))
    if model.num_classes == 0:
        return _fail(f"{arguments.engine[1] if arguments.engine else arguments.model} is a backbone without classes")

    with _progress(len(paths)) as advance:
        results = classify_images(model, paths, arguments.top_k, advance, arguments.threshold)
    if arguments.json:
        print(json.dumps(results, indent=2))
    else:
        _print_predictions(results)
        if not arguments.images and not arguments.engine:
            print(
                f"\nThese are the photographs in the package; {_EMBEDDED} knows the ten classes of CIFAR-10 and takes "
                "everything for one of them.\nFor the 1000 classes of ImageNet, with weights from the Hugging Face "
                "Hub:\n    timm-tresnet classify --model tresnet_m.miil_in21k_ft_in1k IMAGE..."
            )
    unreadable = [result for result in results if "error" in result]
    for result in unreadable:
        print(f"timm-tresnet: skipped {result['image']}: {result['error']}", file=sys.stderr)
    return 1 if unreadable else 0


class _CannotLoad(Exception):
    pass


def _load_model(name: str) -> Any:
    import timm
    from safetensors import SafetensorError

    try:
        return timm.create_model(name, pretrained=True).eval()
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:  # unknown, unreachable or damaged
        raise _CannotLoad(f"cannot load the model {name}: {error}") from error


def _load_artifact(engine: str, artifact: str) -> Any:
    from timm_tresnet.deployment import ExportedModel

    try:
        return ExportedModel(engine, artifact)
    except (OSError, RuntimeError, ValueError, KeyError, ImportError) as error:
        raise _CannotLoad(f"cannot load {artifact}: {error}") from error


def classify_images(
    model: Any,
    paths: Sequence[Path],
    top_k: int,
    advance: Callable[[int], None] = lambda count: None,
    threshold: float = 0.5,
) -> list[dict[str, Any]]:
    """Classify image files with the preprocessing that the model's weights were made for.

    Args:
        model: a model from `timm.create_model`, in eval mode, or a `timm_tresnet.ExportedModel`.
        paths: image files.
        top_k: how many classes to report for each.
        advance: is told after each batch how many images that were.
        threshold: of a model whose images have any number of labels, every label at least this probable is reported.

    Returns:
        For each path, in order, a dict with "image" and either "predictions", a list of dicts with "label", "index" and
        "probability", most probable first, or, where the file cannot be read, "error".
    """
    import timm.data

    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    describe = label_lookup(model)
    if is_multi_label(model.pretrained_cfg):
        choose = functools.partial(_choose_probable, threshold=threshold)
    else:
        choose = functools.partial(_choose_top, count=top_k)
    results = []
    for start in range(0, len(paths), _BATCH_SIZE):
        batch = paths[start : start + _BATCH_SIZE]
        results += _classify_batch(model, batch, choose, transform, describe)
        advance(len(batch))
    return results


def _choose_top(logits: Any, count: int) -> list[tuple[int, float]]:
    """Index and probability of the most probable classes of one image, of which one is right."""
    top = logits.softmax(-1).topk(min(count, len(logits)))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def _choose_probable(logits: Any, threshold: float) -> list[tuple[int, float]]:
    """Index and probability of every label of one image that is probable enough."""
    probabilities, indices = logits.sigmoid().sort(descending=True)
    count = int((probabilities >= threshold).sum())
    return list(zip(indices[:count].tolist(), probabilities[:count].tolist(), strict=True))


def _classify_batch(
    model: Any,
    paths: Sequence[Path],
    choose: Callable[[Any], list[tuple[int, float]]],
    transform: Callable[..., Any],
    describe: Callable[[int], str],
) -> list[dict[str, Any]]:
    import torch

    results: list[dict[str, Any]] = []
    inputs = []
    for path in paths:
        result: dict[str, Any] = {"image": str(path)}
        try:
            inputs.append(transform(read_image(path)))
        except ValueError as error:
            result["error"] = str(error)
        results.append(result)
    if inputs:
        with torch.inference_mode():
            rows = iter(model(torch.stack(inputs)))
        for result in results:
            if "error" not in result:
                result["predictions"] = [
                    {"label": describe(index), "index": index, "probability": probability}
                    for index, probability in choose(next(rows))
                ]
    return results


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


# ---- export


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write a network for another engine",
        description="Write a network with its weights as one artifact for another engine, checked against PyTorch, and "
        "a JSON file beside it that says how to feed it.",
    )
    export.add_argument("model", metavar="NAME", help="a model with weights, as --model of `timm-tresnet classify`")
    export.add_argument("--format", required=True, choices=["onnx", "openvino", "torch-export", "torchscript"])
    export.add_argument("--output", required=True, type=Path, metavar="FILE", help=".onnx, .xml, .pt2 or .pt")
    export.add_argument("--int8", action="store_true", help="quantise, for onnx and openvino; needs --calibration")
    export.add_argument(
        "--calibration", type=Path, metavar="FOLDER", help="images like those that the network will see, some hundreds"
    )
    export.add_argument(
        "--batch", type=_batch, default="dynamic", metavar="N", help="images in a batch (default: %(default)s)"
    )
    export.add_argument(
        "--size", type=at_least(1), nargs=2, metavar=("H", "W"), help="size of the images, in pixels (default: dynamic)"
    )
    export.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    from timm_tresnet.deployment import description_path, export_model

    if arguments.int8 != bool(arguments.calibration):
        return _fail("--int8 and --calibration FOLDER go together")
    try:
        model = _load_model(arguments.model)
    except _CannotLoad as error:
        return _fail(str(error))
    try:
        description = export_model(
            model,
            arguments.output,
            arguments.format,
            batch_size=arguments.batch,
            image_size=arguments.size and tuple(arguments.size),
            calibration=arguments.calibration,
        )
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        return _fail(f"cannot export {arguments.model}: {error}")
    check = description["check"]
    print(f"{arguments.output}: {description['model']}, {description['format']}, {description['precision']}")
    print(f"{description_path(arguments.output)}: input, preprocessing and class names")
    if not arguments.int8:
        print(f"logits equal PyTorch's within {check['max_relative_error']:.0e} (relative L2)")
        return 0
    print(
        f"same first class as float32 on {check['top1_agreement']:.1%} of {check['held_out_images']} images held out; "
        f"calibrated on {check['calibration_images']}"
    )
    if check["skipped_images"]:
        print(f"timm-tresnet: skipped {check['skipped_images']} images that cannot be read", file=sys.stderr)
    return 1 if check["skipped_images"] else 0


# ---- list


def _add_list(commands: Any) -> None:
    listing = commands.add_parser("list", help="list the variants and their weights")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=_list)


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
        "in the package", "cached", "on the Hub: ORG/NAME", "to convert from FILE" or "none".
    """
    import timm
    from timm.models import get_pretrained_cfg

    from timm_tresnet.catalogue import load_catalogue
    from timm_tresnet.tresnet import IMAGENET_TOP1

    catalogue = load_catalogue()
    rows = []
    for name in timm.list_models(module="tresnet", include_tags=True):
        config = get_pretrained_cfg(name)
        public = catalogue.get(name)
        head_features = public.network_arguments.get("head_features") if public else None
        params, macs = _measure_size(
            name.partition(".")[0], tuple(config.input_size), config.num_classes, head_features
        )
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


def _measure_size(
    variant: str, input_size: tuple[int, ...], num_classes: int, head_features: int | None
) -> tuple[int, int]:
    params, macs, width = _measure_backbone(variant, input_size)
    for features in (head_features, num_classes):
        if features:
            params, macs, width = params + width * features + features, macs + width * features, features
    return params, macs


@functools.cache  # most weights share theirs with another one, and each takes half a second
def _measure_backbone(variant: str, input_size: tuple[int, ...]) -> tuple[int, int, int]:
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = timm.create_model(variant, num_classes=0, device="meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *input_size, device="meta"))
    params = sum(parameter.numel() for parameter in model.parameters())
    return params, counter.get_total_flops() // 2, model.num_features


def _locate_weights(config: Any, public: Any) -> str:
    from huggingface_hub import try_to_load_from_cache

    if config.file:
        return "in the package"
    if not config.hf_hub_id:
        return f"to convert from {public.files[0]}" if public else "none"
    cached = try_to_load_from_cache(config.hf_hub_id, config.hf_hub_filename)
    return "cached" if isinstance(cached, str) else f"on the Hub: {config.hf_hub_id}"


# ---- convert


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="make old checkpoints loadable",
        description="Convert checkpoints of the official TResNet code and its descendants, or of timm, into folders "
        "that timm.create_model('local-dir:FOLDER', pretrained=True) loads. What a checkpoint is comes from its "
        "tensors, what they cannot tell from its public weight or these options. Nothing in a checkpoint is executed.",
    )
    convert.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="checkpoints: .pth, .pt, .safetensors, ..."
    )
    convert.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="where to; of several files, each gets a subfolder"
    )
    convert.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")
    convert.add_argument(
        "--public-weight",
        "--recipe",
        metavar="NAME",
        help="a public weight, see `timm-tresnet list`; default: by the file's name",
    )
    convert.add_argument(
        "--norm-weights",
        choices=("abn", "bn"),
        help="whether norm weights are In-Place ABN's, to become |w| + 1e-5, or batch norm's; default: by the names",
    )
    convert.add_argument("--custom", action="store_true", help="take a network that is none of the variants too")
    convert.add_argument("--input-size", type=int, metavar="PIXELS", help="side of the images")
    convert.add_argument("--crop-pct", type=float, metavar="FRACTION", help="side of the crop over the resized image's")
    convert.add_argument("--crop-mode", choices=("center", "squash"), help="crop the centre, or resize to a square")
    convert.add_argument("--interpolation", choices=("nearest", "bilinear", "bicubic", "lanczos"))
    convert.add_argument("--mean", nargs="+", type=float, metavar="M", help="of each channel")
    convert.add_argument("--std", nargs="+", type=float, metavar="S", help="of each channel")
    convert.add_argument("--negative-slope", type=float, metavar="SLOPE", help="of the activations in the blocks")
    convert.add_argument("--stem-negative-slope", type=float, metavar="SLOPE", help="of the activation in the stem")
    convert.add_argument("--license", metavar="NAME", help="as the Hub names it, such as apache-2.0")
    convert.add_argument("--dataset", metavar="NAME", help="what the weights were trained on")
    convert.add_argument(
        "--multi-label", action=argparse.BooleanOptionalAction, help="an image has any number of the classes"
    )
    convert.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    from timm_tresnet.conversion import convert_checkpoint, write_folder

    folders = {
        file: arguments.output / file.stem if len(arguments.files) > 1 else arguments.output for file in arguments.files
    }
    if len(set(folders.values())) < len(arguments.files):
        return _fail("two of the files have the same name, and each would be written to a subfolder of that name")
    others = ("run", "command", "words", "files", "output", "overwrite")
    options = {name: value for name, value in vars(arguments).items() if name not in others}
    failed = 0
    for file, folder in folders.items():
        try:
            conversion = convert_checkpoint(file, **options)
            write_folder(conversion, folder, overwrite=arguments.overwrite)
        except (OSError, ValueError) as error:
            print(f"timm-tresnet: {error}", file=sys.stderr)
            failed += 1
            continue
        classes = f"{conversion.num_classes} classes" if conversion.num_classes else "no classes"
        public = f"public weight {conversion.public_weight.name}" if conversion.public_weight else "no public weight"
        print(f"{folder}: {conversion.architecture}, {classes}, {conversion.layout} names, {public}")
        for note in conversion.notes:
            print(f"  {note}")
        for warning in conversion.warnings:
            print(f"timm-tresnet: warning: {file}: {warning}", file=sys.stderr)
    return 1 if failed else 0


# ---- benchmark


def _add_benchmark(commands: Any) -> None:
    benchmark = commands.add_parser(
        "benchmark",
        help="measure speed and training memory on this machine",
        description="Measure networks side by side in one run: images a second in training and in inference, with "
        "ratios to the first one's in the same rounds, and memory kept for backward. Weights are random. "
        "benchmarks/paper_tables.py in the repository is the long form.",
    )
    benchmark.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        default=["resnet50", "built-in:tresnet_m", "tresnet_m"],
        help="names for timm.create_model; built-in:NAME is timm's own TResNet (default: %(default)s)",
    )
    benchmark.add_argument("--image-size", type=image_size, default=224, metavar="PIXELS", help="default: %(default)s")
    add_options(benchmark)
    benchmark.set_defaults(run=_benchmark)


def _benchmark(arguments: argparse.Namespace) -> int:
    from timm_tresnet.benchmark import Candidate, check_options, make_network, run_comparison

    models = list(dict.fromkeys(arguments.models))
    candidates = [
        Candidate(name, functools.partial(make_network, name), models[0], arguments.image_size) for name in models
    ]
    others = ("run", "command", "words")
    settings = argparse.Namespace(**{name: value for name, value in vars(arguments).items() if name not in others})
    try:
        check_options(settings)
        return run_comparison(candidates, settings, shlex.join(["timm-tresnet", *arguments.words]))
    except ValueError as error:
        return _fail(str(error))


def _print_table(rows: list[list[str]]) -> None:
    columns = itertools.zip_longest(*rows, fillvalue="")  # rows may end early
    widths = [max(map(len, column)) for column in columns]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip())

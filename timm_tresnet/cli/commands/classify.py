"""`timm-tresnet classify` prints the classes or labels of images."""

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from timm_tresnet.cli.commands import CommandError, load_model, require_channels, warn_of_assumed
from timm_tresnet.cli.options import add_machine_options, at_least, between, choose_device, default_workers
from timm_tresnet.utils.errors import summarise
from timm_tresnet.utils.images import find_images, find_samples, printable
from timm_tresnet.utils.tables import format_bar, format_columns
from timm_tresnet.weights.labels import describe_labels, label_lookup

ABOUT = {
    "help": "print the classes or labels of images",
    "description": "Print the classes or labels of images. Without IMAGE, classify photographs in the package.",
}
EXAMPLE = "classify --top-k 5 photo.jpg folder/"
_EMBEDDED = "test_tresnet"
_LONGEST_WAIT = datetime.timedelta(days=30)  # of one process for the last of the others
_COUNTED = ("images", "there", "errors", "sidecars", "sidecars_there")
_FAST_JPEG = "large JPEG files are decoded at a half to an eighth of their size, which changes probabilities a little"
_INTERRUPTED = 130  # exit status, as shells have it
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
        "top K (default: what the model says for each label, else 0.5)",
    )
    parser.add_argument(
        "--as-stored",
        action="store_true",
        help="read images as timm's train.py and validate.py do: not turned as their cameras were held, and "
        "transparent pixels not on white",
    )
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    collection = parser.add_argument_group("collections")
    collection.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write to a .jsonl, .csv or .parquet file, as it goes, instead of printing",
    )
    collection.add_argument(
        "--resume", action="store_true", help="go on with what is in --output, or begin if there is nothing"
    )
    collection.add_argument(
        "--sidecar", action="store_true", help="write photo.txt beside photo.jpg: labels with commas between them"
    )
    collection.add_argument(
        "--overwrite-sidecars", action="store_true", help="write .txt files that exist anew (default: they stay)"
    )
    collection.add_argument(
        "--replace-underscores", action="store_true", help="write spaces for them in --sidecar, but in o_o and the like"
    )
    collection.add_argument(
        "--escape-parentheses", action="store_true", help="write a backslash before them in --sidecar"
    )
    collection.add_argument("--prefix", default="", metavar="TEXT", help="comes before the labels in --sidecar")
    collection.add_argument(
        "--fast-jpeg",
        action="store_true",
        help=_FAST_JPEG,
    )
    add_machine_options(parser.add_argument_group("machine"))


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
    output: Path | None,
    resume: bool,
    sidecar: bool,
    overwrite_sidecars: bool,
    replace_underscores: bool,
    escape_parentheses: bool,
    prefix: str,
    fast_jpeg: bool,
    device: str,
    amp: str | None,
    channels_last: bool,
    compile: bool,
    batch_size: int,
    workers: int | None,
) -> int:
    """Classify, print or write what was found, and name the files that cannot be read."""
    process, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    of_sidecars = (overwrite_sidecars, replace_underscores, escape_parentheses, bool(prefix))
    _check_options(images, output, sidecar, any(of_sidecars), resume, as_json)
    if engine and (device != "auto" or amp or channels_last or compile):
        raise CommandError("--device, --amp, --channels-last and --compile are about models, not about --engine")
    found = iter(find_images(images))
    first = list(itertools.islice(found, batch_size + 1))
    if images and not first:
        raise CommandError(f"no images in {', '.join(map(printable, images))}")
    try:
        where = "cpu" if engine else choose_device(device)
    except ValueError as error:
        raise CommandError(str(error)) from error
    network = _load_artifact(*engine, trust) if engine else load_model(model)
    name = engine[1] if engine else model
    if not images:
        first = list(find_images([find_samples(network.pretrained_cfg)]))
    if network.num_classes == 0:
        raise CommandError(f"{name} is a backbone without classes")
    require_channels(network, name)
    if not process:
        warn_of_assumed(network)
        source = describe_labels(network)
        if source:
            print(f"timm-tresnet: class names: {source}", file=sys.stderr)
        if fast_jpeg:
            print(f"timm-tresnet: --fast-jpeg: {_FAST_JPEG}", file=sys.stderr)

    from timm_tresnet.collection.outputs import Output
    from timm_tresnet.collection.predictions import Settings, classify_files, fingerprint
    from timm_tresnet.collection.sidecars import Sidecars

    few = len(first) <= batch_size  # for one batch, which one process reads
    settings = Settings(
        top_k=top_k,
        threshold=threshold,
        as_stored=as_stored,
        fast_jpeg=fast_jpeg,
        device=where,
        amp=amp,
        channels_last=channels_last,
        compiled=compile,
        batch_size=batch_size,
        workers=workers if workers is not None else 0 if few else default_workers(),
        process=process,
        processes=processes,
    )
    sidecars = Sidecars(replace_underscores, escape_parentheses, prefix, overwrite_sidecars) if sidecar else None
    tally: Counter[str] = Counter()
    results: list[dict[str, Any]] = []  # to be printed
    try:
        with _together(processes) as add_up:
            with contextlib.ExitStack() as stack:
                writer = None
                if output:
                    files = _name_files(engine[1]) if engine else []
                    made_by = {**settings.describe(), "engine": engine and engine[0], **fingerprint(network, files)}
                    about = {"command": shlex.join(["timm-tresnet", *words]), "model": name, "versions": _versions()}
                    writer = Output(output, made_by, about, resume, process, processes)
                    add_up(tally)  # all have looked at what is there
                    if not process:
                        writer.prepare()
                    add_up(tally)
                    stack.enter_context(writer)
                    add_up(tally)  # all have read what is done
                    if not process:
                        tally.update(there=writer.done.total(), errors=writer.errors)
                make_filter = writer.make_filter if writer else lambda: sidecars.is_done if sidecars else _is_done
                total = len(first)
                if shown := sys.stderr.isatty() and not few and not process:
                    plan = settings.plan(find_images(images), make_filter())
                    total = sum(file.wanted for batch in plan for file in batch)
                batches = classify_files(network, itertools.chain(first, found), settings, make_filter())
                for batch in _show_progress(batches, total, shown):
                    _keep(batch, writer, sidecars, results, tally)
            tally = add_up(tally)
            if writer and not process:
                writer.join_parts(batch_size)
            add_up(tally)
    except KeyboardInterrupt:
        if not output and not sidecar:
            raise
        print("timm-tresnet: interrupted; the same command goes on, with --resume if it has --output", file=sys.stderr)
        return _INTERRUPTED
    except (OSError, RuntimeError, ValueError) as error:
        raise CommandError(summarise(error)) from error
    if output or sidecar:
        if not process:
            print(_describe_written(tally, output, sidecar))
    elif as_json:
        print(json.dumps(results, indent=2))
    else:
        if not images:
            print(_describe_samples(first, network, name))
            results = [{**result, "image": path.name} for path, result in zip(first, results, strict=True)]
        _print_predictions(results)
        if not images and not engine:
            print(
                "\nFor the 1000 classes of ImageNet, with weights from the Hugging Face Hub:\n"
                "    timm-tresnet classify --model tresnet_m.miil_in21k_ft_in1k IMAGE..."
            )
    for result in results:
        if "error" in result:
            print(f"timm-tresnet: skipped {result['image']}: {result['error']}", file=sys.stderr)
    return 1 if tally["errors"] else 0


def _check_options(
    images: Sequence[Path], output: Path | None, sidecar: bool, of_sidecars: bool, resume: bool, as_json: bool
) -> None:
    if of_sidecars and not sidecar:
        raise CommandError(
            "--overwrite-sidecars, --replace-underscores, --escape-parentheses and --prefix need --sidecar"
        )
    if resume and not output:
        raise CommandError("--resume needs --output")
    if output or sidecar:
        if as_json:
            raise CommandError("--json is about what is printed; with --output or --sidecar, nothing is")
        if not images:
            raise CommandError("--output and --sidecar need IMAGE")
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CommandError("several processes need --output or --sidecar")


@contextlib.contextmanager
def _together(processes: int) -> Iterator[Callable[[Counter[str]], Counter[str]]]:
    """Have processes wait for each other: what is yielded adds up the counts of all."""
    if processes == 1:
        yield lambda counts: counts
        return
    import torch.distributed

    torch.distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)

    def add_up(counts: Counter[str]) -> Counter[str]:
        values = torch.tensor([counts[name] for name in _COUNTED])
        try:
            torch.distributed.all_reduce(values)
        except RuntimeError as error:
            raise RuntimeError("another of the processes has ended, see what it says") from error
        return Counter(dict(zip(_COUNTED, values.tolist(), strict=True)))

    try:
        yield add_up
    finally:
        torch.distributed.destroy_process_group()


def _is_done(path: Path) -> bool:
    """Of what is printed, all is wanted."""
    return False


def _show_progress(batches: Iterable[list[Any]], total: int, shown: bool) -> Iterator[list[Any]]:
    from tqdm import tqdm

    bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} images, {rate_noinv_fmt}, {remaining} left"
    with tqdm(total=total, disable=not shown, mininterval=0, unit=" images", bar_format=bar_format) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def _keep(batch: list[Any], writer: Any, sidecars: Any, results: list[dict[str, Any]], tally: Counter[str]) -> None:
    """Write what a batch has: sidecars first, so that those of every line that is written are there."""
    for path, result in batch:
        tally["images"] += 1
        tally["errors"] += "error" in result
        if sidecars and "predictions" in result:
            written = sidecars.write(path, [entry["label"] for entry in result["predictions"]])
            tally["sidecars" if written else "sidecars_there"] += 1
        elif sidecars and not writer:
            print(f"timm-tresnet: skipped {result['image']}: {result['error']}", file=sys.stderr)
    if writer:
        writer.write([result for _, result in batch])
    elif not sidecars:
        results += [result for _, result in batch]


def _describe_written(tally: Counter[str], output: Path | None, sidecar: bool) -> str:
    lines = []
    if output:
        count, new = tally["images"] + tally["there"], f", {tally['images']} of them new" if tally["there"] else ""
        lines.append(f"{printable(output)}: {count} images{new}, {tally['errors']} with errors")
    if sidecar:
        there = f", {tally['sidecars_there']} were there already" if tally["sidecars_there"] else ""
        lines.append(f"{tally['sidecars']} text files written beside images{there}")
    return "\n".join(lines)


def _name_files(artifact: str) -> list[Path]:
    """Files of an artifact: itself and, of OpenVINO's, the one with the weights."""
    return [path for path in (Path(artifact), Path(artifact).with_suffix(".bin")) if path.is_file()]


def _versions() -> dict[str, str]:
    import timm
    import torch

    own = importlib.metadata.version("timm-tresnet")
    return {"timm-tresnet": own, "timm": timm.__version__, "torch": str(torch.__version__)}


def _load_artifact(engine: str, artifact: str, trust: bool) -> Any:
    from timm_tresnet import ExportedModel

    try:
        return ExportedModel(artifact, engine, trust=trust)
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(f"cannot load {artifact}: {summarise(error)}") from error


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

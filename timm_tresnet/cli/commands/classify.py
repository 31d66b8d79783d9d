"""`timm-tresnet classify` prints the classes or labels of images."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_tresnet.cli.commands import (
    CommandError,
    choose_machine,
    load_classifier,
    prepare_keep_ratio,
    refuse_compiled_ratios,
    warn_of_assumed,
)
from timm_tresnet.cli.options import (
    add_engine_options,
    add_keep_ratio,
    add_machine_options,
    at_least,
    between,
    default_workers,
)
from timm_tresnet.cli.results import (
    COUNTED,
    Results,
    describe_samples,
    describe_written,
    print_errors,
    print_predictions,
    show_progress,
)
from timm_tresnet.utils.errors import summarise
from timm_tresnet.utils.images import find_images, find_samples, printable
from timm_tresnet.weights.labels import describe_labels

if TYPE_CHECKING:  # these import torch, which the parser can do without
    from timm_tresnet.collection.outputs import Output
    from timm_tresnet.collection.predictions import Settings

ABOUT = {
    "help": "print the classes or labels of images",
    "description": "Print the classes or labels of images. Without IMAGE, classify photographs in the package.",
}
EXAMPLE = "classify --top-k 5 photo.jpg folder/"
_EMBEDDED = "test_tresnet"
_FAST_JPEG = "large JPEG files are decoded at a half to an eighth of their size, which changes probabilities a little"
_INTERRUPTED = 130  # exit status, as shells have it


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
    add_engine_options(parser)
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
    add_keep_ratio(parser)
    add_machine_options(parser.add_argument_group("machine"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """Options of the command, by the names that `add_options` gives them."""

    images: Sequence[Path]
    model: str
    engine: tuple[str, str] | None
    trust: bool
    top_k: int
    threshold: float | None
    as_stored: bool
    as_json: bool
    output: Path | None
    resume: bool
    sidecar: bool
    overwrite_sidecars: bool
    replace_underscores: bool
    escape_parentheses: bool
    prefix: str
    fast_jpeg: bool
    keep_ratio: bool
    device: str
    amp: str | None
    channels_last: bool
    compile: bool
    batch_size: int
    workers: int | None

    @property
    def name(self) -> str:
        """How messages name the network."""
        return self.engine[1] if self.engine else self.model


def run(words: Sequence[str], **options: Any) -> int:
    """Classify, print or write what was found, and name the files that cannot be read."""
    asked = _Options(**options)
    _check_options(asked)
    found = iter(find_images(asked.images))
    first = list(itertools.islice(found, asked.batch_size + 1))
    if asked.images and not first:
        raise CommandError(f"no images in {', '.join(map(printable, asked.images))}")
    device = choose_machine(asked.device, asked.amp, asked.channels_last, asked.compile, asked.engine)
    network = load_classifier(asked.model, asked.engine, asked.trust)
    if not asked.images:
        first = list(find_images([find_samples(network.pretrained_cfg)]))
    few = len(first) <= asked.batch_size  # for one batch, which one process reads
    settings = _make_settings(asked, device, few)
    if not settings.process:
        _tell(asked, network)
    try:
        results = _classify(words, asked, network, settings, itertools.chain(first, found), len(first))
    except KeyboardInterrupt:
        if not asked.output and not asked.sidecar:
            raise
        print("timm-tresnet: interrupted; the same command goes on, with --resume if it has --output", file=sys.stderr)
        return _INTERRUPTED
    except (OSError, RuntimeError, ValueError) as error:
        raise CommandError(summarise(error)) from error
    if not settings.process:
        _report(asked, network, results, first)
    return 1 if results.tally["errors"] else 0


def _check_options(asked: _Options) -> None:
    """Refuse options that do not go together."""
    of_sidecars = (asked.overwrite_sidecars, asked.replace_underscores, asked.escape_parentheses, asked.prefix)
    if any(of_sidecars) and not asked.sidecar:
        raise CommandError(
            "--overwrite-sidecars, --replace-underscores, --escape-parentheses and --prefix need --sidecar"
        )
    if asked.resume and not asked.output:
        raise CommandError("--resume needs --output")
    if asked.output or asked.sidecar:
        if asked.as_json:
            raise CommandError("--json is about what is printed; with --output or --sidecar, nothing is")
        if not asked.images:
            raise CommandError("--output and --sidecar need IMAGE")
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CommandError("several processes need --output or --sidecar")
    refuse_compiled_ratios(asked.keep_ratio, asked.compile)


def _tell(asked: _Options, network: Any) -> None:
    """Say on standard error what is assumed about images and classes, and what options change."""
    warn_of_assumed(network)
    source = describe_labels(network)
    if source:
        print(f"timm-tresnet: class names: {source}", file=sys.stderr)
    if asked.fast_jpeg:
        print(f"timm-tresnet: --fast-jpeg: {_FAST_JPEG}", file=sys.stderr)
    if asked.keep_ratio:
        prepare_keep_ratio(network)


def _make_settings(asked: _Options, device: str, few: bool) -> "Settings":
    from timm_tresnet.collection.predictions import Settings

    return Settings(
        top_k=asked.top_k,
        threshold=asked.threshold,
        as_stored=asked.as_stored,
        fast_jpeg=asked.fast_jpeg,
        keep_ratio=asked.keep_ratio,
        device=device,
        amp=asked.amp,
        channels_last=asked.channels_last,
        compiled=asked.compile,
        batch_size=asked.batch_size,
        workers=asked.workers if asked.workers is not None else 0 if few else default_workers(),
        process=int(os.environ.get("RANK", "0")),
        processes=int(os.environ.get("WORLD_SIZE", "1")),
    )


def _classify(
    words: Sequence[str], asked: _Options, network: Any, settings: "Settings", paths: Iterable[Path], count: int
) -> Results:
    """Classify files, together with other processes, and write the results or keep them.

    Args:
        words: of the whole command line.
        asked: the options.
        network: the network.
        settings: of this process.
        paths: the files.
        count: how many these are, or, where they are more than a batch, fewer.
    """
    from timm_tresnet.collection.predictions import classify_files
    from timm_tresnet.collection.processes import shared, together
    from timm_tresnet.collection.sidecars import Sidecars

    sidecars = None
    if asked.sidecar:
        sidecars = Sidecars(asked.replace_underscores, asked.escape_parentheses, asked.prefix, asked.overwrite_sidecars)
    with together(settings.processes, COUNTED) as add_up:
        writer = _make_output(words, asked, network, settings)
        with shared(writer, asked.batch_size, not settings.process, add_up) if writer else contextlib.nullcontext():
            results = Results(writer, sidecars)
            if writer and not settings.process:
                results.tally.update(there=writer.done.total(), errors=writer.errors)
            make_filter = writer.make_filter if writer else lambda: sidecars.is_done if sidecars else _is_done
            shown = sys.stderr.isatty() and count > asked.batch_size and not settings.process
            if shown:
                plan = settings.plan(find_images(asked.images), make_filter())
                count = sum(file.wanted for batch in plan for file in batch)
            for batch in show_progress(classify_files(network, paths, settings, make_filter()), count, shown):
                results.add(batch)
        results.tally = add_up(results.tally)
    return results


def _make_output(words: Sequence[str], asked: _Options, network: Any, settings: "Settings") -> "Output | None":
    """The file of --output, with what made it; None without the option."""
    from timm_tresnet.collection.outputs import Output
    from timm_tresnet.collection.predictions import fingerprint

    if not asked.output:
        return None
    files = _name_files(asked.engine[1]) if asked.engine else []
    made_by = {**settings.describe(), "engine": asked.engine and asked.engine[0], **fingerprint(network, files)}
    about = {"command": shlex.join(["timm-tresnet", *words]), "model": asked.name, "versions": _versions()}
    return Output(asked.output, made_by, about, asked.resume, settings.process, settings.processes)


def _name_files(artifact: str) -> list[Path]:
    """Files of an artifact: itself and, of OpenVINO's, the one with the weights."""
    return [path for path in (Path(artifact), Path(artifact).with_suffix(".bin")) if path.is_file()]


def _versions() -> dict[str, str]:
    import timm
    import torch

    own = importlib.metadata.version("timm-tresnet")
    return {"timm-tresnet": own, "timm": timm.__version__, "torch": str(torch.__version__)}


def _is_done(path: Path) -> bool:
    """Of what is printed, all is wanted."""
    return False


def _report(asked: _Options, network: Any, results: Results, first: Sequence[Path]) -> None:
    """Print results, or what was written."""
    if asked.output or asked.sidecar:
        print(describe_written(results.tally, asked.output, asked.sidecar))
        return
    kept = results.kept
    if asked.as_json:
        print(json.dumps(kept, indent=2))
    elif asked.images:
        print_predictions(kept)
    else:
        print(describe_samples(first, network, asked.name))
        kept = [{**result, "image": path.name} for path, result in zip(first, kept, strict=True)]
        print_predictions(kept)
        if not asked.engine:
            print(
                "\nFor the 1000 classes of ImageNet, with weights from the Hugging Face Hub:\n"
                "    timm-tresnet classify --model tresnet_m.miil_in21k_ft_in1k IMAGE..."
            )
    print_errors(kept)

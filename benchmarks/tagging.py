"""Heads and losses of a tiny tagger, compared on mosaics of CIFAR-10. It says nothing about COCO.

    python benchmarks/tagging.py --data mosaics --json results.json

`timm-tresnet train-tagger` trains `test_tresnet` with each head and loss and several seeds, from the weights in the
package (`r64_cifar10`, without their classifier). It chooses epoch and thresholds on the held-out mosaics. The results
are mAP, CF1 and OF1 of the trained folder on the test mosaics. hub/mosaic_cifar10/prepare.py makes the mosaics, of 64
pixels and four photographs each.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm.data
import torch
from command_line import format_command

from timm_tresnet.bench.results import start_results, write_results
from timm_tresnet.cli import main as cli
from timm_tresnet.cli.options import at_least, new_file
from timm_tresnet.tagging.annotations import ReadingOptions, read_annotations
from timm_tresnet.tagging.scores import score
from timm_tresnet.utils.images import read_image
from timm_tresnet.utils.tables import format_markdown
from timm_tresnet.weights.labels import read_thresholds
from timm_tresnet.weights.loading import load_network

HEADS = {  # options of the command
    "ml_decoder": ["--head", "ml_decoder", "--model-kwargs", "recompute=none", "num_groups=10", "decoder_embedding={}"],
    "linear": ["--head", "linear", "--model-kwargs", "recompute=none"],
}
LOSSES = ("asl", "bce")
# Differs from official training: Cutout and RandAugment can hide a whole photograph of a mosaic. A slow moving average
# would hardly leave its start in these few steps. Adam at the official rate learns too little in them.
TRAINING = ["--cutout", "0", "--randaugment", "0", "--ema-decay", "0.99", "--batch-size", "32", "--lr", "2e-3"]
TRAINING += ["--channels-last", "--device", "cpu", "--workers", "0", "--model", "test_tresnet.r64_cifar10", "--resume"]
METRICS = ("mAP", "CF1", "OF1")
_BATCH_SIZE = 250


def make_words(head: str, loss: str, seed: int, output: Path, settings: argparse.Namespace) -> list[str]:
    """Return the words of the command that trains one network with one seed."""
    data = [str(settings.data / "train.csv"), "--val", str(settings.data / "val.csv")]
    options = [word.format(settings.decoder_embedding) for word in HEADS[head]]
    run = ["--epochs", str(settings.epochs), "--seed", str(seed), "--loss", loss, "--output", str(output)]
    return ["train-tagger", *data, *options, *TRAINING, *run]


def evaluate(folder: Path, annotations: Path) -> dict[str, float]:
    """Return mAP, CF1 and OF1 of a trained folder in percent, at its thresholds, on images not used to choose them."""
    network = load_network(f"local-dir:{folder}")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=network))
    names = tuple(network.pretrained_cfg["label_names"])
    examples = read_annotations(annotations, ReadingOptions(names=names)).examples
    targets = torch.tensor([[name in example.labels for name in names] for example in examples]).float()
    probabilities = []
    for start in range(0, len(examples), _BATCH_SIZE):
        images = [transform(read_image(example.path)) for example in examples[start : start + _BATCH_SIZE]]
        with torch.inference_mode():
            probabilities.append(network(torch.stack(images)).sigmoid())
    thresholds = torch.tensor(read_thresholds(network.pretrained_cfg, len(names)))
    return score(torch.cat(probabilities), targets, thresholds)


def measure(work: Path, settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield rows of the results, one for each seed, head and loss; rows in work are not trained again.

    Raises:
        RuntimeError: if a training fails.
    """
    for seed in range(settings.seeds):
        for head in settings.heads:
            for loss in settings.losses:
                output = work / f"{head}_{loss}_{seed}"
                note = output.with_suffix(".json")
                if not note.exists():
                    start = time.process_time()
                    with contextlib.redirect_stdout(sys.stderr):
                        status = cli.main(make_words(head, loss, seed, output, settings))
                    if status:
                        raise RuntimeError(f"the training of {output.name} ended with status {status}")
                    cpu_s = time.process_time() - start
                    row = {"row": f"{head}, {loss}", "seed": seed, "epochs": settings.epochs}
                    row |= {**evaluate(output, settings.data / "test.csv"), "cpu_s": cpu_s}
                    note.write_text(json.dumps(row))
                row = json.loads(note.read_text())
                print(f"seed {seed}, {row['row']}: mAP {row['mAP']:.2f} %", file=sys.stderr, flush=True)
                yield row


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format mean, standard deviation and range over the seeds of each head and loss as a Markdown table."""
    table = []
    for name in dict.fromkeys(row["row"] for row in rows):
        same = [row for row in rows if row["row"] == name]
        values = [row["mAP"] for row in same]
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        others = [f"{statistics.mean(row[metric] for row in same):.2f}" for metric in METRICS[1:]]
        table.append([name, f"{statistics.mean(values):.2f}", spread, f"{min(values):.2f}-{max(values):.2f}", *others])
        table[-1].append(len(values))
    return format_markdown(["", "mAP, %: mean", "standard deviation", "range", "CF1, %", "OF1, %", "seeds"], table)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print a table and write the results."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description="Heads and losses for tags on mosaics of CIFAR-10.")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="folder written by prepare.py")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="folder for trained networks, to resume from")
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--epochs", type=at_least(1), default=1)
    parser.add_argument("--decoder-embedding", type=at_least(8), default=64)
    parser.add_argument("--json", type=new_file, metavar="FILE", help="file for the results, must not exist yet")
    settings = parser.parse_args(words)
    command = format_command(__file__, words)
    packages = ("lightning", "torchvision")
    results = start_results(command, "cpu", settings, unrecorded=("data", "work"), packages=packages)
    with tempfile.TemporaryDirectory() as folder:
        try:
            results["rows"] = list(measure(settings.work or Path(folder), settings))
        except (OSError, ValueError, RuntimeError) as error:
            print(f"tagging.py: {error}", file=sys.stderr)
            return 1
    print(format_table(results["rows"]))
    if settings.json:
        write_results(results, settings.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Model cards of taggers: README.md of the folder that training writes."""

import math
import re
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCardData

from timm_tresnet.conversion.card import EMBED, PLACEHOLDER, as_code, cite, link, plain
from timm_tresnet.tagging.settings import Settings
from timm_tresnet.utils.tables import format_markdown
from timm_tresnet.utils.terminal import escape

_LOSS_PAPER, _HEAD_PAPER = "arXiv:2009.14119", "arXiv:2111.12933"
_MOST_LABELS = 1000  # rows of the table; a longer table makes the Hub's page slow

_TAG = """\
```python
import timm
import torch
from PIL import Image

from timm_tresnet.weights.labels import read_thresholds

model = timm.create_model("{model}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
image = transform(Image.open("photo.jpg").convert("RGB")).unsqueeze(0)

names = model.pretrained_cfg["label_names"]
thresholds = read_thresholds(model.pretrained_cfg, model.num_classes)
with torch.inference_mode():
    probabilities = model(image)[0].sigmoid().tolist()
for name, probability, threshold in zip(names, probabilities, thresholds):
    if probability >= threshold:
        print(name, probability)
```"""
_COMMANDS = """\
```bash
timm-tresnet classify --model {model} photo.jpg
timm-tresnet export {model} --format onnx --output tagger.onnx
```"""


@dataclass(frozen=True)
class Training:
    """How a tagger was trained, and its scores.

    Args:
        labels: names of the outputs.
        thresholds: the least probability with which an image has each label.
        average_precisions: average precision of each label on the held-out images, from 0 to 1; NaN if no image has it.
        scores: mAP, CF1 and OF1 on the held-out images at these thresholds, in percent.
        label_counts: number of training images with each label.
        images: number of training images and of held-out images.
        data: annotations files of the training and of the held-out images.
        settings: the training settings.
        head: name of the network's head.
        epoch: epoch of the weights.
        averaged: whether the weights are the moving average.
        image_size: side of the images, in pixels.
        command: the command that made the tagger, quoted for a shell.
    """

    labels: tuple[str, ...]
    thresholds: list[float]
    average_precisions: list[float]
    scores: dict[str, float]
    label_counts: list[int]
    images: tuple[int, int]
    data: tuple[str, str]
    settings: Settings
    head: str
    epoch: int
    averaged: bool
    image_size: int
    command: str


def make_card(training: Training, architecture: str) -> str:
    """Return the model card of a tagger: the Hub's metadata, then Markdown."""
    metadata = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "tresnet", "multi-label"],
    )
    papers = [_LOSS_PAPER] if training.settings.loss == "asl" else []
    if training.head == "ml_decoder":
        papers.append(_HEAD_PAPER)
    sections = [
        f"# {plain(architecture)}",
        f"A multi-label image classifier: TResNet ({link('arXiv:2003.13630')}), variant {as_code(architecture)}, head "
        f"{as_code(training.head)}, for timm with the plugin timm-tresnet.",
        format_markdown(["", ""], _tabulate(training)),
        "## Use",
        "With timm and timm-tresnet installed; preprocessing, labels and thresholds come with the weights.",
        _COMMANDS.format(model=PLACEHOLDER),
        _TAG.format(model=PLACEHOLDER),
        "### Embeddings",
        EMBED.format(model=PLACEHOLDER),
        "## Training",
        _explain_training(training),
        "## Labels",
        _tabulate_labels(training),
        "## Licence",
        "Not set yet. Name the licence here and in the metadata above before you publish these weights.",
        "## Citation",
        cite(papers),
    ]
    return f"---\n{metadata.to_yaml()}\n---\n" + "\n\n".join(sections) + "\n"


def _tabulate(training: Training) -> list[tuple[str, object]]:
    size = training.image_size
    return [
        ("labels", len(training.labels)),
        ("outputs", "one sigmoid a label; an image can have any number of labels"),
        ("image", f"RGB, resized to {size} × {size} pixels whatever its shape (bilinear)"),
        *((f"{name} on held-out images", f"{value:.2f} %") for name, value in training.scores.items()),
    ]


def _explain_training(training: Training) -> str:
    (trained, held_out), (train_data, held_out_data) = training.images, map(localise, training.data)
    weights = f"Moving average of the weights (decay {training.settings.ema_decay})" if training.averaged else "Weights"
    text = (
        f"{trained} images of {as_code(train_data)}, {held_out} images of {as_code(held_out_data)} held out. {weights} "
        f"after epoch {training.epoch} of {training.settings.epochs}, the best on the held-out images. Each label's "
        "threshold was chosen for its best F1 on the same images. Expect lower scores on images that played no part in "
        "these choices."
    )
    return text + show_command(training.command)


def show_command(command: str) -> str:
    """Return a shell command as a Markdown code block; "" if there is no command."""
    words = " ".join(_quote(localise(word)) for word in shlex.split(command))
    return f"\n\n```bash\n{words}\n```" if words else ""


def localise(word: str) -> str:
    """Reduce an absolute path in a word of a command line to its last name, since cards are published."""
    match: Any = re.match(r"(--[\w-]+=)?(local-dir:)?", word)  # never None: the pattern matches ""
    path = word[match.end() :]
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(path).is_absolute():
            return match[0] + (kind(path).name or ".")
    return word


def _quote(word: str) -> str:
    """Quote a word for a shell, in one line."""
    if escape(word) == word:
        return shlex.quote(word)
    return "$'" + escape(word.replace("\\", r"\\").replace("'", r"\'")) + "'"


def _tabulate_labels(training: Training) -> str:
    rows = [
        (plain(name), count, "" if math.isnan(precision) else f"{precision:.1%}", f"{threshold:.3g}")
        for name, count, precision, threshold in zip(
            training.labels, training.label_counts, training.average_precisions, training.thresholds, strict=True
        )
    ]
    table = format_markdown(["label", "training images", "average precision", "threshold"], rows[:_MOST_LABELS])
    left = len(rows) - _MOST_LABELS
    return f"{table}\n\nand {left} more, which `config.json` names." if left > 0 else table

"""Model cards of classifiers: the README.md of the folder that `timm-tresnet train` ends with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from timm_tresnet.conversion.card import CLASSIFY, EMBED, PLACEHOLDER, as_code, cite, link, plain
from timm_tresnet.tagging.card import localise, show_command
from timm_tresnet.tagging.settings import ClassSettings
from timm_tresnet.utils.tables import format_markdown

_MOST_CLASSES = 1000  # rows of the table; a page of the Hub with more is slow
_COMMANDS = """\
```bash
timm-tresnet classify --model {model} photo.jpg
timm-tresnet demo --model {model}
timm-tresnet export {model} --format onnx --output classifier.onnx
```"""


@dataclass(frozen=True)
class ClassTraining:
    """How a classifier was trained, and how good it is.

    Args:
        labels: its classes, one for each output.
        accuracies: share of the held-out images of each class that it gets right; NaN where there are none.
        scores: top-1 and top-5 on the held-out images, in percent.
        label_counts: how many training images each class has.
        images: number of images to train on, and of those held out.
        data: names of their folders.
        settings: of the training.
        head: of the network.
        epoch: whose weights these are.
        averaged: whether they are the moving average.
        pretrained_cfg: how images are prepared.
        command: with which it was made.
    """

    labels: tuple[str, ...]
    accuracies: list[float]
    scores: dict[str, float]
    label_counts: list[int]
    images: tuple[int, int]
    data: tuple[str, str]
    settings: ClassSettings
    head: str
    epoch: int
    averaged: bool
    pretrained_cfg: Mapping[str, Any]
    command: str


def make_class_card(training: ClassTraining, architecture: str) -> str:
    """Write the model card of a classifier: metadata as the Hub reads it, then Markdown."""
    metadata = ModelCardData(
        library_name="timm", pipeline_tag="image-classification", tags=["image-classification", "timm", "tresnet"]
    )
    examples = {"model": PLACEHOLDER, "activation": "softmax(-1)", "top": min(5, len(training.labels))}
    sections = [
        f"# {plain(architecture)}",
        f"An image classifier: TResNet ({link('arXiv:2003.13630')}), variant {as_code(architecture)}, head "
        f"{as_code(training.head)}, for timm with the plugin timm-tresnet.",
        format_markdown(["", ""], _tabulate(training)),
        "## Use",
        "With timm and timm-tresnet installed; preprocessing and class names come with the weights.",
        _COMMANDS.format(model=PLACEHOLDER),
        CLASSIFY.format(**examples),
        "### Embeddings",
        EMBED.format(model=PLACEHOLDER),
        "## Training",
        _explain_training(training),
        "## Classes",
        _tabulate_classes(training),
        "## Licence",
        "Not said yet: whoever publishes these weights names it, in the metadata above too.",
        "## Citation",
        cite(["arXiv:2111.12933"] if training.head == "ml_decoder" else []),
    ]
    return f"---\n{metadata.to_yaml()}\n---\n" + "\n\n".join(sections) + "\n"


def _tabulate(training: ClassTraining) -> list[tuple[str, object]]:
    config = training.pretrained_cfg
    size = config["input_size"][-1]
    if config["crop_mode"] == "squash":
        resizing = f"resized to {size} × {size} pixels whatever its shape"
    else:
        shorter = math.floor(size / config["crop_pct"])
        resizing = f"shorter side resized to {shorter} pixels, then the central {size} × {size}"
    return [
        ("classes", len(training.labels)),
        ("image", f"RGB, {resizing} ({config['interpolation']}); mean {config['mean']}, std {config['std']}"),
        *((f"{name} on held-out images", f"{value:.2f} %") for name, value in training.scores.items()),
    ]


def _explain_training(training: ClassTraining) -> str:
    (trained, held_out), (train_data, held_out_data) = training.images, map(localise, training.data)
    weights = f"Moving average of the weights (decay {training.settings.ema_decay})" if training.averaged else "Weights"
    text = (
        f"{trained} images of {as_code(train_data)}, {held_out} images of {as_code(held_out_data)} held out. {weights} "
        f"after epoch {training.epoch} of {training.settings.epochs}, the best on the held-out images; on images that "
        "chose nothing, figures will be lower."
    )
    return text + show_command(training.command)


def _tabulate_classes(training: ClassTraining) -> str:
    rows = [
        (plain(name), count, "" if math.isnan(accuracy) else f"{accuracy:.1%}")
        for name, count, accuracy in zip(training.labels, training.label_counts, training.accuracies, strict=True)
    ]
    table = format_markdown(["class", "training images", "right on held-out images"], rows[:_MOST_CLASSES])
    left = len(rows) - _MOST_CLASSES
    return f"{table}\n\nand {left} more, which `config.json` names." if left > 0 else table

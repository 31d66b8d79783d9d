"""Model cards of classifiers: README.md of the folder that `timm-tresnet train` writes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from timm_tresnet.conversion.card import CLASSIFY, EMBED, PLACEHOLDER, as_code, cite, link, plain
from timm_tresnet.tagging.card import localise, show_command
from timm_tresnet.tagging.settings import ClassSettings
from timm_tresnet.utils.tables import format_markdown

_MOST_CLASSES = 1000  # rows of the table; a longer table makes the Hub's page slow
_COMMANDS = """\
```bash
timm-tresnet classify --model {model} photo.jpg
timm-tresnet demo --model {model}
timm-tresnet export {model} --format onnx --output classifier.onnx
```"""


@dataclass(frozen=True)
class ClassTraining:
    """How a classifier was trained, and its scores.

    Args:
        labels: names of the classes, one for each output.
        accuracies: accuracy on the held-out images of each class, from 0 to 1; NaN if there are none.
        scores: top-1 and top-5 accuracy on the held-out images, in percent.
        label_counts: number of training images of each class.
        images: number of training images and of held-out images.
        data: folders of the training and of the held-out images.
        settings: the training settings.
        head: name of the network's head.
        epoch: epoch of the weights.
        averaged: whether the weights are the moving average.
        pretrained_cfg: timm's pretrained config, with the preprocessing.
        command: the command that made the classifier, quoted for a shell.
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
    """Return the model card of a classifier: the Hub's metadata, then Markdown."""
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
        "Not set yet. Name the licence here and in the metadata above before you publish these weights.",
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
        f"after epoch {training.epoch} of {training.settings.epochs}, the best on the held-out images. Expect lower "
        "scores on images that played no part in this choice."
    )
    return text + show_command(training.command)


def _tabulate_classes(training: ClassTraining) -> str:
    rows = [
        (plain(name), count, "" if math.isnan(accuracy) else f"{accuracy:.1%}")
        for name, count, accuracy in zip(training.labels, training.label_counts, training.accuracies, strict=True)
    ]
    table = format_markdown(["class", "training images", "accuracy on held-out images"], rows[:_MOST_CLASSES])
    left = len(rows) - _MOST_CLASSES
    return f"{table}\n\nand {left} more, which `config.json` names." if left > 0 else table

"""Validate a network on annotated images."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_tresnet.conversion.reading import shorten_names
from timm_tresnet.tagging.annotations import Annotations, Example, fold_name
from timm_tresnet.tagging.data import LabelledImages, collate_mixed, make_loader
from timm_tresnet.tagging.scores import (
    UNKNOWN,
    average_precisions,
    choose_top,
    decide,
    find_measurable,
    score_ranking,
    score_top,
)
from timm_tresnet.utils.stacks import Mixed
from timm_tresnet.weights.aspect_ratio import make_transform
from timm_tresnet.weights.labels import label_lookup, list_names, read_thresholds
from timm_tresnet.weights.preprocessing import resolve_preprocessing

THRESHOLD = 0.5  # for labels without a threshold of their own


@dataclass(frozen=True)
class Matching:
    """Which output of a network belongs to each label of annotations.

    Args:
        outputs: index of the output by the label's name.
        unknown: labels without an output.
        missing: outputs without a label, which cannot be measured.
    """

    outputs: dict[str, int]
    unknown: tuple[str, ...]
    missing: tuple[int, ...]


def match_labels(names: Sequence[str], network: Any, by_order: bool = False) -> Matching:
    """Match labels to a network's outputs: by name, by description, then by description regardless of case.

    If nothing matches and all labels are numbers, they are indices of outputs.

    Args:
        names: the annotations' labels, in order.
        network: its pretrained config names the outputs, or its classes are those of an ImageNet subset.
        by_order: match labels to outputs in order instead, as timm's validate.py does with folders.

    Raises:
        ValueError: if no label matches or, with by_order, the numbers of labels and outputs differ.
    """
    count, known = network.num_classes, list_names(network)
    if by_order:
        if len(names) != count:
            raise ValueError(f"--by-order needs as many labels as the network has outputs, {count}, got {len(names)}")
        outputs = {name: index for index, name in enumerate(names)}
    else:
        outputs = dict(_find_by_name(names, known))
    if not outputs and all(name.isdecimal() and int(name) < count for name in names):
        outputs = {name: int(name) for name in names}
    if not outputs:
        own = [each[-1] for each in known if each]
        raise ValueError(
            f"none of the labels {shorten_names(names)} is among the network's {count} labels"
            f"{f', {shorten_names(own)}' if own else ', which have no names'}; match labels by position with --by-order"
        )
    unknown = tuple(name for name in names if name not in outputs)
    return Matching(outputs, unknown, tuple(sorted(set(range(count)) - set(outputs.values()))))


def _find_by_name(names: Iterable[str], known: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, int]]:
    tables = [
        _index((each[0], index) for index, each in enumerate(known) if each),
        _index((each[-1], index) for index, each in enumerate(known) if each),
        _index((fold_name(each[-1]), index) for index, each in enumerate(known) if each),
    ]
    for name in names:
        found = (table.get(key) for table, key in zip(tables, (name, name, fold_name(name)), strict=True))
        index = next((each for each in found if each is not None), None)
        if index is not None:
            yield name, index


def _index(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return the index of each name, without names that occur several times."""
    pairs = list(pairs)
    counts = Counter(name for name, _ in pairs)
    return {name: index for name, index in pairs if counts[name] == 1}


@dataclass(frozen=True)
class Outputs:
    """A network's outputs for annotated images.

    Args:
        logits: (N, labels), on the CPU, of the readable images.
        targets: 1, 0 or -1, (N, labels).
        unreadable: the unreadable files.
    """

    logits: Tensor
    targets: Tensor
    unreadable: tuple[Path, ...]


def run_network(
    network: Any,
    annotations: Annotations,
    matching: Matching,
    run: Callable[[Tensor | Mixed], Tensor],
    *,
    batch_size: int = 32,
    workers: int = 0,
    as_stored: bool = False,
    multiple: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Outputs:
    """Run a network on annotated images with the preprocessing of its pretrained config.

    Args:
        network: a model from `timm.create_model`.
        annotations: the images and their labels.
        matching: matches labels to the network's outputs, from `match_labels`.
        run: computes logits (N, labels) from pixels, see `timm_tresnet.deployment.running.Runner`.
        batch_size: images in a batch.
        workers: processes that read images; 0 to read in this process.
        as_stored: read images as timm's scripts do, see `timm_tresnet.utils.images.read_image`.
        multiple: keep the aspect ratio, see `timm_tresnet.weights.aspect_ratio.make_transform`.
        advance: called after each batch with its number of images.

    Raises:
        ValueError: if no image can be read, or the network's logits are not finite.
    """
    config = resolve_preprocessing(network)
    names = [str(index) for index in range(network.num_classes)]
    examples = [_number_labels(example, matching.outputs) for example in annotations.examples]
    transform = make_transform(config, multiple)
    in_chans, *size = config["input_size"]
    images = LabelledImages(examples, names, transform, tuple(size), as_stored=as_stored, in_chans=in_chans)
    logits, targets, readable = [], [], []
    for batch in make_loader(images, batch_size, False, workers, 0, 1, 0, collate=collate_mixed):
        logits.append(run(batch["image"]))
        targets.append(batch["target"].to(torch.int8))
        readable.append(batch["readable"])
        advance(len(readable[-1]))
    kept = torch.cat(readable)
    if not kept.any():
        raise ValueError("none of the images can be read")
    all_logits, all_targets = torch.cat(logits)[kept], torch.cat(targets)[kept]
    wrong = ~all_logits.isfinite().all(1)
    if wrong.any():
        raise ValueError(f"the network's logits for {int(wrong.sum())} of {len(wrong)} images are not finite")
    all_targets[:, list(matching.missing)] = UNKNOWN
    unreadable = tuple(path for path, good in zip(images.paths, kept.tolist(), strict=True) if not good)
    return Outputs(all_logits, all_targets, unreadable)


def _number_labels(example: Example, outputs: dict[str, int]) -> Example:
    labels = tuple(dict.fromkeys(str(outputs[name]) for name in example.labels if name in outputs))
    if example.absent is None:
        return replace(example, labels=labels)
    absent = {str(outputs[name]) for name in example.absent if name in outputs}
    return replace(example, labels=labels, absent=tuple(sorted(absent - set(labels))))


def measure(network: Any, outputs: Outputs, top_k: int, multi_label: bool) -> dict[str, Any]:
    """Compute the metrics of a network's outputs.

    Args:
        network: the network, for its thresholds and label names.
        outputs: from `run_network`.
        top_k: number of labels chosen for each image in the "top K" decisions.
        multi_label: whether an image can have any number of labels, each with a sigmoid.

    Returns:
        "images", "labels" and "measured_labels" are counts. "scores" has metrics in percent. For multi-label networks,
        "decisions" has precision, recall and F1 in percent for each way of choosing labels, and "per_label" is a list
        with a dict for each measured label.

    Raises:
        ValueError: if no label is measurable.
    """
    logits, targets = outputs.logits, outputs.targets
    measurable = find_measurable(targets) if multi_label else (targets == 1).any(0)
    if not measurable.any():
        raise ValueError(
            "validation needs a label that some images have and, unless it is known for all images, that some lack; "
            "got none"
        )
    counts = {"labels": targets.shape[1], "measured_labels": int(measurable.sum())}
    if not multi_label:
        one = (targets == 1).any(1)
        scores = score_top(logits[one], targets[one])
        return {"images": int(one.sum()), **counts, "scores": scores}
    probabilities = logits.sigmoid()
    own = read_thresholds(network.pretrained_cfg, network.num_classes)
    ways = {f"probability >= {THRESHOLD}": probabilities >= THRESHOLD}
    if own is not None:
        ways["own thresholds"] = probabilities >= torch.tensor(own)
    ways[f"top {top_k}"] = choose_top(probabilities, top_k)
    decisions = {way: decide(chosen, targets).score() for way, chosen in ways.items()}
    return {
        "images": len(logits),
        **counts,
        "scores": score_ranking(probabilities, targets),
        "decisions": decisions,
        "per_label": _measure_labels(network, probabilities, targets, own),
    }


def _measure_labels(
    network: Any, probabilities: Tensor, targets: Tensor, own: list[float] | None
) -> list[dict[str, Any]]:
    """Return a dict for each measurable label; its decisions use its own threshold."""
    describe = label_lookup(network)
    thresholds = own or [THRESHOLD] * network.num_classes
    decisions = decide(probabilities >= torch.tensor(thresholds), targets)
    precisions = average_precisions(probabilities, targets).tolist()
    indices = find_measurable(targets).nonzero().flatten().tolist()
    columns = (decisions.precision.tolist(), decisions.recall.tolist(), decisions.f1.tolist())
    return [
        {
            "label": describe(index),
            "index": index,
            "images": int((targets[:, index] == 1).sum()),
            "known_absent": int((targets[:, index] == 0).sum()),
            "average_precision": precisions[index],
            "threshold": thresholds[index],
            "precision": precision,
            "recall": recall,
            "f1": f1,
        }
        for index, precision, recall, f1 in zip(indices, *columns, strict=True)
    ]

"""How good a network is on annotated images."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm.data
import torch
from torch import Tensor

from timm_tresnet.conversion.reading import name_some
from timm_tresnet.tagging.annotations import Annotations, Example
from timm_tresnet.tagging.data import LabelledImages, make_loader
from timm_tresnet.tagging.scores import (
    UNKNOWN,
    average_precisions,
    choose_top,
    decide,
    find_measurable,
    score_ranking,
    score_top,
)
from timm_tresnet.weights.labels import label_lookup, list_names, read_thresholds
from timm_tresnet.weights.preprocessing import resolve_preprocessing

THRESHOLD = 0.5  # of labels that have none of their own


@dataclass(frozen=True)
class Matching:
    """Which output of a network each label of annotations is.

    Args:
        outputs: by the label's name.
        unknown: labels that the network lacks.
        missing: outputs that the annotations lack, which cannot be measured.
    """

    outputs: dict[str, int]
    unknown: tuple[str, ...]
    missing: tuple[int, ...]


def match_labels(names: Sequence[str], network: Any, by_order: bool = False) -> Matching:
    """Find labels among the outputs of a network: by name, by description, and then whatever the case.

    Numbers that are no names are those of the outputs.

    Args:
        names: the annotations' labels, in their order.
        network: whose pretrained config names its outputs, or has the classes of one of ImageNet's sets.
        by_order: take the labels to be the outputs in order instead, as timm's validate.py takes folders.

    Raises:
        ValueError: if no label is found, or there are not as many as outputs to be taken in order.
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
            f"none of the labels {name_some(names)} is among the {count} of the network"
            f"{f', {name_some(own)}' if own else ', which have no names'}; --by-order takes as many as it has in order"
        )
    unknown = tuple(name for name in names if name not in outputs)
    return Matching(outputs, unknown, tuple(sorted(set(range(count)) - set(outputs.values()))))


def _find_by_name(names: Iterable[str], known: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, int]]:
    tables = [
        _index((each[0], index) for index, each in enumerate(known) if each),
        _index((each[-1], index) for index, each in enumerate(known) if each),
        _index((_fold(each[-1]), index) for index, each in enumerate(known) if each),
    ]
    for name in names:
        found = (table.get(key) for table, key in zip(tables, (name, name, _fold(name)), strict=True))
        index = next((each for each in found if each is not None), None)
        if index is not None:
            yield name, index


def _index(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Positions by name, without names that several have."""
    pairs = list(pairs)
    counts = Counter(name for name, _ in pairs)
    return {name: index for name, index in pairs if counts[name] == 1}


def _fold(name: str) -> str:
    return name.casefold().replace("_", " ")


@dataclass(frozen=True)
class Outputs:
    """What a network says about annotated images.

    Args:
        logits: (N, labels), on the CPU, of images that could be read.
        targets: 1, 0 or -1, (N, labels).
        unreadable: files of the others.
    """

    logits: Tensor
    targets: Tensor
    unreadable: tuple[Path, ...]


def run_network(
    network: Any,
    annotations: Annotations,
    matching: Matching,
    run: Callable[[Tensor], Tensor],
    *,
    batch_size: int = 32,
    workers: int = 0,
    as_stored: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> Outputs:
    """Run a network on annotated images, prepared as its pretrained config says.

    Args:
        network: a model from `timm.create_model`.
        annotations: of the images.
        matching: of their labels and the network's outputs.
        run: gives its logits, see `timm_tresnet.deployment.running.Runner`.
        batch_size: images in a batch.
        workers: processes that read images.
        as_stored: read images as timm's scripts do.
        advance: is told after each batch how many images that were.

    Raises:
        ValueError: if no image can be read, or the network's logits are not finite.
    """
    config = resolve_preprocessing(network)
    names = [str(index) for index in range(network.num_classes)]
    examples = [_number_labels(example, matching.outputs) for example in annotations.examples]
    transform = timm.data.create_transform(**config)
    in_chans, *size = config["input_size"]
    images = LabelledImages(examples, names, transform, tuple(size), as_stored=as_stored, in_chans=in_chans)
    logits, targets, readable = [], [], []
    for batch in make_loader(images, batch_size, False, workers, 0, 1, 0):
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
        raise ValueError(f"the network's logits of {int(wrong.sum())} of {len(wrong)} images are not finite")
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
    """Figures of a network's outputs.

    Args:
        network: that gave them.
        outputs: of `run_network`.
        top_k: how many labels an image is said to have, for the figures of the most probable ones.
        multi_label: whether each output has a sigmoid, so that an image can have any number of labels.

    Returns:
        "images"; "labels" and "measured_labels", how many there are; "scores" in percent; and, where an image can have
        any number of labels, "decisions", precision, recall and F1 by how labels are chosen, and "per_label", a list
        of dicts.

    Raises:
        ValueError: if nothing can be measured.
    """
    logits, targets = outputs.logits, outputs.targets
    measurable = find_measurable(targets) if multi_label else (targets == 1).any(0)
    if not measurable.any():
        raise ValueError("no label can be measured: no image has one, or where it does, none is known to lack it")
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
    """A dict for each label that can be measured, with decisions at its own threshold."""
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

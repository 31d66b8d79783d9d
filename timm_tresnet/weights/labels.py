"""What the classes of weights are called, in the order of their outputs, and whether an image can have several."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from timm_tresnet.utils.schema import find_fault, list_of, number

# Of timm's pretrained config, whose fields are fixed, only the notes can say it and reach `model.pretrained_cfg` from
# the registry, the Hub and a folder alike.
MULTI_LABEL = "multi-label"
_THRESHOLDS = "thresholds: "  # before a JSON list with one for each label, in another note

# MS-COCO's 80 "thing" categories by ascending category id, which is how ASL and ML-Decoder number them
# (`CocoDetection.cat2cat` in their helper_functions.py); names from COCO's instances_val2014.json.
_COCO = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier,
toothbrush
"""

# PASCAL VOC's 20 classes in the order of its development kit (VOCinit.m), which is alphabetical. ASL published no code
# for VOC: where a checkpoint has its own `idx_to_class`, that goes first.
_VOC = """
aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike, person,
pottedplant, sheep, sofa, train, tvmonitor
"""

_LISTS = {"coco": _COCO, "voc": _VOC}
_IMAGENET_SUBSETS = {"imagenet-1k": "imagenet-1k", "imagenet-21k-p": "imagenet-21k-miil"}  # ours: timm's
LABEL_SETS = (*_IMAGENET_SUBSETS, *_LISTS)


def label_config(labels: str) -> dict[str, Any]:
    """Name the classes of a label set as timm's config.json does.

    ImageNet's classes are WordNet synsets, which timm lists (`timm.data.ImageNetInfo`).

    Args:
        labels: one of `LABEL_SETS`.

    Returns:
        "label_names", a list with one name for each output of the network, and, where names are identifiers,
        "label_descriptions", a dict from name to words.

    Raises:
        ValueError: if labels is not one of `LABEL_SETS`.
    """
    if labels in _IMAGENET_SUBSETS:
        from timm.data import ImageNetInfo

        info = ImageNetInfo(_IMAGENET_SUBSETS[labels])
        return {
            "label_names": list(info.label_names()),
            "label_descriptions": info.label_descriptions(as_dict=True),
        }
    if labels in _LISTS:
        return {"label_names": [name.strip() for name in _LISTS[labels].split(",")]}
    raise ValueError(f"label_config needs one of {', '.join(LABEL_SETS)}, got {labels!r}")


def label_lookup(model: Any) -> Callable[[int], str]:
    """Names of the classes: from the weights' config, else from timm's lists for ImageNet, else numbers."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    config = model.pretrained_cfg
    names = config.get("label_names")
    if names and len(names) == model.num_classes:  # else the classifier has been replaced
        descriptions = config.get("label_descriptions") or {}
        return lambda index: descriptions.get(names[index], names[index])
    subset = infer_imagenet_subset(model)
    if subset:
        return ImageNetInfo(subset).index_to_description
    return lambda index: f"class {index}"


def is_multi_label(pretrained_cfg: Mapping[str, Any]) -> bool:
    """Whether an image can have any number of the classes, each with a sigmoid, as the weights' config says."""
    return MULTI_LABEL in (pretrained_cfg.get("notes") or ())


def make_notes(multi_label: bool, thresholds: Sequence[float] | None = None) -> tuple[str, ...]:
    """Notes of a pretrained config.

    Args:
        multi_label: whether an image can have any number of the classes.
        thresholds: from which probability on an image has each label; None if nobody says.
    """
    notes = [MULTI_LABEL] if multi_label else []
    if thresholds is not None:
        notes.append(_THRESHOLDS + json.dumps([float(f"{threshold:.6g}") for threshold in thresholds]))
    return tuple(notes)


def read_thresholds(pretrained_cfg: Mapping[str, Any], num_classes: int) -> list[float] | None:
    """From which probability on an image has each label, as the weights' config says; None if it does not.

    Args:
        pretrained_cfg: of the network.
        num_classes: number of labels; thresholds for another number belong to a classifier that has been replaced.

    Raises:
        ValueError: if the note is not one that `make_notes` writes.
    """
    notes = pretrained_cfg.get("notes") or ()
    for note in (notes,) if isinstance(notes, str) else notes:
        if note.startswith(_THRESHOLDS):
            fault = None
            try:
                thresholds = json.loads(note.removeprefix(_THRESHOLDS))
                fault = find_fault(thresholds, list_of(number(0, 1), 0, 1_000_000), "the note of thresholds")
            except ValueError as error:
                fault = f"needs the note of thresholds to be JSON: {error}"
            if fault:
                raise ValueError(fault)
            return thresholds if len(thresholds) == num_classes else None
    return None

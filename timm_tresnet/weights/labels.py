"""Names of classes in the order of a network's outputs, multi-label flags and thresholds."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm_tresnet.utils.files import read_bounded
from timm_tresnet.utils.notes import MULTI_LABEL, NAMED_BY, THRESHOLDS, read_notes
from timm_tresnet.utils.schema import LARGEST_FILE, TEXT, find_fault, format_value, list_of, number, read_json

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
# for VOC; a checkpoint's own `idx_to_class` takes precedence.
_VOC = """
aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike, person,
pottedplant, sheep, sofa, train, tvmonitor
"""

_LISTS = {"coco": _COCO, "voc": _VOC}
_IMAGENET_SUBSETS = {"imagenet-1k": "imagenet-1k", "imagenet-21k-p": "imagenet-21k-miil"}  # ours: timm's
LABEL_SETS = (*_IMAGENET_SUBSETS, *_LISTS)


def label_config(labels: str) -> dict[str, Any]:
    """Return the class names of a label set in the form of timm's config.json.

    ImageNet's classes are WordNet synsets, listed by timm (`timm.data.ImageNetInfo`).

    Args:
        labels: one of `LABEL_SETS`.

    Returns:
        "label_names", a list with a name for each output, and, if names are identifiers, "label_descriptions", a dict
        from name to description.

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
    """Return a function from output index to class name.

    Names come from the weights' config, else from timm's lists for ImageNet; else classes are numbered.
    """
    return _find_labels(model)[0]


def describe_labels(model: Any) -> str:
    """Return the source of `label_lookup`'s names in a few words; "" if the weights' config has names without one."""
    return _find_labels(model)[1]


def _find_labels(model: Any) -> tuple[Callable[[int], str], str]:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    config = model.pretrained_cfg
    names = config.get("label_names")
    if names and len(names) == model.num_classes:
        descriptions = config.get("label_descriptions") or {}
        said = [note for note in read_notes(config) if note.startswith(NAMED_BY)]
        source = f"{said[0].removeprefix(NAMED_BY)}, in the weights' config" if said else ""
        return (lambda index: descriptions.get(names[index], names[index])), source
    fault = f"the weights' config has {len(names)} names for {model.num_classes} classes; " if names else ""
    subset = infer_imagenet_subset(model)
    if subset:
        return ImageNetInfo(
            subset
        ).index_to_description, f"{fault}timm's list for {model.num_classes} classes, {subset}"
    return (lambda index: f"class {index}"), f"{fault}no names are known, classes are numbered"


def note_source(source: str) -> str:
    """Return a note for the pretrained config with the source of the class names."""
    return NAMED_BY + source


def join_source(source: str, gap: str) -> str:
    """Return the source of class names with the gap, how many classes have names, if there is one."""
    return f"{source} ({gap})" if gap else source


def order_names(in_file: Any, num_classes: int) -> tuple[tuple[str, ...], str]:
    """Return class names in the order of the outputs, or the reason why there are none.

    Outputs without a name are called "class 10" and so on.

    Args:
        in_file: a list of names, a dict from index to name, or a dict from name to index; indices can be text, as in
            JSON.
        num_classes: number of outputs.

    Returns:
        Names, and "" or how many outputs have a name; or () and the fault, which follows "it".
    """
    if not isinstance(in_file, Mapping | list | tuple):
        return (), f"needs a dict or a list of names, got {type(in_file).__name__}"
    if not in_file or len(in_file) > num_classes:
        return (), f"needs {num_classes} names, one for each class, got {len(in_file)}"
    names: dict[int | None, Any] = dict(enumerate(in_file))
    if isinstance(in_file, Mapping):
        # The official `infer.py` uses the order of insertion, which is the same only if the keys ascend.
        for pairs in (in_file.items(), [(index, name) for name, index in in_file.items()]):
            names = {_read_index(index): name for index, name in pairs}
            each_its_own = len(names) == len(in_file) and names.keys() <= set(range(num_classes))
            if each_its_own and all(isinstance(name, str) for name in names.values()):
                break
        else:
            return (), f"needs the keys 0 to {num_classes - 1}"
    for index, name in names.items():
        if not TEXT.fits(name) or not name.strip():
            shown = format_value(name) if isinstance(name, str) else type(name).__name__
            return (), f"needs name {index} to be {TEXT.description}, got {shown}"
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        return (), f"needs a name for each class, got {', '.join(twice[:5])} more than once"
    unnamed = [index for index in range(num_classes) if index not in names]
    word = "class" if {f"class {index}" for index in unnamed}.isdisjoint(names.values()) else "unnamed class"
    complete = tuple(names.get(index, f"{word} {index}") for index in range(num_classes))
    return complete, f"{len(names)} names for {num_classes} classes, the rest are numbered" if unnamed else ""


def read_labels(path: Path) -> Any:
    """Read class names from a file, for `order_names`.

    Args:
        path: text with a name on each line, or JSON with a list of names or a dict between names and indices.

    Raises:
        OSError: if the file does not exist or may not be read.
        ValueError: if it is not a regular file, too large, not text in UTF-8, or not JSON.
    """
    if path.suffix.lower() == ".json":
        return read_json(path)
    try:
        text = read_bounded(path, LARGEST_FILE).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error
    return [line.strip() for line in text.rstrip().split("\n")]


def _read_index(key: Any) -> int | None:
    """Return an output's index from a key, which is text in JSON; None if it is not an index."""
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10:
        return int(key)
    return key if type(key) is int else None


def list_names(model: Any) -> list[tuple[str, ...]]:
    """Return all names of each class, identifier before description; () for each class if no names are known."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    config, count = model.pretrained_cfg, model.num_classes
    names, descriptions = config.get("label_names"), config.get("label_descriptions") or {}
    if not names or len(names) != count:
        subset = infer_imagenet_subset(model)
        if not subset:
            return [()] * count
        info = ImageNetInfo(subset)
        names, descriptions = info.label_names(), info.label_descriptions(as_dict=True)
    return [tuple(dict.fromkeys((name, descriptions.get(name, name)))) for name in names]


def list_identifiers(model: Any) -> list[str] | None:
    """Return the identifier of each class, such as WordNet's of ImageNet; None if names are all there is."""
    known = list_names(model)
    found = [names[0] for names in known if names]
    described = any(len(names) > 1 for names in known)
    return found if described and len(set(found)) == len(known) else None


def is_multi_label(pretrained_cfg: Mapping[str, Any]) -> bool:
    """Return whether the weights are multi-label: an image has any number of classes, each with a sigmoid."""
    return MULTI_LABEL in read_notes(pretrained_cfg)


def make_notes(multi_label: bool, thresholds: Sequence[float] | float | None = None) -> tuple[str, ...]:
    """Make notes for a pretrained config.

    Args:
        multi_label: whether an image can have any number of classes.
        thresholds: the least probability with which an image has each label, a list or one number for all; None if
            unset.
    """
    notes = [MULTI_LABEL] if multi_label else []
    if thresholds is not None:
        if isinstance(thresholds, float | int):
            rounded: Any = float(f"{thresholds:.6g}")
        else:
            rounded = [float(f"{threshold:.6g}") for threshold in thresholds]
        notes.append(THRESHOLDS + json.dumps(rounded))
    return tuple(notes)


def read_thresholds(pretrained_cfg: Mapping[str, Any], num_classes: int) -> list[float] | None:
    """Return the threshold of each label, the least probability with which an image has it; None if unset.

    Args:
        pretrained_cfg: timm's pretrained config of the network.
        num_classes: number of labels; thresholds for another number belong to a replaced classifier and are ignored.

    Raises:
        ValueError: if the note does not have the form that `make_notes` writes.
    """
    for note in read_notes(pretrained_cfg):
        if note.startswith(THRESHOLDS):
            fault = None
            try:
                thresholds = json.loads(note.removeprefix(THRESHOLDS))
                kind = number(0, 1).or_else(list_of(number(0, 1), 0, 1_000_000))
                fault = find_fault(thresholds, kind, "the note of thresholds")
            except ValueError as error:
                fault = f"needs the note of thresholds to be JSON: {error}"
            if fault:
                raise ValueError(fault)
            if not isinstance(thresholds, list):  # one threshold for all labels
                thresholds = [float(thresholds)] * pretrained_cfg.get("num_classes", num_classes)
            return thresholds if len(thresholds) == num_classes else None
    return None

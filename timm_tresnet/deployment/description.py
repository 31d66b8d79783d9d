"""The description of an artifact's input and output, stored in a JSON file beside it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm_tresnet.utils.schema import FLAG, TEXT, Kind, Table, choice, find_fault, integer, list_of, number
from timm_tresnet.weights.config import PREPROCESSING

AXES = ("batch", "channels", "height", "width")  # axes of the images; in the file, a name stands for a dynamic axis
_SIDE = integer(1, 65536)


def _is_shape(value: Any) -> bool:
    sides = [_SIDE.or_else(choice(name)) if name != "channels" else _SIDE for name in AXES]
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(side.fits(each) for side, each in zip(sides, value, strict=True))
    )


def _is_output(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and integer(0, 1_000_000).fits(value[1])


_TABLE = Table(
    {
        "model": TEXT,
        "format": TEXT,
        "precision": choice("float32", "int8"),
        "input": Table(
            {
                "shape": Kind("batch, channels, height and width, each a number or, if dynamic, its name", _is_shape),
                "size_multiple": _SIDE,
                "size_minimum": _SIDE,
            },
            ("shape",),
        ),
        "output": Table({"shape": Kind("a list of batch and number of classes", _is_output)}, ("shape",)),
        "preprocessing": Table(PREPROCESSING, tuple(PREPROCESSING)),
        "class_names": list_of(TEXT, 0, 1_000_000),
        "class_identifiers": list_of(TEXT, 0, 1_000_000).or_null(),
        "multi_label": FLAG,
        "label_thresholds": list_of(number(0, 1), 0, 1_000_000).or_null(),
        "preprocessing_assumed": list_of(choice(*PREPROCESSING), 0, len(PREPROCESSING)),
    },
    ("model", "format", "precision", "input", "output", "preprocessing", "class_names", "multi_label"),
)


def description_path(artifact: Path) -> Path:
    """Return the path of an artifact's JSON file: FILE.onnx.json for FILE.onnx."""
    return artifact.with_name(artifact.name + ".json")


@dataclass(frozen=True)
class Description:
    """The description of an artifact's input and output.

    Args:
        model: variant and tag of the network.
        format: one of `FORMATS`.
        precision: "float32" or "int8".
        shape: shape of a batch of images, (N, C, H, W); None for a dynamic axis.
        size_limits: multiple and minimum of dynamic sides, in pixels.
        num_classes: number of logits of an image.
        preprocessing: preprocessing of an image file, in timm's terms.
        class_names: a name for each logit.
        class_identifiers: where names describe identifiers, as of ImageNet, the identifier of each; else None.
        multi_label: whether an image can have several classes.
        label_thresholds: the least probability with which an image has each class; None if unset.
        preprocessing_assumed: names of preprocessing fields that are assumed, since the weights' own are unknown.
    """

    model: str
    format: str
    precision: str
    shape: tuple[int | None, ...]
    size_limits: tuple[int, int]
    num_classes: int
    preprocessing: dict[str, Any]
    class_names: list[str]
    multi_label: bool
    class_identifiers: list[str] | None = None
    label_thresholds: list[float] | None = None
    preprocessing_assumed: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the content of the JSON file, without the artifact's check and versions."""
        shape = [side or name for side, name in zip(self.shape, AXES, strict=True)]
        image: dict[str, Any] = {"name": "image", "shape": shape, "dtype": "float32"}
        if "height" in shape:
            image["size_multiple"], image["size_minimum"] = self.size_limits
        return {
            "model": self.model,
            "format": self.format,
            "precision": self.precision,
            "input": image,
            "output": {"name": "logits", "shape": [shape[0], self.num_classes]},
            "preprocessing": self.preprocessing,
            "preprocessing_assumed": self.preprocessing_assumed,
            "class_names": self.class_names,
            "class_identifiers": self.class_identifiers,
            "multi_label": self.multi_label,
            "label_thresholds": self.label_thresholds,
        }

    @classmethod
    def from_json(cls, described: Any, display_name: str = "the description") -> "Description":
        """Make a description from the content of a JSON file; the inverse of `to_json`.

        Args:
            described: content of the file.
            display_name: name of the file in messages.

        Raises:
            ValueError: if a field is missing or has a wrong type or range; the message names it.
        """
        fault = find_fault(described, _TABLE) or _find_contradiction(described)
        if fault:
            raise ValueError(f"{display_name} {fault}")
        image = described["input"]
        as_they_are = ("model", "format", "precision", "preprocessing", "class_names", "multi_label")
        return cls(
            shape=tuple(None if side in AXES else side for side in image["shape"]),
            size_limits=(image.get("size_multiple", 1), image.get("size_minimum", 1)),
            num_classes=described["output"]["shape"][1],
            class_identifiers=described.get("class_identifiers"),  # this and the next are missing in older files
            label_thresholds=described.get("label_thresholds"),
            preprocessing_assumed=described.get("preprocessing_assumed", []),
            **{name: described[name] for name in as_they_are},
        )


def _find_contradiction(described: dict[str, Any]) -> str | None:
    """Return the fault of fields that contradict each other, see `find_fault`; None if there is none."""
    _, channels, *sides = described["input"]["shape"]
    preprocessing, classes = described["preprocessing"], described["output"]["shape"][1]
    if len(described["class_names"]) != classes:
        return f"needs class_names for {classes} classes, got {len(described['class_names'])}"
    identifiers = described.get("class_identifiers")
    if identifiers is not None and (len(identifiers) != classes or len(set(identifiers)) != classes):
        return f"needs {classes} different class_identifiers, one for each class, got {len(set(identifiers))}"
    thresholds = described.get("label_thresholds")
    if thresholds is not None and len(thresholds) != classes:
        return f"needs label_thresholds for {classes} classes, got {len(thresholds)}"
    for side, size in zip((channels, *sides), preprocessing["input_size"], strict=True):
        if side not in (*AXES, size):
            return f"needs preprocessing.input_size to fit input.shape, got {size} instead of {side}"
    for name in ("mean", "std"):
        if len(preprocessing[name]) not in (1, 3, channels):
            return f"needs preprocessing.{name} for {channels} channels, got {len(preprocessing[name])}"
    return None

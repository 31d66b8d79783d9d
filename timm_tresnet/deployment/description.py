"""What an artifact is and how to feed it, and the JSON file beside it that says so."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm_tresnet.utils.schema import FLAG, TEXT, Kind, Table, choice, find_fault, integer, list_of, number
from timm_tresnet.weights.config import PREPROCESSING

AXES = ("batch", "channels", "height", "width")  # of the images; in the file, those that are free
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
                "shape": Kind(
                    "batch, channels, height and width, each as a number, or free and by its name", _is_shape
                ),
                "size_multiple": _SIDE,
                "size_minimum": _SIDE,
            },
            ("shape",),
        ),
        "output": Table({"shape": Kind("a list of a batch and a number of classes", _is_output)}, ("shape",)),
        "preprocessing": Table(PREPROCESSING, tuple(PREPROCESSING)),
        "class_names": list_of(TEXT, 0, 1_000_000),
        "multi_label": FLAG,
        "label_thresholds": list_of(number(0, 1), 0, 1_000_000).or_null(),
        "preprocessing_assumed": list_of(choice(*PREPROCESSING), 0, len(PREPROCESSING)),
    },
    ("model", "format", "precision", "input", "output", "preprocessing", "class_names", "multi_label"),
)


def description_path(artifact: Path) -> Path:
    """The JSON file that describes an artifact: FILE.onnx.json for FILE.onnx."""
    return artifact.with_name(artifact.name + ".json")


@dataclass(frozen=True)
class Description:
    """What an artifact is and how to feed it.

    Args:
        model: variant and tag of the network.
        format: one of `FORMATS`.
        precision: "float32" or "int8".
        shape: of a batch of images, (N, C, H, W); None for what is free.
        size_limits: what free sides are multiples of, and the least that they can be, in pixels.
        num_classes: logits of an image.
        preprocessing: of an image file, as timm means it.
        class_names: one for each logit.
        multi_label: whether an image can have several of the classes.
        label_thresholds: from which probability on an image has each class; None where nobody says.
        preprocessing_assumed: names in preprocessing of what nobody says of the weights, so that it is assumed.
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
    label_thresholds: list[float] | None = None
    preprocessing_assumed: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """What the file says, but for how the artifact was made and checked."""
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
            "multi_label": self.multi_label,
            "label_thresholds": self.label_thresholds,
        }

    @classmethod
    def from_json(cls, described: Any, called: str = "the description") -> "Description":
        """The inverse of `to_json`.

        Args:
            described: what a file says.
            called: how messages name it.

        Raises:
            ValueError: if a field is missing, or its type or range wrong; names it.
        """
        fault = find_fault(described, _TABLE) or _find_contradiction(described)
        if fault:
            raise ValueError(f"{called} {fault}")
        image = described["input"]
        as_they_are = ("model", "format", "precision", "preprocessing", "class_names", "multi_label")
        return cls(
            shape=tuple(None if side in AXES else side for side in image["shape"]),
            size_limits=(image.get("size_multiple", 1), image.get("size_minimum", 1)),
            num_classes=described["output"]["shape"][1],
            label_thresholds=described.get("label_thresholds"),  # which older files do not have
            preprocessing_assumed=described.get("preprocessing_assumed", []),  # nor this
            **{name: described[name] for name in as_they_are},
        )


def _find_contradiction(described: dict[str, Any]) -> str | None:
    """What is wrong about fields that are right each by itself, as in `find_fault`."""
    _, channels, *sides = described["input"]["shape"]
    preprocessing, classes = described["preprocessing"], described["output"]["shape"][1]
    if len(described["class_names"]) != classes:
        return f"needs class_names for {classes} classes, got {len(described['class_names'])}"
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

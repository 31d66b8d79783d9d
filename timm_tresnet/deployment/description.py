"""What an artifact is and how to feed it, and the JSON file beside it that says so."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

AXES = ("batch", "channels", "height", "width")  # of the images; in the file, those that are free


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
    """

    model: str
    format: str
    precision: str
    shape: tuple[int | None, int, int | None, int | None]
    size_limits: tuple[int, int]
    num_classes: int
    preprocessing: dict[str, Any]
    class_names: list[str]
    multi_label: bool

    def to_json(self) -> dict[str, Any]:
        """What the file says, but for how the artifact was made and checked."""
        shape = [side or name for side, name in zip(self.shape, AXES, strict=True)]
        image = {"name": "image", "shape": shape, "dtype": "float32"}
        if "height" in shape:
            image["size_multiple"], image["size_minimum"] = self.size_limits
        return {
            "model": self.model,
            "format": self.format,
            "precision": self.precision,
            "input": image,
            "output": {"name": "logits", "shape": [shape[0], self.num_classes]},
            "preprocessing": self.preprocessing,
            "class_names": self.class_names,
            "multi_label": self.multi_label,
        }

    @classmethod
    def from_json(cls, described: dict[str, Any]) -> "Description":
        """The inverse of `to_json`."""
        image = described["input"]
        as_they_are = ("model", "format", "precision", "preprocessing", "class_names", "multi_label")
        return cls(
            shape=tuple(None if side in AXES else side for side in image["shape"]),
            size_limits=(image.get("size_multiple", 1), image.get("size_minimum", 1)),
            num_classes=described["output"]["shape"][1],
            **{name: described[name] for name in as_they_are},
        )

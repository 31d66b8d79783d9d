"""The public TResNet weights, one row each, from catalogue.toml beside this file."""

import dataclasses
import functools
import importlib.resources
import tomllib
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from types import MappingProxyType
from typing import Any

_FILE = importlib.resources.files(__package__) / "catalogue.toml"  # not a Path in a zip application
_CHOICES = {"crop_mode": ("center", "squash"), "head": ("linear", "bottleneck", "ml_decoder")}


@dataclasses.dataclass(frozen=True)
class Metric:
    """A published result.

    Args:
        name: what was measured, such as "top-1 accuracy" or "mAP".
        value: in percent.
        published: where, as repository and file.
    """

    name: str
    value: float
    published: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublicWeight:
    """What is known about a public weight; None for what no source says.

    Args:
        architecture: name of the variant in this package.
        tag: tag of the pretrained config; `architecture.tag` is the public weight's name.
        files: names under which the weights were published.
        dataset: what the classes are of.
        num_classes: how many classes the published head has.
        interpolation: how images are resized.
        crop_pct: side of the crop, or of the squashed image, over that of the resized image.
        crop_mode: "center" crops the centre of the image, "squash" resizes it to a square.
        mean: of the normalisation, by channel.
        std: of the normalisation, by channel.
        metric: the published result.
        paper: "arXiv:" and its number.
        code: address of the official code.
        head: "linear", "bottleneck" (two linear layers) or "ml_decoder" (only the backbone can be converted).
        multi_label: an image has any number of the classes, each with a sigmoid.
        input_size: side of the image in pixels.
        license: of the weights, as the Hub names it.
        pretraining: data set of the training before that on `dataset`.
        labels: name of the list of classes, such as "imagenet-1k" or "coco".
        hf_hub_id: Hub repository that holds the weights.
        negative_slope: of the activations in the blocks, where it is not the default.
        stem_negative_slope: of the activation in the stem, where it is not the default.
    """

    architecture: str
    tag: str
    files: tuple[str, ...]
    dataset: str
    num_classes: int
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    metric: Metric
    paper: str
    code: str
    head: str = "linear"
    multi_label: bool = False
    input_size: int | None = None
    license: str | None = None
    pretraining: str | None = None
    labels: str | None = None
    hf_hub_id: str | None = None
    negative_slope: float | None = None
    stem_negative_slope: float | None = None

    @property
    def name(self) -> str:
        """Key of the public weight, `architecture.tag`."""
        return f"{self.architecture}.{self.tag}"

    @property
    def converted_classes(self) -> int:
        """Classes of the network that can be made of it: none with an ML-Decoder head, whose backbone is converted."""
        return 0 if self.head == "ml_decoder" else self.num_classes

    @property
    def slopes(self) -> dict[str, float]:
        """Slopes that are not the defaults, as arguments of `TResNet`."""
        slopes = {"negative_slope": self.negative_slope, "stem_negative_slope": self.stem_negative_slope}
        return {argument: slope for argument, slope in slopes.items() if slope is not None}


@functools.cache
def load_catalogue(path: Traversable = _FILE) -> Mapping[str, PublicWeight]:
    """Read the public weights.

    Args:
        path: a TOML file with one table for each public weight; by default that of the package.

    Returns:
        Public weights by name, `architecture.tag`; read-only.

    Raises:
        ValueError: if a public weight lacks a field, has one too many or a wrong value; the message names them.
    """
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    return MappingProxyType({name: _parse(name, table) for name, table in tables.items()})


def _parse(name: str, table: dict[str, Any]) -> PublicWeight:
    _check_fields(f"public weight {name}", table, PublicWeight)
    _check_fields(f"metric of public weight {name}", table["metric"], Metric)
    for field, choices in _CHOICES.items():
        if table.get(field, choices[0]) not in choices:
            raise ValueError(
                f"public weight {name} needs {field} to be one of {', '.join(choices)}, got {table[field]!r}"
            )
    lists = {field: tuple(value) for field, value in table.items() if isinstance(value, list)}
    public = PublicWeight(**{**table, **lists, "metric": Metric(**table["metric"])})
    if public.name != name:
        raise ValueError(f"public weight {name} says that it is {public.name}; its key is architecture.tag")
    return public


def _check_fields(owner: str, table: dict[str, Any], cls: type[PublicWeight] | type[Metric]) -> None:
    fields = dataclasses.fields(cls)
    missing = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in table]
    unknown = sorted(table.keys() - {field.name for field in fields})
    if missing or unknown:
        raise ValueError(f"{owner}: missing fields {missing}, unknown fields {unknown}")

"""Facts about weights, and the catalogue of public TResNet weights, one table each in catalogue.toml."""

import dataclasses
import functools
import importlib.resources
import math
import tomllib
from argparse import BooleanOptionalAction
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from types import MappingProxyType
from typing import Any

from timm_tresnet.weights.labels import make_notes

TRAINED_ON = "Trained on "  # then the data set, in the description of a pretrained config
_FILE = importlib.resources.files(__package__) / "catalogue.toml"  # not a Path in a zip application


@dataclasses.dataclass(frozen=True)
class Metric:
    """A published result.

    Args:
        name: the metric, such as "top-1 accuracy" or "mAP".
        value: the result, in percent.
        published: repository and file of the publication.
    """

    name: str
    value: float
    published: str


def _field(default: Any = dataclasses.MISSING, **option: Any) -> Any:
    return dataclasses.field(default=default, metadata=option)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFacts:
    """Facts about weights that their tensors do not show; None if unknown.

    A field's metadata has the arguments of `argparse.ArgumentParser.add_argument` for its option in
    `timm-tresnet convert`; its help describes the field. The catalogue must give the fields without a default.
    """

    input_size: int | tuple[int, int] | None = _field(  # height and width, if they differ
        None, help="side of the images", type=int, metavar="PIXELS"
    )
    crop_pct: float | None = _field(
        None, help="side of the crop over the side of the resized image", type=float, metavar="FRACTION"
    )
    crop_mode: str | None = _field(None, help="crop the centre, or resize to a square", choices=("center", "squash"))
    interpolation: str | None = _field(choices=("nearest", "bilinear", "bicubic", "lanczos"))
    mean: tuple[float, ...] | None = _field(None, help="mean of each channel", nargs="+", type=float, metavar="M")
    std: tuple[float, ...] | None = _field(
        None, help="standard deviation of each channel", nargs="+", type=float, metavar="S"
    )
    negative_slope: float | None = _field(
        None, help="negative slope of the blocks' activations", type=float, metavar="SLOPE"
    )
    stem_negative_slope: float | None = _field(
        None, help="negative slope of the stem's activation", type=float, metavar="SLOPE"
    )
    license: str | None = _field(None, help="the Hub's name of the licence, such as apache-2.0", metavar="NAME")
    dataset: str | None = _field(help="data set of the training", metavar="NAME")
    multi_label: bool | None = _field(
        False, help="an image can have any number of classes", action=BooleanOptionalAction
    )
    threshold: float | None = _field(
        None, help="least probability of a class, for a multi-label network", type=float, metavar="P"
    )

    @property
    def known(self) -> dict[str, Any]:
        """The facts that are known, by name."""
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(WeightFacts)}
        return {name: value for name, value in facts.items() if value is not None}

    @property
    def slopes(self) -> dict[str, float]:
        """The known slopes, as arguments of `TResNet`."""
        return {name: slope for name, slope in self.known.items() if name in ("negative_slope", "stem_negative_slope")}


NOTHING_KNOWN = WeightFacts(**dict.fromkeys(field.name for field in dataclasses.fields(WeightFacts)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublicWeight(WeightFacts):
    """Facts about a public weight; None for what no source says.

    Args:
        architecture: name of the variant in this package.
        tag: tag of the pretrained config; `architecture.tag` is the public weight's name.
        files: names of the published files.
        num_classes: number of classes of the published head.
        metric: the published result.
        paper: "arXiv:NUMBER"; None if there is none.
        code: address of the official code.
        head: name of the head (`models.heads`); "unknown" if it must be read from the file.
        num_groups: groups of an ML-Decoder head; None for the default.
        decoder_embedding: width of an ML-Decoder head; None for the default.
        learn_queries: whether the queries of an ML-Decoder head were trained.
        pretraining: data set of an earlier training.
        labels: name of the list of classes, such as "imagenet-1k" or "coco".
        hf_hub_id: Hub repository of the weights.
    """

    architecture: str
    tag: str
    files: tuple[str, ...]
    code: str
    paper: str | None = None
    num_classes: int | None = None
    metric: Metric | None = None
    head: str = _field("linear", choices=("linear", "bottleneck", "ml_decoder", "query2label", "unknown"))
    num_groups: int | None = None
    decoder_embedding: int | None = None
    learn_queries: bool = False
    pretraining: str | None = None
    labels: str | None = None
    hf_hub_id: str | None = None

    @property
    def name(self) -> str:
        """Name of the public weight, `architecture.tag`."""
        return f"{self.architecture}.{self.tag}"

    @property
    def converted_classes(self) -> int:
        """Number of classes of the registered network; 0 if the head is unknown."""
        return 0 if self.head == "unknown" else self.num_classes or 0

    @property
    def network_arguments(self) -> dict[str, Any]:
        """The network's arguments that differ from its variant's."""
        head = {"head": self.head} if self.head in ("bottleneck", "ml_decoder", "query2label") else {}
        options = {"num_groups": self.num_groups, "decoder_embedding": self.decoder_embedding}
        given = {name: value for name, value in options.items() if value}
        return {**self.slopes, **head, **given, **self.hidden_arguments}

    @property
    def hidden_arguments(self) -> dict[str, Any]:
        """The arguments in `network_arguments` that tensors do not show, except slopes."""
        return {"learn_queries": True} if self.learn_queries else {}


def make_pretrained_cfg(facts: WeightFacts, num_classes: int, in_chans: int = 3) -> dict[str, Any]:
    """Make timm's pretrained config from known facts.

    Args:
        facts: the known facts; for a `PublicWeight`, tag and source are included.
        num_classes: outputs of the network; 0 for a backbone.
        in_chans: channels of the image.

    Returns:
        Fields of timm's `PretrainedCfg`, without unknown ones.
    """
    names = ("crop_pct", "crop_mode", "interpolation", "mean", "std", "license")
    config: dict[str, Any] = {name: facts.known[name] for name in names if name in facts.known}
    if facts.input_size is not None:
        sides = (facts.input_size,) * 2 if isinstance(facts.input_size, int) else facts.input_size
        config["input_size"] = (in_chans, *sides)
        config["pool_size"] = tuple(math.ceil(side / 32) for side in sides)
    if facts.dataset is not None:
        config["description"] = f"{TRAINED_ON}{facts.dataset}"
    if isinstance(facts, PublicWeight):
        config |= {"tag": facts.tag, "origin_url": facts.code, "paper_ids": facts.paper}
    if facts.multi_label and num_classes:
        config["notes"] = make_notes(True, facts.threshold)
    return {
        **config,
        "custom_load": False,
        "fixed_input_size": False,
        "num_classes": num_classes,
        "first_conv": "body.conv1.conv",
        "classifier": "head.fc",
    }


@functools.cache
def load_catalogue(path: Traversable = _FILE) -> Mapping[str, PublicWeight]:
    """Read the public weights.

    Args:
        path: a TOML file with one table for each public weight; by default the package's own.

    Returns:
        Public weights by name, `architecture.tag`; read-only.

    Raises:
        ValueError: if a public weight has a missing or unknown field, or a wrong value; the message names them.
    """
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    return MappingProxyType({name: _parse(name, table) for name, table in tables.items()})


def _parse(name: str, table: dict[str, Any]) -> PublicWeight:
    _check_fields(f"public weight {name}", table, PublicWeight)
    if "metric" in table:
        _check_fields(f"metric of public weight {name}", table["metric"], Metric)
    for field in dataclasses.fields(PublicWeight):
        choices = field.metadata.get("choices", ())
        if choices and field.name in table and table[field.name] not in choices:
            raise ValueError(
                f"public weight {name} needs {field.name} to be one of {', '.join(choices)}, got {table[field.name]!r}"
            )
    lists = {field: tuple(value) for field, value in table.items() if isinstance(value, list)}
    metric = Metric(**table["metric"]) if "metric" in table else None
    public = PublicWeight(**{**table, **lists, "metric": metric})
    if public.name != name:
        raise ValueError(f"public weight {name} needs the key {public.name}, its architecture.tag")
    return public


def _check_fields(owner: str, table: dict[str, Any], cls: type[PublicWeight] | type[Metric]) -> None:
    fields = dataclasses.fields(cls)
    missing = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in table]
    unknown = sorted(table.keys() - {field.name for field in fields})
    if missing or unknown:
        raise ValueError(f"{owner}: missing fields {missing}, unknown fields {unknown}")

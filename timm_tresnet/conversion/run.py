"""Read what a run of timm's train.py left beside its weights: its arguments, and so preprocessing and class names."""

import argparse
import dataclasses
import io
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm.data
import timm.models
import yaml
from timm.utils import natural_key

from timm_tresnet.utils.archives import read_plain_pickle
from timm_tresnet.utils.errors import summarise
from timm_tresnet.utils.files import read_bounded
from timm_tresnet.utils.schema import FLAG, TEXT, Kind, Table, choice, find_fault, format_value, integer, map_of
from timm_tresnet.weights.catalogue import NOTHING_KNOWN, WeightFacts
from timm_tresnet.weights.config import MODEL_ARGS, PREPROCESSING
from timm_tresnet.weights.labels import join_source, order_names, read_labels
from timm_tresnet.weights.loading import Weights, look_up_weights
from timm_tresnet.weights.preprocessing import NAMES, find_assumed, for_channels

ARGS = "args.yaml"
CHECKPOINTS = (
    "model_best.pth.tar",
    "last.pth.tar",
    "model.safetensors",
    "pytorch_model.bin",
)  # files in a run's folder, best first
_LARGEST_FILE = 2**20  # bytes; train.py's args.yaml has 2**13
_HIDDEN_ARGUMENTS = (
    "act_layer",
    "negative_slope",
    "stem_negative_slope",
    "norm_layer",
    "output_stride",
    "global_pool",
    "aa_layer",
    "learn_queries",
)
_STRUCTURE = ("layers", "width_factor", "block", "stem", "use_se", "v2", "aa_layer")
_SPLITS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))  # timm's synonyms, in its order

_TEXT = TEXT.or_null()
_ANYTHING = Kind("anything", lambda value: True)
_ARGS = Table(  # train.py's arguments that matter after training
    {
        "num_classes": MODEL_ARGS["num_classes"].or_null(),
        "in_chans": MODEL_ARGS["in_chans"].or_null(),
        "img_size": integer(1, 4096).or_null(),
        **{name: kind.or_null() for name, kind in PREPROCESSING.items()},
        "interpolation": PREPROCESSING["interpolation"].or_else(choice("", None)),
        "gp": MODEL_ARGS["global_pool"].or_null(),
        "model_kwargs": Kind("an object", lambda value: map_of(_ANYTHING).fits(value)).or_null(),
        **dict.fromkeys(("model_ema", "model_ema_force_cpu"), FLAG.or_null()),
        **dict.fromkeys(("data", "data_dir", "dataset", "train_split", "val_split", "class_map", "input_key"), _TEXT),
    }
)
_MODEL = Table({"model": TEXT}, ("model",))  # args without a model are useless


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of timm's train.py.

    Args:
        args: its arguments.
        start: the weights that it started from; None if they are gone.
        notes: remarks on the source of the arguments, for the user.
    """

    args: Mapping[str, Any]
    start: Weights | None
    notes: tuple[str, ...] = ()

    @property
    def model_args(self) -> dict[str, Any]:
        """The network's arguments that differ from its variant's."""
        pooling = {"global_pool": self.args["gp"]} if self.args.get("gp") is not None else {}
        given = {name: value for name, value in (self.args.get("model_kwargs") or {}).items() if value is not None}
        return {**(self.start.model_args if self.start else {}), **pooling, **given}

    @property
    def hidden_arguments(self) -> dict[str, Any]:
        """The arguments of `model_args` that tensors do not show.

        Raises:
            ValueError: if config.json cannot store one of them.
        """
        hidden_arguments = {name: value for name, value in self.model_args.items() if name in _HIDDEN_ARGUMENTS}
        fault = find_fault(hidden_arguments, Table(MODEL_ARGS))
        if fault:
            raise ValueError(f"config.json cannot store the run's model_kwargs: it {fault}")
        return hidden_arguments

    @property
    def custom(self) -> bool:
        """Whether the run's arguments make a network that is none of the variants."""
        return any(name in self.model_args for name in _STRUCTURE)

    @property
    def average_measured(self) -> bool | None:
        """Whether the run's metric was measured with the moving average; None if the run had no average.

        train.py validates the average unless there is no validation or the average is on the CPU.
        """
        if not self.args.get("model_ema"):
            return None
        return bool(self.args.get("val_split", "validation")) and not self.args.get("model_ema_force_cpu")

    def facts(self, in_chans: int) -> WeightFacts:
        """Return the preprocessing that validate.py uses with the run's arguments."""
        return make_facts(self.resolve(), in_chans)

    def resolve(self) -> dict[str, Any]:
        """Return validate.py's data config; if the start is unknown, without the values that timm assumes."""
        args = {name: self.args.get(name) for name in ("in_chans", "img_size", *PREPROCESSING)}
        start = self.start.pretrained_cfg if self.start else {}
        resolved = timm.data.resolve_data_config(args, start, use_test_size=True)
        if not self.start:
            args["input_size"] = args["input_size"] or args["img_size"]
            resolved = {name: value for name, value in resolved.items() if args.get(name)}
        return resolved


def make_facts(data_config: Mapping[str, Any], in_chans: int) -> WeightFacts:
    """Make facts from a data config of timm, without assumed values."""
    assumed = find_assumed(data_config)
    known = {
        name: data_config[name]
        for name in (*NAMES, "crop_mode")
        if name not in assumed and data_config.get(name) is not None
    }
    if "input_size" in known:
        height, width = known["input_size"][-2:]
        known["input_size"] = height if height == width else (height, width)
    for name in {"mean", "std"} & known.keys():
        known[name] = for_channels(tuple(map(float, known[name])), in_chans)
    return dataclasses.replace(NOTHING_KNOWN, **known)


def find_checkpoint(path: Path) -> Path:
    """Return the file itself or, for a run's folder, its best checkpoint.

    Raises:
        FileNotFoundError: if a folder has none.
    """
    if not path.is_dir():
        return path
    found = next((path / name for name in CHECKPOINTS if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path} has none of {', '.join(CHECKPOINTS)}; name the checkpoint itself")
    return found


def find_run(checkpoint: Mapping[str, Any], path: Path, args: Path | None = None) -> tuple[Run | None, tuple[str, ...]]:
    """Find the arguments of the run that wrote a checkpoint: in the file, else in args.yaml beside it.

    The arguments in the file are the run's own. args.yaml is from the last run that wrote to the folder.

    Args:
        checkpoint: content of the file.
        path: the file.
        args: the run's args.yaml, used instead of both; None to search.

    Returns:
        The run and (); or None and the reasons why arguments that were found are not used.

    Raises:
        OSError: if args cannot be read.
        ValueError: if args are not arguments of train.py with a TResNet, or the weights it started from are unknown.
    """
    own = checkpoint.get("args")
    own = vars(own) if isinstance(own, argparse.Namespace) else own
    beside = path.with_name(ARGS)
    sources = [("the checkpoint's args", own)] if isinstance(own, Mapping) else []
    notes: list[str] = []
    if args is not None:
        sources = [(str(args), _read_args(args))]
    elif beside.is_file():
        try:
            sources.append((str(beside), _read_args(beside)))
        except (OSError, ValueError) as error:
            notes.append(f"{beside} was left out: {summarise(error)}")
    for position, (display_name, found) in enumerate(sources):
        fault = _find_fault(found, checkpoint)
        start: Weights | None = None
        start_notes: list[str] = []
        if fault is None:
            try:
                start = look_up_weights(found["model"])
            except ValueError as error:
                if ":" in found["model"]:  # a folder or repository that is gone
                    start_notes.append(f"the run's starting weights are unknown, only its args are used: {error}")
                else:
                    fault = f"names an unknown model: {error}"
        if fault is None:
            known, left_out = _choose_known(found)
            run = Run(known, start)
            notes = [
                f"run of train.py: {display_name}",
                *notes,
                *_compare(found, display_name, sources[position + 1 :]),
                *start_notes,
                *(
                    f"left out of {display_name}: it {each}; {_describe_fallback(name, run)}"
                    for name, each in left_out.items()
                ),
            ]
            return dataclasses.replace(run, notes=tuple(notes)), ()
        if args is not None:
            raise ValueError(f"{display_name} cannot be used: it {fault}")
        notes.append(f"left out: {display_name}: it {fault}")
    return None, tuple(notes)


def _read_args(path: Path) -> Any:
    """Read an args.yaml; YAML tags that create objects are refused."""
    content = read_bounded(path, _LARGEST_FILE)
    try:
        return yaml.safe_load(content.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {summarise(error)}") from error


def _find_fault(args: Any, checkpoint: Mapping[str, Any]) -> str | None:
    """Return why arguments are not from a run of train.py with a TResNet; the message follows "it"."""
    if not isinstance(args, Mapping):
        return "is not a mapping"
    fault = find_fault({"model": args["model"]} if "model" in args else {}, _MODEL)
    arch = checkpoint.get("arch")  # without args, arch is the name of a class
    if not fault and isinstance(arch, str) and arch != args["model"] and (":" in arch or timm.models.is_model(arch)):
        fault = f"names the model {format_value(args['model'])}, the checkpoint {format_value(arch)}"
    return fault


def _choose_known(args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the usable arguments, and the fault of each unusable one; the fault follows "it"."""
    known, left_out = {"model": args["model"]}, {}
    for name, kind in _ARGS.fields.items():
        if name in args:
            fault = find_fault(args[name], kind, name)
            if fault:
                left_out[name] = fault
            else:
                known[name] = args[name]
    size, channels = known.get("input_size"), known.get("in_chans")
    channels = size[0] if size else 3 if channels is None else channels
    for name in ("mean", "std"):
        values = known.get(name)
        if values is not None and len(values) not in (1, channels):
            left_out[name] = (
                f"needs {name} to have a number for each of {channels} channels, got {format_value(values)}"
            )
            del known[name]
    return known, left_out


def _describe_fallback(name: str, run: Run) -> str:
    """Return what is used in place of an unusable argument, in a few words."""
    name = "input_size" if name == "img_size" else name
    if name not in PREPROCESSING:
        return "it counts as not given"
    instead = run.resolve().get(name)
    return "nothing is used instead" if instead is None else f"used instead: {format_value(instead)}"


def _compare(args: Mapping[str, Any], display_name: str, others: list[tuple[str, Any]]) -> list[str]:
    """Return a note on each other source whose arguments differ."""
    notes = []
    for other, found in others:
        if isinstance(found, Mapping):
            # train.py completes these after it has written args.yaml
            later = {name for name in ("num_classes", "data_dir") if found.get(name) is None}
            own = [name for name in _ARGS.fields if name in found and name not in later]
            # Compared as parsed JSON, since YAML reorders the names in model_kwargs.
            differ = [
                name for name in own if json.loads(_as_json(args.get(name))) != json.loads(_as_json(found.get(name)))
            ]
            if differ:
                told = ", ".join(
                    f"{name} {_as_json(args.get(name))}, not {_as_json(found.get(name))}" for name in differ
                )
                notes.append(f"{other} differs; used from {display_name}: {told}")
    return notes


def _as_json(value: Any) -> str:
    return json.dumps(value, default=str)


def name_classes(run: Run, num_classes: int) -> tuple[tuple[str, ...], str, str]:
    """Find the class names of a run, in the order of its outputs.

    timm's readers number classes by the class map; else by the last names of folders with images, in natural order.

    Returns:
        Names, their source and ""; or (), "" and the reason.
    """
    args = run.args
    kind, _, data_set = (args.get("dataset") or "").lower().rpartition("/")
    root = args.get("data_dir") or args.get("data")
    split = _find_split(Path(root), args.get("train_split") or "train") if root else None
    if kind and (kind, data_set) not in (("torch", "folder"), ("torch", "image_folder")):
        return (
            (),
            "",
            f"classes of the data set {format_value(args['dataset'])} are not read; name them with --labels FILE",
        )
    if args.get("class_map"):
        path = Path(args["class_map"])
        path = split / path if split and not path.is_file() else path
        try:
            names, fault = order_names(_read_class_map(path), num_classes)
        except (OSError, ValueError) as error:
            return (), "", f"the run's class map was left out: {summarise(error)}"
        if not names:
            return (), "", f"the run's class map {path} was left out: it {fault}"
        return names, join_source("the run's class map", fault), ""
    if split is None or not split.is_dir():
        where = f"has no class folders at {root}" if root else "does not say where its images were"
        return (), "", f"the run {where}; name the classes with --labels FILE"
    found = find_folders(split, num_classes, args.get("input_key") or "", torch=bool(kind))
    names, fault = order_names(found, num_classes)
    if names and not kind and len({name.lower() for name in found}) < len(found):
        names, fault = (), "has names that differ only in case, whose order in timm is undefined"
    if not names:
        return (), "", f"the run's folders of images, {split}, were left out: it {fault}"
    return names, join_source("folders of the training images", fault), ""


def _find_split(root: Path, split: str) -> Path:
    """Return the folder of a split, found as in timm's `create_dataset`."""
    name = split.partition("[")[0]
    synonyms = next((names for names in _SPLITS if name in names), ())
    return next((root / each for each in (name, *synonyms) if (root / each).exists()), root)


def find_folders(root: Path, most: int, types: str = "", torch: bool = False) -> list[str]:
    """Return the classes of a folder of images: the last names of folders with images, in timm's order.

    Args:
        root: the folder.
        most: the search stops if there are more classes.
        types: suffixes of images, separated by semicolons; "" for timm's own.
        torch: return torchvision's classes instead: the folders in root, in alphabetical order.
    """
    if torch:
        return sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    endings = tuple(types.split(";")) if types else tuple(timm.data.get_img_extensions())
    names: set[str] = set()
    looked_at = 0
    for folder, _, files in os.walk(root, followlinks=True):
        looked_at += 1
        if any(os.path.splitext(file)[1].lower() in endings for file in files):
            names.add("" if folder == str(root) else os.path.basename(folder))
        if len(names) > most or looked_at > 1000 + 10 * most:
            break
    return sorted(names, key=natural_key)


class _ClassMap(pickle.Unpickler):
    """Unpickles only dicts, lists, text and numbers."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it needs code to be run, {module}.{name}")


def _read_class_map(path: Path) -> Any:
    if path.suffix.lower() != ".pkl":
        return read_labels(path)
    try:
        return _ClassMap(io.BytesIO(read_plain_pickle(path))).load()
    # A damaged pickle raises any of these, depending on where the damage is.
    except (
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        ValueError,
        AttributeError,
        TypeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ValueError(f"{path} is not a class map: {summarise(error)}") from error

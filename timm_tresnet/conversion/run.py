"""What a run of timm's train.py left beside its weights: arguments, hence how its images are prepared, and classes."""

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
from timm_tresnet.utils.schema import FLAG, TEXT, Kind, Table, choice, find_fault, integer, map_of, show
from timm_tresnet.weights.catalogue import NOTHING_KNOWN, WeightFacts
from timm_tresnet.weights.config import MODEL_ARGS, PREPROCESSING
from timm_tresnet.weights.labels import join_source, order_names, read_labels
from timm_tresnet.weights.loading import Weights, look_up
from timm_tresnet.weights.preprocessing import NAMES, find_assumed, for_channels

ARGS = "args.yaml"
CHECKPOINTS = (
    "model_best.pth.tar",
    "last.pth.tar",
    "model.safetensors",
    "pytorch_model.bin",
)  # of a folder, best first
_LARGEST_FILE = 2**20  # bytes; train.py's are 2**13
_UNTOLD = (
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
_ARGS = Table(  # of train.py, but for what only its training is about
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
_MODEL = Table({"model": TEXT}, ("model",))  # without which the args are of no use


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of timm's train.py.

    Args:
        args: its arguments.
        start: the weights that it started with; None if they cannot be looked up any more.
        notes: what may matter about where the arguments are from.
    """

    args: Mapping[str, Any]
    start: Weights | None
    notes: tuple[str, ...] = ()

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments of the network as train.py made it, beyond those of its variant."""
        pooling = {"global_pool": self.args["gp"]} if self.args.get("gp") is not None else {}
        given = {name: value for name, value in (self.args.get("model_kwargs") or {}).items() if value is not None}
        return {**(self.start.model_args if self.start else {}), **pooling, **given}

    @property
    def untold(self) -> dict[str, Any]:
        """Those of them that tensors do not tell.

        Raises:
            ValueError: if one is none that config.json can say.
        """
        untold = {name: value for name, value in self.model_args.items() if name in _UNTOLD}
        fault = find_fault(untold, Table(MODEL_ARGS))
        if fault:
            raise ValueError(f"the run's model_kwargs cannot be written: it {fault}")
        return untold

    @property
    def custom(self) -> bool:
        """Whether the run says that its network is none of the variants."""
        return any(name in self.model_args for name in _STRUCTURE)

    @property
    def average_measured(self) -> bool | None:
        """Whether the run's metric was that of the moving average; None if it kept none.

        As in train.py: the average is validated unless there is no validation or it is kept on the CPU.
        """
        if not self.args.get("model_ema"):
            return None
        return bool(self.args.get("val_split", "validation")) and not self.args.get("model_ema_force_cpu")

    def facts(self, in_chans: int) -> WeightFacts:
        """How validate.py, with the run's arguments, prepares images."""
        return make_facts(self.resolve(), in_chans)

    def resolve(self) -> dict[str, Any]:
        """The data config of validate.py; without what timm assumes if the start is not known."""
        args = {name: self.args.get(name) for name in ("in_chans", "img_size", *PREPROCESSING)}
        start = self.start.pretrained_cfg if self.start else {}
        resolved = timm.data.resolve_data_config(args, start, use_test_size=True)
        if not self.start:
            args["input_size"] = args["input_size"] or args["img_size"]
            resolved = {name: value for name, value in resolved.items() if args.get(name)}
        return resolved


def make_facts(data_config: Mapping[str, Any], in_chans: int) -> WeightFacts:
    """Facts from a data config of timm's, without what is assumed in it."""
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
    """The file itself, or the best checkpoint of a run's folder.

    Raises:
        FileNotFoundError: if a folder has none.
    """
    if not path.is_dir():
        return path
    found = next((path / name for name in CHECKPOINTS if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path} holds none of {', '.join(CHECKPOINTS)}; name the checkpoint itself")
    return found


def find_run(checkpoint: Mapping[str, Any], path: Path, args: Path | None = None) -> tuple[Run | None, tuple[str, ...]]:
    """Find the arguments of the run that wrote a checkpoint: in it, else in args.yaml beside it.

    Those in the file are the run's own; args.yaml is that of the last run that wrote to the folder.

    Args:
        checkpoint: what the file holds.
        path: the file.
        args: the run's args.yaml, which then goes first.

    Returns:
        The run and (), or None and why what is there was left out.

    Raises:
        OSError: if args cannot be read.
        ValueError: if args are none of train.py's, or the weights that the run started with cannot be looked up.
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
    for place, (called, found) in enumerate(sources):
        fault = _find_fault(found, checkpoint)
        if fault is None:
            notes = [f"run of train.py: {called}", *notes, *_compare(found, called, sources[place + 1 :])]
            known, left_out = _choose_known(found)
            start = None
            try:
                start = look_up(found["model"])
            except ValueError as error:
                if ":" in found["model"]:  # a folder or repository that is gone
                    notes.append(f"only what the run's args say is known of its start: {error}")
                else:
                    fault = f"names a model that is none of these: {error}"
            if fault is None:
                run = Run(known, start)
                notes += [
                    f"left out of {called}: it {each}; {_tell_instead(name, run)}" for name, each in left_out.items()
                ]
                return dataclasses.replace(run, notes=tuple(notes)), ()
        if args is not None:
            raise ValueError(f"{called} cannot be used: it {fault}")
        notes.append(f"left out: {called}: it {fault}")
    return None, tuple(notes)


def _read_args(path: Path) -> Any:
    """What an args.yaml says; never objects of classes."""
    content = read_bounded(path, _LARGEST_FILE)
    try:
        return yaml.safe_load(content.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {summarise(error)}") from error


def _find_fault(args: Any, checkpoint: Mapping[str, Any]) -> str | None:
    """Why arguments are none of a run of train.py with a TResNet, as it stands behind "it"."""
    if not isinstance(args, Mapping):
        return "is no mapping"
    fault = find_fault({"model": args["model"]} if "model" in args else {}, _MODEL)
    arch = checkpoint.get("arch")  # without args, the name of a class
    if not fault and isinstance(arch, str) and arch != args["model"] and (":" in arch or timm.models.is_model(arch)):
        fault = f"names the model {show(args['model'])}, the checkpoint {show(arch)}"
    return fault


def _choose_known(args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The arguments that can be used, and what is wrong with each other, as it stands behind "it"."""
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
            left_out[name] = f"needs {name} to have a number for each of {channels} channels, got {show(values)}"
            del known[name]
    return known, left_out


def _tell_instead(name: str, run: Run) -> str:
    """What becomes of the network or its images without an argument, in a few words."""
    name = "input_size" if name == "img_size" else name
    if name not in PREPROCESSING:
        return "as if it were not given"
    instead = run.resolve().get(name)
    return "nothing is taken instead" if instead is None else f"taken instead: {show(instead)}"


def _compare(args: Mapping[str, Any], called: str, others: list[tuple[str, Any]]) -> list[str]:
    """A note on every other source that says something else."""
    notes = []
    for other, found in others:
        if isinstance(found, Mapping):
            # train.py completes these once it has begun
            later = {name for name in ("num_classes", "data_dir") if found.get(name) is None}
            own = [name for name in _ARGS.fields if name in found and name not in later]
            # As parsed, since YAML puts the names of model_kwargs in another order.
            differ = [
                name for name in own if json.loads(_as_json(args.get(name))) != json.loads(_as_json(found.get(name)))
            ]
            if differ:
                told = ", ".join(
                    f"{name} {_as_json(args.get(name))}, not {_as_json(found.get(name))}" for name in differ
                )
                notes.append(f"{other} differs; taken from {called}: {told}")
    return notes


def _as_json(value: Any) -> str:
    return json.dumps(value, default=str)


def name_classes(run: Run, num_classes: int) -> tuple[tuple[str, ...], str, str]:
    """Names of the classes that a run was trained on, in the order of its outputs.

    As timm's readers number them: by the class map, else folders with images in them, by their last name, in natural
    order.

    Returns:
        Names, where they are from, and ""; or no names, "", and why.
    """
    args = run.args
    kind, _, data_set = (args.get("dataset") or "").lower().rpartition("/")
    root = args.get("data_dir") or args.get("data")
    split = _find_split(Path(root), args.get("train_split") or "train") if root else None
    if kind and (kind, data_set) not in (("torch", "folder"), ("torch", "image_folder")):
        return (), "", f"the names of the data set {show(args['dataset'])} are not read; name them with --labels FILE"
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
        return (), "", f"the run's images are in no folders at {root}; name the classes with --labels FILE"
    found = find_folders(split, num_classes, args.get("input_key") or "", torch=bool(kind))
    names, fault = order_names(found, num_classes)
    if names and not kind and len({name.lower() for name in found}) < len(found):
        names, fault = (), "needs names that differ in more than case, which timm numbers at random"
    if not names:
        return (), "", f"the run's folders of images, {split}, were left out: it {fault}"
    return names, join_source("folders of the training images", fault), ""


def _find_split(root: Path, split: str) -> Path:
    """The folder of a split, as timm's `create_dataset` looks for it."""
    name = split.partition("[")[0]
    synonyms = next((names for names in _SPLITS if name in names), ())
    return next((root / each for each in (name, *synonyms) if (root / each).exists()), root)


def find_folders(root: Path, most: int, types: str = "", torch: bool = False) -> list[str]:
    """Classes of a folder of images: the last names of folders that hold some, in the order of their numbers.

    Args:
        root: the folder.
        most: stops when there are more of them.
        types: endings of images, with semicolons between them; "" for those that timm takes.
        torch: as torchvision has them, not timm: the folders inside root, in the order of their letters.
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
    """Reads plain dicts, texts and numbers."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it needs {module}.{name} to be run")


def _read_class_map(path: Path) -> Any:
    if path.suffix.lower() != ".pkl":
        return read_labels(path)
    try:
        return _ClassMap(io.BytesIO(read_plain_pickle(path))).load()
    # What a damaged pickle raises depends on where the damage is.
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
        raise ValueError(f"{path} is no class map: {summarise(error)}") from error

"""Any TResNet checkpoint -> a folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads."""

import argparse
import dataclasses
import functools
import json
import math
import pickle
import re
import secrets
import shutil
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from timm_tresnet.card import make_card
from timm_tresnet.catalogue import PublicWeight, load_catalogue
from timm_tresnet.checkpoint import OFFICIAL_STEM, batch_norm_weight, find_misfits, from_official, unwrap
from timm_tresnet.labels import LABEL_SETS, MULTI_LABEL, label_config
from timm_tresnet.tresnet import ARCHITECTURES, TResNet

_STEM = "body.conv1.conv.weight"
_ML_DECODER_CLASSES = "head.decoder.duplicate_pooling_bias"
_FILES = ("model.safetensors", "config.json", "README.md")
_NAMES_SHOWN = 20
# What torch.load raises for a damaged file depends on where the damage is.
_UNREADABLE = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A checkpoint as timm takes it.

    Args:
        architecture: name of the variant.
        model_args: arguments of `TResNet` that are not the variant's own.
        state_dict: the weights under this package's names, in single precision.
        num_classes: number of classes; 0 for a backbone.
        head: kind of head in the file: "linear", "bottleneck", "ml_decoder" (left out) or "none".
        layout: names in the file, "official" or "timm".
        pretrained_cfg: timm's pretrained config, as far as it is known.
        public_weight: what is known about the weights, if they are public ones.
        labels: names of the classes as timm's config.json has them; empty if they are not known.
        notes: what was done that may matter.
        warnings: what may be wrong with the weights.
    """

    architecture: str
    model_args: dict[str, Any]
    state_dict: dict[str, Tensor]
    num_classes: int
    head: str
    layout: str
    pretrained_cfg: dict[str, Any]
    public_weight: PublicWeight | None = None
    labels: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def convert_checkpoint(
    path: str | Path,
    *,
    public_weight: str | None = None,
    norm_weights: str | None = None,
    custom: bool = False,
    input_size: int | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    negative_slope: float | None = None,
    stem_negative_slope: float | None = None,
    license: str | None = None,
    dataset: str | None = None,
    multi_label: bool | None = None,
) -> Conversion:
    """Convert a TResNet checkpoint of any origin; nothing in it is executed.

    The architecture, the number of classes and the kind of head come from the names and shapes of the tensors. What
    they cannot tell comes from the public weight or from the other arguments, which go before it, or stays open.

    Args:
        path: a file of `torch.save` or safetensors, with weights of the official code (TResNet, ImageNet21K, ASL,
            ML_Decoder, PartialLabelingCSL, torch_tresnet, timm with In-Place ABN) or of timm.
        public_weight: name of a public weight; None for the one that has the file's name and fits, "none" for none.
        norm_weights: "abn" if the norms are In-Place ABN, whose weights become |w| + 1e-5; "bn" if they are to be taken
            as they are; None for what the layout says: "abn" under the official names, "bn" under timm's.
        custom: take a network that is none of the variants too.
        input_size: side of the image in pixels.
        crop_pct: side of the crop over that of the resized image.
        crop_mode: "center" or "squash".
        interpolation: how images are resized, as timm names it.
        mean: of the normalisation, by channel.
        std: of the normalisation, by channel.
        negative_slope: of the activations in the blocks.
        stem_negative_slope: of the activation in the stem.
        license: of the weights, as the Hub names it.
        dataset: what the weights were trained on.
        multi_label: an image has any number of the classes.

    Returns:
        The weights and what is known about them.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is damaged, wants to run code, is no TResNet, has tensors too few, too many or of a wrong
            shape, which the message names, or does not fit the public weight.
    """
    path = Path(path)
    if norm_weights not in (None, "abn", "bn"):
        raise ValueError(f"norm_weights needs to be 'abn', 'bn' or None, got {norm_weights!r}")
    checkpoint = read_checkpoint(path)
    notes: list[str] = []
    try:
        weights = _take_tensors(unwrap(checkpoint))
        dtypes = {weight.dtype for weight in weights.values() if weight.is_floating_point()} - {torch.float32}
        official = OFFICIAL_STEM in weights
        if not official and _STEM not in weights:
            raise ValueError(f"no TResNet: neither {OFFICIAL_STEM} nor {_STEM} among {_some(weights)}")
        blurred = _find_blurs(weights) if official else True
        inplace_abn = official if norm_weights is None else norm_weights == "abn"
        if official:
            norms = [w for name, w in weights.items() if name.endswith(".1.weight") and w.numel()]
            smallest = min((norm.min().item() for norm in norms), default=0.0)
            if norm_weights is None and smallest >= 1e-5:
                notes.append(
                    f"no norm weight is below {smallest:.2g}, so the In-Place ABN may have been replaced before; the "
                    "difference is 1e-5 in each weight, norm_weights='bn' leaves them as they are"
                )
            weights = from_official(weights, inplace_abn)
        elif inplace_abn:
            weights = {
                name: batch_norm_weight(weight) if name.endswith("bn.weight") else weight
                for name, weight in weights.items()
            }
        head, head_classes, weights = _take_head(weights)
        num_classes = 0 if head == "ml_decoder" else head_classes
        architecture, model_args = _detect(weights, blurred, custom)
        if head == "bottleneck":
            model_args["head_features"] = weights["head.embedding.weight"].shape[0]
        state_dict = _copy(weights, _check_fit(weights, architecture, model_args, num_classes))
        known = _choose_public_weight(path.name, public_weight, architecture, model_args, head, head_classes, notes)
    except ValueError as error:
        raise ValueError(f"cannot convert {path}: {error}") from error

    if head == "ml_decoder":
        notes.append(f"the ML-Decoder head ({head_classes} classes) was left out: what is converted is the backbone")
    if inplace_abn:
        notes.append("In-Place ABN weights became batch norm weights, |w| + 1e-5")
    if dtypes:
        notes.append(f"weights were cast from {', '.join(sorted(map(str, dtypes)))} to torch.float32")
    slopes = {"negative_slope": negative_slope, "stem_negative_slope": stem_negative_slope}
    slopes = {argument: slope for argument, slope in slopes.items() if slope is not None}
    model_args |= (known.slopes if known else {}) | slopes

    given = {
        "input_size": input_size,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": interpolation,
        "mean": None if mean is None else tuple(mean),
        "std": None if std is None else tuple(std),
        "license": license,
        "dataset": dataset,
        "multi_label": multi_label,
    }
    facts = {name: value if value is not None or not known else getattr(known, name) for name, value in given.items()}
    facts = {name: value for name, value in facts.items() if value is not None}
    in_chans = model_args.get("in_chans", 3)
    _check_facts(path, facts, in_chans, slopes)
    unknown = [name for name in ("input_size", "crop_pct", "interpolation", "mean", "std") if name not in facts]
    if unknown:
        notes.append(f"unknown, so that timm's defaults apply: {', '.join(unknown)}")
    return Conversion(
        architecture,
        model_args,
        state_dict,
        num_classes,
        head,
        "official" if official else "timm",
        _pretrained_cfg(facts, known, num_classes, in_chans),
        known,
        _labels(checkpoint, known, num_classes),
        tuple(notes),
        tuple(_find_bad_values(state_dict)),
    )


def write_folder(
    conversion: Conversion,
    folder: str | Path,
    *,
    overwrite: bool = False,
    repo_id: str | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write model.safetensors, config.json and README.md, all or nothing.

    They are written into a hidden folder beside the final one, which is then renamed. A process that is killed leaves
    that hidden folder behind, named `.NAME.….partial`, and nothing under the final name.

    Args:
        conversion: what to write.
        folder: where to; must not exist or be empty.
        overwrite: replace a folder that holds an earlier conversion.
        repo_id: Hub repository that the model card is to name.
        check: is called with the hidden folder before it is renamed, and raises if it is not good enough.

    Raises:
        FileExistsError: if the folder holds something and overwrite is not set, or something that is no conversion.
        OSError: if it cannot be written.
    """
    folder = Path(folder).absolute()
    _check_free(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.partial"
    replaced = partial.with_suffix(".replaced")
    try:
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(save(conversion.state_dict, metadata={"format": "pt"}))
        config = json.dumps(_config(conversion), indent=2, ensure_ascii=False)
        (partial / "config.json").write_text(config + "\n", encoding="utf-8")
        card = make_card(conversion.public_weight, conversion.architecture, conversion.num_classes, repo_id)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if check is not None:
            check(partial)
        _check_free(folder, overwrite)  # again: this took a while
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
    except BaseException:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _check_free(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    held = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else None
    if held is None:
        raise FileExistsError(f"{folder} is a file; name a folder to write to")
    if held and not overwrite:
        raise FileExistsError(f"{folder} holds {_some(held)}; name another folder, or overwrite it")
    foreign = [name for name in held if name not in _FILES]
    if foreign:
        raise FileExistsError(f"{folder} holds {_some(foreign)}, which no conversion writes; name another folder")


def _config(conversion: Conversion) -> dict[str, Any]:
    """config.json as timm reads it."""
    config: dict[str, Any] = {"architecture": conversion.architecture, "num_classes": conversion.num_classes}
    if conversion.model_args:
        config["model_args"] = conversion.model_args
    return config | {"pretrained_cfg": conversion.pretrained_cfg} | conversion.labels


def _pretrained_cfg(
    facts: dict[str, Any], public: PublicWeight | None, num_classes: int, in_chans: int
) -> dict[str, Any]:
    names = ("crop_pct", "crop_mode", "interpolation", "mean", "std", "license")
    config: dict[str, Any] = {name: facts[name] for name in names if name in facts}
    if "input_size" in facts:
        config["input_size"] = (in_chans, facts["input_size"], facts["input_size"])
        config["pool_size"] = (math.ceil(facts["input_size"] / 32),) * 2
    if "dataset" in facts:
        config["description"] = f"Trained on {facts['dataset']}"
    if public:
        config |= {"tag": public.tag, "origin_url": public.code, "paper_ids": public.paper}
    if facts.get("multi_label") and num_classes:
        config["notes"] = (MULTI_LABEL,)
    return {
        **config,
        "custom_load": False,
        "fixed_input_size": False,
        "num_classes": num_classes,
        "first_conv": "body.conv1.conv",
        "classifier": "head.fc",
    }


def _check_facts(path: Path, facts: dict[str, Any], in_chans: int, slopes: dict[str, float]) -> None:
    def need(fits: bool, what: str, got: Any) -> None:
        if not fits:
            raise ValueError(f"cannot convert {path}: needs {what}, got {got}")

    if "input_size" in facts:
        size = facts["input_size"]
        need(size >= 20 and size % 4 == 0, "an input size of at least 20, in multiples of 4", size)
    if "crop_pct" in facts:
        need(0 < facts["crop_pct"] <= 1, "a crop_pct above 0 and up to 1", facts["crop_pct"])
    if "crop_mode" in facts:
        need(facts["crop_mode"] in ("center", "squash"), "a crop_mode of center or squash", facts["crop_mode"])
    for name in ("mean", "std"):
        if name in facts:
            need(len(facts[name]) == in_chans, f"a {name} for each of {in_chans} channels", facts[name])
    need(all(value > 0 for value in facts.get("std", ())), "a std above 0", facts.get("std"))
    for name, slope in slopes.items():
        need(0 <= slope <= 1, f"a {name} from 0 to 1", slope)


# ---- the file


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Read a file of `torch.save` or safetensors without running anything in it.

    Args:
        path: the file.

    Returns:
        What the file holds; tensors are on the CPU.

    Raises:
        OSError: if there is no such file, or it may not be read.
        ValueError: if it is neither, is damaged, holds no dict, or needs code to be run.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        checkpoint = _load_pickle(path)
    elif start[8:] == b"{":
        try:
            checkpoint = load_file(path)
        except (SafetensorError, KeyError, OverflowError, RuntimeError, ValueError) as error:
            raise ValueError(f"cannot read {path}: damaged safetensors file: {error}") from error
    else:
        raise ValueError(f"cannot read {path}: it begins neither like a file of torch.save nor like safetensors")
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"cannot read {path}: needs a dict of tensors, got {type(checkpoint).__name__}")
    return checkpoint


def _load_pickle(path: Path) -> Any:
    try:
        # timm's train.py stores its arguments. Torch warns of formats that are refused or taken below in any case.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        if forbidden:
            raise ValueError(
                f"refused to read {path}: it needs {forbidden[1]} to be run, and a file of weights needs no code. If "
                "you trust it, save its state_dict alone, with the code that wrote it"
            ) from error
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"cannot read {path}: damaged or foreign file of torch.save: {reason}") from error


def _take_tensors(weights: Mapping[Any, Any]) -> dict[str, Tensor]:
    foreign = [name for name, value in weights.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if foreign:
        raise ValueError(f"unexpected, no tensors: {_some(map(str, foreign))}")
    tensors: dict[str, Tensor] = {name: value.detach() for name, value in weights.items()}
    for name, tensor in tensors.items():
        dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
        number = tensor.is_floating_point() or (name.endswith("num_batches_tracked") and not tensor.is_complex())
        if not dense or not number or tensor.device.type != "cpu":
            raise ValueError(f"{name} needs to hold plain floating-point numbers, got {tensor.dtype}, {tensor.layout}")
        # A few bytes can claim to be a huge tensor that repeats them.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} is larger than what the file holds of it")
    return tensors


def _labels(checkpoint: Mapping[str, Any], public: PublicWeight | None, num_classes: int) -> dict[str, Any]:
    """Names of the classes: those in the file, as ASL and ML-Decoder have them, else the public weight's list."""
    in_file = checkpoint.get("idx_to_class")
    if isinstance(in_file, Mapping) and len(in_file) == num_classes > 0:
        names = list(in_file.values())  # in order, as the official code reads them
        if all(isinstance(name, str) for name in names):
            return {"label_names": names}
    if public and public.labels in LABEL_SETS and num_classes:
        return label_config(public.labels)
    return {}


# ---- what the tensors are


def _find_blurs(weights: Mapping[str, Tensor]) -> bool:
    """Whether the strided convolutions are blur-pooled: only then their names have one more level."""
    nested = {match[1] for name in weights if (match := re.match(r"(body\..*\.conv\d)\.0\.[01]\.\w+$", name))}
    if not nested:
        return False
    expected = set()
    for block in ("body.layer2.0", "body.layer3.0", "body.layer4.0"):
        if any(name.startswith(f"{block}.") for name in weights):
            bottleneck = any(name.startswith(f"{block}.conv3.") for name in weights)
            expected.add(f"{block}.conv{2 if bottleneck else 1}")
    if nested != expected:
        raise ValueError(
            f"needs a blur behind {_some(expected)} or behind none, got one behind {_some(nested)}: missing "
            f"{_some(f'{name}.0.0.weight' for name in expected - nested)}, unexpected "
            f"{_some(f'{name}.0.0.weight' for name in nested - expected)}"
        )
    return True


def _take_head(weights: dict[str, Tensor]) -> tuple[str, int, dict[str, Tensor]]:
    """Kind of the head, its number of classes, and the weights without what has no place in a TResNet."""
    if _ML_DECODER_CLASSES in weights:
        classes = weights[_ML_DECODER_CLASSES].numel()
        backbone = {name: weight for name, weight in weights.items() if not name.startswith("head.decoder.")}
        return "ml_decoder", classes, backbone
    if "head.fc.weight" not in weights:
        return "none", 0, weights
    classifier = weights["head.fc.weight"]
    embedding = weights.get("head.embedding.weight")
    for name, weight in (("head.fc.weight", classifier), ("head.embedding.weight", embedding)):
        if weight is not None and (weight.ndim != 2 or 0 in weight.shape):
            raise ValueError(f"{name} needs two dimensions, got shape {tuple(weight.shape)}")
    return "linear" if embedding is None else "bottleneck", classifier.shape[0], weights


def _detect(weights: Mapping[str, Tensor], blurred: bool, custom: bool) -> tuple[str, dict[str, Any]]:
    """Name of the variant and the arguments in which the network differs from it, from names and shapes."""
    stem = weights[_STEM].shape
    pixels, kind = {(3, 3): (16, "space_to_depth"), (7, 7): (1, "conv7x7")}.get(tuple(stem[2:]), (0, ""))
    if not pixels or stem[0] == 0 or stem[1] == 0 or stem[1] % pixels:
        raise ValueError(f"{_STEM} fits no stem of a TResNet, its shape is {tuple(stem)}")
    layers, blocks, use_se = [], [], []
    for stage in range(1, 5):
        # Two digits: the deepest published stage has 34 blocks, and a hostile name could ask for any number.
        prefix = re.compile(rf"body\.layer{stage}\.(\d\d?)\.(.*)")
        names = [match for name in weights if (match := prefix.match(name))]
        if not names:
            raise ValueError(f"no tensors of body.layer{stage}: missing {', '.join(_missing_stages(weights))}")
        layers.append(max(int(match[1]) for match in names) + 1)
        blocks.append("bottleneck" if any(match[2].startswith("conv3.") for match in names) else "basic")
        use_se.append(any(match[2].startswith("se.") for match in names))

    found = {"layers": tuple(layers), "planes": stem[0], "block": tuple(blocks)}
    variant = next((name for name in ARCHITECTURES if _outline(name) == found), None)
    model_args: dict[str, Any] = {}
    if variant is None:
        model_args = {"layers": layers, "width_factor": stem[0] / 64, "block": blocks}
    if use_se != [True, True, True, False]:
        model_args["use_se"] = use_se
    if not blurred:
        model_args["aa_layer"] = False
    if kind != "space_to_depth":
        model_args["stem"] = kind
    if model_args and not custom:
        variants = "; ".join(f"{name} {_outline(name)}" for name in ARCHITECTURES)
        raise ValueError(
            f"is none of the variants: {found}, use_se={use_se}, aa_layer={blurred}, stem={kind}. The variants are "
            f"{variants}; all have use_se={[True, True, True, False]}, aa_layer=True, stem=space_to_depth. If tensors "
            "are missing, the file is incomplete; if the network was made so, convert it as a custom one"
        )
    if stem[1] != 3 * pixels:
        model_args["in_chans"] = stem[1] // pixels
    return variant or "tresnet_m", model_args


def _missing_stages(weights: Mapping[str, Tensor]) -> list[str]:
    return [f"body.layer{i}.*" for i in range(1, 5) if not any(name.startswith(f"body.layer{i}.") for name in weights)]


def _outline(architecture: str) -> dict[str, Any]:
    arguments = ARCHITECTURES[architecture]
    v2 = arguments.get("v2", False)
    planes = int(64 * arguments.get("width_factor", 1.0))
    block = ("bottleneck",) * 4 if v2 else ("basic", "basic", "bottleneck", "bottleneck")
    return {"layers": arguments["layers"], "planes": planes // 8 * 8 if v2 else planes, "block": block}


def _check_fit(
    weights: Mapping[str, Tensor], architecture: str, model_args: dict[str, Any], num_classes: int
) -> dict[str, torch.Size]:
    """Names and shapes of the network, in its order, once the weights are found to have them."""
    expected = _shapes(json.dumps({**ARCHITECTURES[architecture], **model_args, "num_classes": num_classes}))
    missing, unexpected, misshapen = find_misfits({name: weight.shape for name, weight in weights.items()}, expected)
    if missing or unexpected or misshapen:
        raise ValueError(
            f"does not fit {architecture} {model_args or ''} with {num_classes} classes: missing {_some(missing)}; "
            f"unexpected {_some(unexpected)}; wrong shape {_some(misshapen)}"
        )
    return expected


@functools.lru_cache(maxsize=8)  # checkpoints often come in several of a kind
def _shapes(arguments: str) -> dict[str, torch.Size]:
    with torch.random.fork_rng(devices=[]):  # a network on the meta device draws its weights, too
        network = TResNet(**json.loads(arguments), device="meta")
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def _copy(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The weights in single precision, each with its own memory; counters that In-Place ABN lacks are zero."""
    state_dict = {}
    for name, shape in shapes.items():
        dtype = torch.int64 if name.endswith("num_batches_tracked") else torch.float32
        state_dict[name] = torch.zeros(shape, dtype=dtype)
        if name in weights:
            state_dict[name].copy_(weights[name])
    return state_dict


def _choose_public_weight(
    file_name: str,
    wanted: str | None,
    architecture: str,
    model_args: dict[str, Any],
    head: str,
    head_classes: int,
    notes: list[str],
) -> PublicWeight | None:
    catalogue = load_catalogue()
    if wanted == "none":
        return None
    if wanted is not None and wanted not in catalogue:
        raise ValueError(f"no public weight is named {wanted!r}; there are {', '.join(catalogue)}, and 'none'")
    found = {"architecture": architecture, "head": head, "num_classes": head_classes}
    custom = sorted(model_args.keys() - {"head_features"})
    named = [catalogue[wanted]] if wanted else [public for public in catalogue.values() if file_name in public.files]
    for public in named:
        needed = {name: getattr(public, name) for name in found}
        if needed == found and not custom:
            return public
        problem = f"the public weight {public.name} is for {needed}, the file holds {found}"
        if custom:
            problem += f" with other {', '.join(custom)}"
        if wanted:
            raise ValueError(problem)
        notes.append(f"{problem}; it has the file's name, but was not used")
    return None


def _find_bad_values(state_dict: Mapping[str, Tensor]) -> Iterable[str]:
    names = [name for name, tensor in state_dict.items() if not torch.isfinite(tensor).all()]
    if names:
        yield f"NaN or infinite values in {_some(names)}"


def _some(names: Iterable[str]) -> str:
    """Names for an error message, the first of them if there are many."""
    names = list(names)
    shown = ", ".join(names[:_NAMES_SHOWN]) or "nothing"
    return f"{shown} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown

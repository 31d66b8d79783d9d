"""Check a TResNet's config.json, from a folder or Hub repository, before timm builds a network from it."""

from pathlib import Path
from typing import Any

from timm_tresnet.utils.schema import (
    FLAG,
    TEXT,
    Kind,
    Table,
    choice,
    find_fault,
    integer,
    list_of,
    map_of,
    number,
    read_json,
)
from timm_tresnet.weights.labels import read_thresholds

NAME = "config.json"

_CHANNELS = integer(1, 1024)
_CLASSES = integer(0, 1_000_000)
_RATE = number(0, 0.99)
_SLOPE = number(0, 1)
_SIZE = list_of(integer(1, 4096), 3, 3)
_TEXTS = TEXT.or_else(list_of(TEXT, 0, 1000))
_BLOCK = choice("basic", "bottleneck")

MODEL_ARGS: dict[str, Kind] = {  # arguments of `TResNet`, without device and dtype
    "layers": list_of(integer(1, 200), 4, 4),
    "in_chans": _CHANNELS,
    "num_classes": _CLASSES,
    "width_factor": number(0, 16, above=True),
    "v2": FLAG,
    "block": _BLOCK.or_else(list_of(_BLOCK, 4, 4)).or_null(),
    "stem": choice("space_to_depth", "conv7x7"),
    "use_se": FLAG.or_else(list_of(FLAG, 4, 4)),
    "aa_layer": choice("blur", "", True, False),
    "act_layer": TEXT,  # `TResNet` checks the name
    "negative_slope": _SLOPE,
    "stem_negative_slope": _SLOPE,
    "norm_layer": choice(
        "batchnorm2d", "batchnorm", "groupnorm", "groupnorm1", "layernorm2d", "rmsnorm2d", "frn", "frntlu",
        "frozenbatchnorm2d", "evonormb0", "evonormb1", "evonormb2", "evonorms0", "evonorms0a", "evonorms1",
        "evonorms1a", "evonorms2", "evonorms2a",
    ),
    "output_stride": choice(8, 16, 32),
    "global_pool": choice(
        "fast", "avg", "max", "avgmax", "catavgmax", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax", ""
    ),
    "head": choice("linear", "bottleneck", "ml_decoder", "query2label"),
    "head_features": integer(1, 65536).or_null(),
    "num_groups": integer(1, 1_000_000).or_null(),
    "decoder_embedding": integer(1, 65536).or_null(),
    "label_embedding": integer(1, 65536).or_null(),
    "learn_queries": FLAG.or_null(),
    "drop_rate": _RATE,
    "drop_path_rate": _RATE,
    "recompute": choice("none", "activations", "expansions"),
    "rebuild": choice("none", "activations", "expansions"),  # its name until 0.2
}  # fmt: skip

PREPROCESSING: dict[str, Kind] = {  # as `timm.data.create_transform` takes it
    "input_size": _SIZE,
    "interpolation": choice("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
    "mean": list_of(number(-10_000, 10_000), 1, 1024),
    "std": list_of(number(0, 10_000, above=True), 1, 1024),
    "crop_pct": number(0.1, 2),  # a tiny value makes a huge image; above 1, the image gets a black border
    "crop_mode": choice("center", "squash", "border"),
}

_ELSEWHERE = Kind("null or left out, since weights are beside the config", lambda value: value is None or value == "")
PRETRAINED_CFG: dict[str, Kind] = {  # fields of timm's `PretrainedCfg`
    **dict.fromkeys(("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source"), _ELSEWHERE),
    "custom_load": choice(False, None, ""),
    **{name: kind.or_null() for name, kind in PREPROCESSING.items()},
    "test_input_size": _SIZE.or_null(),
    "min_input_size": _SIZE.or_null(),
    "fixed_input_size": choice(False, None),
    "test_crop_pct": PREPROCESSING["crop_pct"].or_null(),
    "num_classes": _CLASSES,
    "label_offset": integer(0, 1).or_null(),
    "label_names": list_of(TEXT, 0, 1_000_000).or_null(),
    "label_descriptions": map_of(TEXT).or_null(),
    "pool_size": list_of(integer(1, 4096), 2, 2).or_null(),
    "test_pool_size": list_of(integer(1, 4096), 2, 2).or_null(),
    "first_conv": choice("body.conv1.conv", "body.conv1.0", None),
    "classifier": choice("head.fc", None),
    **dict.fromkeys(
        ("architecture", "tag", "license", "description", "origin_url", "paper_name"), TEXT.or_null()
    ),
    **dict.fromkeys(("paper_ids", "notes"), _TEXTS.or_null()),
}  # fmt: skip

_LABELS = {name: PRETRAINED_CFG[name] for name in ("label_names", "label_descriptions")}
_NO_FIELD = "which is not a field of timm's pretrained config"


def read_config(path: Path, display_name: str | None = None) -> dict[str, Any]:
    """Read the config.json of a TResNet and check every field's type and range.

    Args:
        path: the file.
        display_name: name of the file in messages; None for its path.

    Returns:
        The content.

    Raises:
        OSError: if the file does not exist or may not be read.
        ValueError: if it is not JSON, or timm could not build a TResNet from it. The message names the first wrong
            field, the value that it needs and the value that it has.
    """
    display_name = display_name or str(path)
    config = read_json(path, display_name)
    check_config(config, display_name)
    return config


def check_config(config: Any, display_name: str = NAME) -> None:
    """Check every field of the content of a config.json.

    Raises:
        ValueError: as in `read_config`.
    """
    fault = find_fault(config, _choose_table(config)) or _find_contradiction(config)
    if fault:
        raise ValueError(f"{display_name} {fault}")


def _choose_table(config: Any) -> Table:
    from timm_tresnet.variants import ARCHITECTURES  # which imports this folder

    ours = choice(*ARCHITECTURES)
    architecture = Kind(f"a TResNet, {ours.description}", ours.fits)
    if isinstance(config, dict) and "pretrained_cfg" not in config:  # timm's first form, all in one
        names = {**PRETRAINED_CFG, "labels": PRETRAINED_CFG["label_names"], "num_features": integer(1, 10**9).or_null()}
        return Table({**names, "architecture": architecture}, ("architecture",), _NO_FIELD)
    return Table(
        {
            "architecture": architecture,
            "num_classes": _CLASSES,
            "model_args": Table(MODEL_ARGS, (), f"which is not one of TResNet's arguments, {', '.join(MODEL_ARGS)}"),
            "pretrained_cfg": Table(PRETRAINED_CFG, (), _NO_FIELD),
            **_LABELS,
        },
        ("architecture", "pretrained_cfg"),
    )


def _find_contradiction(config: dict[str, Any]) -> str | None:
    """Return the fault of fields that contradict each other, see `find_fault`; None if there is none."""
    pretrained_cfg, arguments = config.get("pretrained_cfg", config), config.get("model_args", {})
    classes = config.get("num_classes", pretrained_cfg.get("num_classes", 1000))
    if arguments.get("num_classes", classes) != classes:  # timm then draws a random classifier
        return (
            f"needs num_classes to be the same everywhere, got {classes} and {arguments['num_classes']} in model_args"
        )
    try:
        read_thresholds(pretrained_cfg, classes)
    except ValueError as error:
        return f"has wrong notes: {error}"
    in_chans = arguments.get("in_chans", (pretrained_cfg.get("input_size") or [3])[0])
    for name in ("mean", "std"):
        values = pretrained_cfg.get(name)
        if values is not None and len(values) not in (1, 3, in_chans):  # timm accepts 3 for any number of channels
            return f"needs pretrained_cfg.{name} to have a number for each of {in_chans} channels, got {len(values)}"
    return None

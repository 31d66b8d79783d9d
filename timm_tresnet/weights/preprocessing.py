"""Preprocessing of images for weights: known values, and assumed values where none are known."""

from collections.abc import Mapping, Sequence
from typing import Any

from timm_tresnet.utils.notes import ASSUMED, read_notes

NAMES = ("input_size", "interpolation", "mean", "std", "crop_pct")  # without a crop_mode, timm crops the centre


def fill_preprocessing(pretrained_cfg: Mapping[str, Any], own: Any, in_chans: int = 3) -> dict[str, Any]:
    """Complete a pretrained config with its variant's preprocessing, and note which fields are assumed.

    timm would assume ImageNet's mean and std, which no TResNet was trained with. The note stays in the config, even in
    a folder that timm writes, so an assumption never becomes a fact.

    Args:
        pretrained_cfg: pretrained config of a folder or repository.
        own: pretrained config of the variant, a timm `PretrainedCfg`.
        in_chans: channels of the weights' images.
    """
    missing = [name for name in NAMES if pretrained_cfg.get(name) is None]
    if not missing:
        return dict(pretrained_cfg)
    assumed = {name: getattr(own, name) for name in missing}
    if "input_size" in assumed:
        assumed["input_size"] = (in_chans, *assumed["input_size"][1:])
    for name in {"mean", "std"} & assumed.keys():
        assumed[name] = for_channels(assumed[name], in_chans)
    return {**pretrained_cfg, **assumed, "notes": note_assumed(pretrained_cfg.get("notes"), missing)}


def note_assumed(notes: Any, names: list[str]) -> tuple[str, ...] | None:
    """Return notes with one more that lists the assumed fields; unchanged if there are none."""
    notes = (notes,) if isinstance(notes, str) else tuple(notes or ())
    return (*notes, ASSUMED + ", ".join(names)) if names else notes or None


def for_channels(values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    """Return a mean or std for in_chans channels; if the number differs, the average for each, as in timm's loaders."""
    return tuple(values) if len(values) == in_chans else (sum(values) / len(values),) * in_chans


def resolve_preprocessing(model: Any, input_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return timm's data config of a network, adapted to its number of channels.

    Args:
        model: a network with `pretrained_cfg` and `in_chans`.
        input_size: height and width of the images, in pixels; None for the config's.
    """
    import timm.data

    config = timm.data.resolve_data_config(model=model)
    size = input_size or config["input_size"][1:]
    adapted = {name: for_channels(config[name], model.in_chans) for name in ("mean", "std")}
    return {**config, **adapted, "input_size": (model.in_chans, *size)}


def find_assumed(pretrained_cfg: Mapping[str, Any]) -> list[str]:
    """Return the names of the assumed fields."""
    listed = [note for note in read_notes(pretrained_cfg) if note.startswith(ASSUMED)]
    named = {name for note in listed for name in note.removeprefix(ASSUMED).split(", ")}
    return [name for name in NAMES if name in named]


def explain_assumed(model: Any) -> str:
    """Return a line about the assumed preprocessing of a network's images; "" if all of it is known."""
    config = model.pretrained_cfg
    assumed = find_assumed(config)
    if not assumed:
        return ""
    values = ", ".join(f"{name} {_format(config[name])}" for name in assumed)
    return (
        f"the preprocessing of images is unknown for these weights; assumed, as for {config.get('architecture')}: "
        f"{values}. If you know it, convert the weights again with --like WEIGHTS or --mean, --std, ..."
    )


def _format(value: Any) -> str:
    return "(" + ", ".join(f"{each:g}" for each in value) + ")" if isinstance(value, list | tuple) else str(value)

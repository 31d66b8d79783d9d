"""How images are prepared for weights: what is known, and what is assumed where nobody says."""

from collections.abc import Mapping, Sequence
from typing import Any

from timm_tresnet.utils.notes import ASSUMED, read_notes

NAMES = ("input_size", "interpolation", "mean", "std", "crop_pct")  # a crop_mode that nobody names is the centre


def fill_preprocessing(pretrained_cfg: Mapping[str, Any], own: Any, in_chans: int = 3) -> dict[str, Any]:
    """Complete a pretrained config by its variant's own preprocessing, and note what is assumed.

    timm would take ImageNet's mean and std, which no TResNet was trained with. The note stays with the config, so that
    an assumption never becomes a fact, not even in a folder that timm writes.

    Args:
        pretrained_cfg: of a folder or repository.
        own: that of the variant, a timm `PretrainedCfg`.
        in_chans: channels of the images that the weights are for.
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
    """Notes of a pretrained config, with one that says which fields are assumed, if there are any."""
    notes = (notes,) if isinstance(notes, str) else tuple(notes or ())
    return (*notes, ASSUMED + ", ".join(names)) if names else notes or None


def for_channels(values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    """A mean or std for as many channels: the average for each if it is for another number, as in timm's loaders."""
    return tuple(values) if len(values) == in_chans else (sum(values) / len(values),) * in_chans


def resolve_preprocessing(model: Any, input_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Timm's data config of a network, for its number of channels.

    Args:
        model: with `pretrained_cfg` and `in_chans`.
        input_size: height and width of the images; None for those of the config.
    """
    import timm.data

    config = timm.data.resolve_data_config(model=model)
    size = input_size or config["input_size"][1:]
    adapted = {name: for_channels(config[name], model.in_chans) for name in ("mean", "std")}
    return {**config, **adapted, "input_size": (model.in_chans, *size)}


def find_assumed(pretrained_cfg: Mapping[str, Any]) -> list[str]:
    """Names of the fields that are assumed, not known."""
    listed = [note for note in read_notes(pretrained_cfg) if note.startswith(ASSUMED)]
    named = {name for note in listed for name in note.removeprefix(ASSUMED).split(", ")}
    return [name for name in NAMES if name in named]


def explain_assumed(model: Any) -> str:
    """What is assumed about a network's images, in a line for whoever uses it; "" if everything is known."""
    config = model.pretrained_cfg
    assumed = find_assumed(config)
    if not assumed:
        return ""
    values = ", ".join(f"{name} {_format(config[name])}" for name in assumed)
    return (
        f"nobody says how images are prepared for these weights; assumed, as for {config.get('architecture')}: "
        f"{values}. If you know better, convert them again with --like WEIGHTS or --mean, --std, ..."
    )


def _format(value: Any) -> str:
    return "(" + ", ".join(f"{each:g}" for each in value) + ")" if isinstance(value, list | tuple) else str(value)

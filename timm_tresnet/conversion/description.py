"""What is known about a checkpoint: from its tensors, from the catalogue, from whoever converts it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from timm_tresnet.conversion.reading import name_some, read_checkpoint
from timm_tresnet.conversion.recognition import Recognised, recognise
from timm_tresnet.models.heads import HEAD_ARGUMENTS
from timm_tresnet.weights.catalogue import NOTHING_KNOWN, Facts, PublicWeight, load_catalogue, make_pretrained_cfg
from timm_tresnet.weights.labels import LABEL_SETS, label_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion(Recognised):
    """A checkpoint as timm takes it: what it was recognised to be, and what is known about it.

    Args:
        pretrained_cfg: timm's pretrained config, as far as it is known.
        public_weight: what is known about the weights, if they are public ones.
        labels: names of the classes as timm's config.json has them; empty if they are not known.
        notes: what was done that may matter.
        warnings: what may be wrong with the weights.
    """

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
    **facts: Any,
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
        **facts: fields of `timm_tresnet.weights.catalogue.Facts`, such as `input_size=448`; None for what is not known.

    Returns:
        The weights and what is known about them.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is damaged, wants to run code, is no TResNet, has tensors too few, too many or of a wrong
            shape, which the message names, or does not fit the public weight.
    """
    path = Path(path)
    facts |= {name: tuple(facts[name]) for name in ("mean", "std") if facts.get(name) is not None}
    given = dataclasses.replace(NOTHING_KNOWN, **facts)
    if norm_weights not in (None, "abn", "bn"):
        raise ValueError(f"norm_weights needs to be 'abn', 'bn' or None, got {norm_weights!r}")
    checkpoint = read_checkpoint(path)
    try:
        return _describe(recognise(checkpoint, norm_weights, custom), path.name, public_weight, given)
    except ValueError as error:
        raise ValueError(f"cannot convert {path}: {error}") from error


def _describe(found: Recognised, file_name: str, wanted: str | None, given: Facts) -> Conversion:
    public, misfits = _choose_public_weight(found, file_name, wanted)
    facts = dataclasses.replace(public or NOTHING_KNOWN, **given.known)
    in_chans = found.model_args.get("in_chans", 3)
    _check_facts(facts, in_chans)
    bad = [name for name, tensor in found.state_dict.items() if not torch.isfinite(tensor).all()]
    return Conversion(
        **{**vars(found), "model_args": found.model_args | facts.slopes},
        pretrained_cfg=make_pretrained_cfg(facts, found.num_classes, in_chans),
        public_weight=public,
        labels=_name_classes(found, public),
        notes=tuple(_note(found, misfits, facts)),
        warnings=(f"NaN or infinite values in {name_some(bad)}",) if bad else (),
    )


def _choose_public_weight(
    found: Recognised, file_name: str, wanted: str | None
) -> tuple[PublicWeight | None, list[str]]:
    """The public weight that is wanted, or has the file's name; and why those of that name do not fit."""
    catalogue = load_catalogue()
    if wanted == "none":
        return None, []
    if wanted is not None and wanted not in catalogue:
        raise ValueError(f"no public weight is named {wanted!r}; there are {', '.join(catalogue)}, and 'none'")
    in_file = {"architecture": found.architecture, "head": found.head, "num_classes": found.num_classes}
    custom = sorted(found.model_args.keys() - HEAD_ARGUMENTS)
    misfits = []
    for public in [catalogue[wanted]] if wanted else [row for row in catalogue.values() if file_name in row.files]:
        needed = {"architecture": public.architecture}
        if public.head != "unknown":
            needed |= {"head": public.head, "num_classes": public.converted_classes}
        if needed.items() <= in_file.items() and not custom:
            return public, []
        problem = f"the public weight {public.name} is for {needed}, the file holds {in_file}"
        if custom:
            problem += f" with other {', '.join(custom)}"
        if wanted:
            raise ValueError(problem)
        misfits.append(f"{problem}; it has the file's name, but was not used")
    return None, misfits


def _check_facts(facts: Facts, in_chans: int) -> None:
    needs = (
        ("input_size", lambda size: size >= 20 and size % 4 == 0, "an input size of at least 20, in multiples of 4"),
        ("crop_pct", lambda share: 0 < share <= 1, "a crop_pct above 0 and up to 1"),
        ("crop_mode", lambda mode: mode in ("center", "squash"), "a crop_mode of center or squash"),
        ("mean", lambda mean: len(mean) == in_chans, f"a mean for each of {in_chans} channels"),
        ("std", lambda std: len(std) == in_chans, f"a std for each of {in_chans} channels"),
        ("std", lambda std: min(std) > 0, "a std above 0"),
        ("negative_slope", lambda slope: 0 <= slope <= 1, "a negative_slope from 0 to 1"),
        ("stem_negative_slope", lambda slope: 0 <= slope <= 1, "a stem_negative_slope from 0 to 1"),
    )
    known = facts.known
    for name, fits, what in needs:
        if name in known and not fits(known[name]):
            raise ValueError(f"needs {what}, got {known[name]}")


def _name_classes(found: Recognised, public: PublicWeight | None) -> dict[str, Any]:
    """Names of the classes, as timm's config.json has them: those in the file, else the public weight's list."""
    if found.class_names:
        return {"label_names": list(found.class_names)}
    if public and public.labels in LABEL_SETS and found.num_classes:
        return label_config(public.labels)
    return {}


def _note(found: Recognised, misfits: list[str], facts: Facts) -> Iterator[str]:
    """What was done that may matter."""
    least = found.least_norm_weight
    if least is not None and least >= 1e-5:
        yield (
            f"no norm weight is below {least:.2g}, so the In-Place ABN may have been replaced before; the difference "
            "is 1e-5 in each weight, norm_weights='bn' leaves them as they are"
        )
    yield from misfits
    if found.head == "query2label":
        yield "the Query2Label head was left out: what is converted is the backbone"
    if found.head == "ml_decoder" and not found.num_classes:
        yield (
            "the word embeddings of the labels are not in the file: the network answers once it has been given some, "
            "by model.set_label_embeddings(names, vectors)"
        )
    if found.names_fault:
        yield f"the file's idx_to_class was left out: it {found.names_fault}"
    if found.inplace_abn:
        yield "In-Place ABN weights became batch norm weights, |w| + 1e-5"
    if found.dtypes:
        yield f"weights were cast from {', '.join(sorted(map(str, found.dtypes)))} to torch.float32"
    unknown = [name for name in ("input_size", "crop_pct", "interpolation", "mean", "std") if name not in facts.known]
    if unknown:
        yield f"unknown, so that timm's defaults apply: {', '.join(unknown)}"

"""Convert a checkpoint: combine what its tensors, its training run, the catalogue and the user say about it."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from timm_tresnet.conversion.reading import open_checkpoint, refuse, shorten_names
from timm_tresnet.conversion.recognition import NoNetwork, Recognised, recognise
from timm_tresnet.conversion.run import Run, find_checkpoint, find_run, make_facts, name_classes
from timm_tresnet.models.heads import HEAD_ARGUMENTS
from timm_tresnet.utils.images import printable
from timm_tresnet.utils.names import suggest
from timm_tresnet.utils.terminal import escape
from timm_tresnet.weights.catalogue import NOTHING_KNOWN, PublicWeight, WeightFacts, load_catalogue, make_pretrained_cfg
from timm_tresnet.weights.labels import (
    LABEL_SETS,
    join_source,
    label_config,
    note_source,
    order_names,
    read_labels,
)
from timm_tresnet.weights.loading import look_up_weights
from timm_tresnet.weights.preprocessing import NAMES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion(Recognised):
    """A converted checkpoint: the recognised network and the known facts about it.

    Args:
        pretrained_cfg: the known fields of timm's pretrained config.
        facts: the known facts about the weights, for config and card.
        public_weight: the catalogue's entry if the weights are public; else None.
        labels: names of the classes in the form of timm's config.json; empty if unknown.
        notes: remarks on the conversion for the user.
        warnings: possible faults of the weights.
    """

    pretrained_cfg: dict[str, Any]
    facts: WeightFacts = NOTHING_KNOWN
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
    key: str | None = None,
    args: str | Path | None = None,
    like: str | None = None,
    labels: str | Path | None = None,
    **facts: Any,
) -> Conversion:
    """Convert a TResNet checkpoint of any origin. No code in the file is executed.

    The architecture, the number of classes and the kind of head come from the names and shapes of the tensors. Facts
    that tensors do not show come from the first source that has them: the arguments below; the run of timm's train.py
    that wrote the file, read as timm's validate.py would; the public weight. Otherwise they stay unknown.

    Args:
        path: a file of `torch.save` or safetensors with weights of the official code (TResNet, ImageNet21K, ASL,
            ML_Decoder, PartialLabelingCSL, ML-Danbooru, torch_tresnet, timm with In-Place ABN) or of timm; or the
            folder of a run of train.py, of which model_best.pth.tar is used.
        public_weight: name of a public weight; None for the one with the file's name, if it fits; "none" for none.
        norm_weights: "abn" if the norms are In-Place ABN, whose weights become |w| + 1e-5; "bn" to keep the weights;
            None to decide by the names: "abn" for the official names, "bn" for timm's.
        custom: also accept a network that is none of the variants.
        key: key of the network in the file, such as "state_dict" or "student". None for the network that the run's
            metric was measured with; without a run, for the moving average.
        args: args.yaml of the run; None for the args in the file, or else args.yaml beside it.
        like: weights with the same preprocessing: a folder, or a name for `timm-tresnet classify --model`.
        labels: file with the names of the classes: text with one a line, or JSON. None for the first source that has
            names: the file, the run's class map, the folders of the run's images, the public weight.
        **facts: fields of `timm_tresnet.weights.catalogue.WeightFacts`, such as `input_size=448`; None if unknown.

    Returns:
        The weights and the known facts about them.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is damaged, needs code to be run, is not a TResNet, has missing, unexpected or misshapen
            tensors, which the message names, or does not fit the public weight; or if args, like or labels are invalid.
    """
    path = find_checkpoint(Path(path))
    facts |= {name: tuple(facts[name]) for name in ("mean", "std") if facts.get(name) is not None}
    given = dataclasses.replace(NOTHING_KNOWN, **facts)
    if norm_weights not in (None, "abn", "bn"):
        raise ValueError(f"norm_weights needs to be 'abn', 'bn' or None, got {norm_weights!r}")
    checkpoint, stand_ins = open_checkpoint(path)
    try:
        run, faults = find_run(checkpoint, path, Path(args) if args is not None else None)
        key = _choose_key(checkpoint, run) if key is None else key
        found = recognise(
            checkpoint, norm_weights, custom or bool(run and run.custom), key, run.hidden_arguments if run else None
        )
        own_names = Path(labels) if labels is not None else None
        conversion = _describe(found, path.name, public_weight, given, run, like, own_names)
    except NoNetwork as error:
        if stand_ins:
            raise refuse(path, stand_ins) from error
        raise ValueError(f"cannot convert {printable(path)}: {escape(str(error))}") from error
    except ValueError as error:
        raise ValueError(f"cannot convert {printable(path)}: {escape(str(error))}") from error
    notes = [*faults, *(run.notes if run else ()), *conversion.notes]
    if stand_ins:
        notes.append(f"not read and not run: {shorten_names(stand_ins)}")
    return dataclasses.replace(conversion, notes=tuple(notes))


def _choose_key(checkpoint: Mapping[str, Any], run: Run | None) -> str | None:
    """Return the key of the network that the run's metric was measured with; None if the file lacks one of the two."""
    if run and run.average_measured is not None and {"state_dict", "state_dict_ema"} <= checkpoint.keys():
        return "state_dict_ema" if run.average_measured else "state_dict"
    return None


def _describe(
    found: Recognised,
    file_name: str,
    wanted: str | None,
    given: WeightFacts,
    run: Run | None,
    like: str | None,
    labels: Path | None,
) -> Conversion:
    public, misfits = _choose_public_weight(found, file_name, wanted)
    in_chans = found.model_args.get("in_chans", 3)
    of_run = run.facts(in_chans).known if run else {}
    of_other = _look_up_facts(like, in_chans).known if like else {}
    known = {**of_run, **of_other, **given.known}
    if public and known.get("dataset", public.dataset) != public.dataset:
        known["metric"] = None  # it was measured on the public weight's data set
    facts = dataclasses.replace(public or NOTHING_KNOWN, **known)
    _check_facts(facts, in_chans, 1 if found.model_args.get("stem") == "conv7x7" else 4)
    names, source, fault = _name_classes(found, public, run, labels)
    bad = [name for name, tensor in found.state_dict.items() if not torch.isfinite(tensor).all()]
    pretrained_cfg = make_pretrained_cfg(facts, found.num_classes, in_chans)
    if source and (run or labels):  # otherwise the names came with the weights
        pretrained_cfg["notes"] = (*pretrained_cfg.get("notes", ()), note_source(source))
    return Conversion(
        **{**vars(found), "model_args": found.model_args | facts.slopes | (public.hidden_arguments if public else {})},
        pretrained_cfg=pretrained_cfg,
        facts=facts,
        public_weight=public,
        labels=names,
        notes=tuple(_note(found, misfits, facts, run, source, fault)),
        warnings=(f"NaN or infinite values in {shorten_names(bad)}",) if bad else (),
    )


def _look_up_facts(like: str, in_chans: int) -> WeightFacts:
    name = f"local-dir:{like}" if Path(like).is_dir() else like
    return make_facts(look_up_weights(name).pretrained_cfg, in_chans)


def _choose_public_weight(
    found: Recognised, file_name: str, wanted: str | None
) -> tuple[PublicWeight | None, list[str]]:
    """Return the public weight with the wanted name or the file's name, and why those with the file's name misfit."""
    catalogue = load_catalogue()
    if wanted == "none":
        return None, []
    if wanted is not None and wanted not in catalogue:
        meant = suggest(wanted, catalogue) or f"; there are {', '.join(catalogue)}, and 'none'"
        raise ValueError(f"no public weight is named {wanted!r}{meant}")
    in_file = {"architecture": found.architecture, "head": found.head, "num_classes": found.num_classes}
    custom = sorted(found.model_args.keys() - HEAD_ARGUMENTS)
    misfits = []
    for public in [catalogue[wanted]] if wanted else [row for row in catalogue.values() if file_name in row.files]:
        needed: dict[str, Any] = {"architecture": public.architecture}
        if public.head != "unknown":
            needed |= {"head": public.head, "num_classes": public.converted_classes}
        if needed.items() <= in_file.items() and not custom:
            return public, []
        problem = f"the public weight {public.name} needs {needed}, the file has {in_file}"
        if custom:
            problem += f" with other {', '.join(custom)}"
        if wanted:
            raise ValueError(problem)
        misfits.append(f"{problem}; it has the file's name but was not used")
    return None, misfits


def _check_facts(facts: WeightFacts, in_chans: int, multiple: int) -> None:
    needs = (
        (
            "input_size",
            lambda size: all(
                side >= 20 and side % multiple == 0 for side in ((size,) if isinstance(size, int) else size)
            ),
            f"an input size of at least 20, in multiples of {multiple}",
        ),
        ("crop_pct", lambda share: 0 < share <= 2, "a crop_pct above 0 and up to 2"),
        ("crop_mode", lambda mode: mode in ("center", "squash", "border"), "a crop_mode of center, squash or border"),
        ("mean", lambda mean: len(mean) == in_chans, f"a mean for each of {in_chans} channels"),
        ("std", lambda std: len(std) == in_chans, f"a std for each of {in_chans} channels"),
        ("std", lambda std: min(std) > 0, "a std above 0"),
        ("negative_slope", lambda slope: 0 <= slope <= 1, "a negative_slope from 0 to 1"),
        ("threshold", lambda threshold: 0 <= threshold <= 1, "a threshold from 0 to 1"),
        ("stem_negative_slope", lambda slope: 0 <= slope <= 1, "a stem_negative_slope from 0 to 1"),
    )
    known = facts.known
    for name, fits, what in needs:
        if name in known and not fits(known[name]):
            raise ValueError(f"needs {what}, got {known[name]}")


def _name_classes(
    found: Recognised, public: PublicWeight | None, run: Run | None, labels: Path | None
) -> tuple[dict[str, Any], str, str]:
    """Return the class names in config.json's form, their source, and why other names are not used."""
    if labels is not None:
        names, fault = order_names(read_labels(labels), found.num_classes)
        if not names:
            raise ValueError(f"{labels} cannot name the classes: it {fault}")
        return {"label_names": list(names)}, join_source("a file of labels", fault), ""
    if not found.num_classes:
        return {}, "", f"the file's idx_to_class was left out: it {found.names_fault}" if found.names_fault else ""
    if found.class_names:
        return {"label_names": list(found.class_names)}, join_source("the checkpoint", found.names_fault), ""
    faults = [f"the file's idx_to_class was left out: it {found.names_fault}"] if found.names_fault else []
    if run:
        names, source, fault = name_classes(run, found.num_classes)
        if names:
            return {"label_names": list(names)}, source, "; ".join(faults)
        faults.append(fault)
    if public and public.labels in LABEL_SETS:
        return label_config(public.labels), f"the list {public.labels}", "; ".join(faults)
    return {}, "", "; ".join(faults)


def _note(
    found: Recognised, misfits: list[str], facts: WeightFacts, run: Run | None, source: str, fault: str
) -> Iterator[str]:
    """Yield remarks on the conversion for the user."""
    least = found.least_norm_weight
    if least is not None and least >= 1e-5:
        yield (
            f"no norm weight is below {least:.2g}, so In-Place ABN may have been replaced by batch norm already; then "
            "each weight is 1e-5 too large, and norm_weights='bn' keeps the weights"
        )
    yield from misfits
    if found.head == "query2label" and not found.num_classes:
        yield "the Query2Label head was left out; only the backbone is converted"
    if found.head == "query2label" and found.num_classes:
        yield "Query2Label's attention is assumed to have 4 heads, as published; tensors do not show the number"
    if found.head == "ml_decoder" and not found.num_classes:
        yield (
            "the file has no word embeddings of the labels; set them with model.set_label_embeddings(names, vectors) "
            "before you use the network"
        )
    if found.other_keys:
        why = ""
        if run and run.average_measured is not None and found.key in ("state_dict", "state_dict_ema"):
            measured = "state_dict_ema" if run.average_measured else "state_dict"
            why = f"; the run's metric was measured with {measured}"
        yield f"used {found.key!r}, not {', '.join(map(repr, found.other_keys))}; choose with --key KEY{why}"
    if found.left_out:
        yield f"left out, not part of the network: {shorten_names(found.left_out)}"
    if fault:
        yield fault
    if found.num_classes:
        yield f"class names: {source or 'none found; give them with --labels FILE'}"
    if found.inplace_abn:
        yield "In-Place ABN weights became batch norm weights, |w| + 1e-5"
    if found.dtypes:
        yield f"weights were cast from {', '.join(sorted(map(str, found.dtypes)))} to torch.float32"
    unknown = [name for name in NAMES if name not in facts.known]
    if unknown:
        yield (
            f"unknown and left out: {', '.join(unknown)}; when loaded, the values of {found.architecture} are assumed. "
            "Copy them from other weights with --like WEIGHTS, or give the ones that you know"
        )

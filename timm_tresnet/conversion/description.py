"""What is known about a checkpoint: from its tensors, from the catalogue, from whoever converts it."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from timm_tresnet.conversion.reading import name_some, open_checkpoint, refuse
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
from timm_tresnet.weights.loading import look_up
from timm_tresnet.weights.preprocessing import NAMES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion(Recognised):
    """A checkpoint as timm takes it: what it was recognised to be, and what is known about it.

    Args:
        pretrained_cfg: timm's pretrained config, as far as it is known.
        facts: all that is known about the weights, of which config and card are made.
        public_weight: what is known about them, if they are public ones.
        labels: names of the classes as timm's config.json has them; empty if they are not known.
        notes: what was done that may matter.
        warnings: what may be wrong with the weights.
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
    """Convert a TResNet checkpoint of any origin; nothing in it is executed.

    The architecture, the number of classes and the kind of head come from the names and shapes of the tensors. What
    they cannot tell comes, the first that says something going before the others, from the arguments below; from the
    run of timm's train.py that wrote the file, as timm's validate.py would take it; from the public weight; or stays
    open.

    Args:
        path: a file of `torch.save` or safetensors, with weights of the official code (TResNet, ImageNet21K, ASL,
            ML_Decoder, PartialLabelingCSL, ML-Danbooru, torch_tresnet, timm with In-Place ABN) or of timm; or a
            folder of a run of train.py, whose model_best.pth.tar is taken.
        public_weight: name of a public weight; None for the one that has the file's name and fits, "none" for none.
        norm_weights: "abn" if the norms are In-Place ABN, whose weights become |w| + 1e-5; "bn" if they are to be taken
            as they are; None for what the layout says: "abn" under the official names, "bn" under timm's.
        custom: take a network that is none of the variants too.
        key: which of several networks in the file, such as "state_dict" or "student"; None for the moving average, if
            the metric of train.py's run was that of the average or there is no run.
        args: args.yaml of the run; None for the args in the file, or else args.yaml beside it.
        like: other weights, whose preprocessing is taken: a folder, or what `timm-tresnet classify --model` takes.
        labels: names of the classes: a text with one a line, or JSON; None for those in the file, else those of the
            run: its class map or the folders of its images; else those of the public weight.
        **facts: fields of `timm_tresnet.weights.catalogue.WeightFacts`, such as `input_size=448`; None if unknown.

    Returns:
        The weights and what is known about them.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is damaged, wants to run code, is no TResNet, has tensors too few, too many or of a wrong
            shape, which the message names, or does not fit the public weight; or if args, like or labels are of no use.
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
            checkpoint, norm_weights, custom or bool(run and run.custom), key, run.untold if run else None
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
        notes.append(f"not read, nor run: {name_some(stand_ins)}")
    return dataclasses.replace(conversion, notes=tuple(notes))


def _choose_key(checkpoint: Mapping[str, Any], run: Run | None) -> str | None:
    """The one of train.py's two networks that the run's metric was measured with; None if there are not both."""
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
        known["metric"] = None  # it was measured on the other one
    facts = dataclasses.replace(public or NOTHING_KNOWN, **known)
    _check_facts(facts, in_chans, 1 if found.model_args.get("stem") == "conv7x7" else 4)
    names, source, fault = _name_classes(found, public, run, labels)
    bad = [name for name, tensor in found.state_dict.items() if not torch.isfinite(tensor).all()]
    pretrained_cfg = make_pretrained_cfg(facts, found.num_classes, in_chans)
    if source and (run or labels):  # else the names are those that came with the weights
        pretrained_cfg["notes"] = (*pretrained_cfg.get("notes", ()), note_source(source))
    return Conversion(
        **{**vars(found), "model_args": found.model_args | facts.slopes | (public.untold if public else {})},
        pretrained_cfg=pretrained_cfg,
        facts=facts,
        public_weight=public,
        labels=names,
        notes=tuple(_note(found, misfits, facts, run, source, fault)),
        warnings=(f"NaN or infinite values in {name_some(bad)}",) if bad else (),
    )


def _look_up_facts(like: str, in_chans: int) -> WeightFacts:
    name = f"local-dir:{like}" if Path(like).is_dir() else like
    return make_facts(look_up(name).pretrained_cfg, in_chans)


def _choose_public_weight(
    found: Recognised, file_name: str, wanted: str | None
) -> tuple[PublicWeight | None, list[str]]:
    """The public weight that is wanted, or has the file's name; and why those of that name do not fit."""
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
        problem = f"the public weight {public.name} is for {needed}, the file holds {in_file}"
        if custom:
            problem += f" with other {', '.join(custom)}"
        if wanted:
            raise ValueError(problem)
        misfits.append(f"{problem}; it has the file's name, but was not used")
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
    """Names of the classes, as timm's config.json has them, where they are from, and why others are not used."""
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
    """What was done that may matter."""
    least = found.least_norm_weight
    if least is not None and least >= 1e-5:
        yield (
            f"no norm weight is below {least:.2g}, so the In-Place ABN may have been replaced before; the difference "
            "is 1e-5 in each weight, norm_weights='bn' leaves them as they are"
        )
    yield from misfits
    if found.head == "query2label" and not found.num_classes:
        yield "the Query2Label head was left out: what is converted is the backbone"
    if found.head == "query2label" and found.num_classes:
        yield "Query2Label's attention was taken to have 4 heads, as published, which no tensor tells"
    if found.head == "ml_decoder" and not found.num_classes:
        yield (
            "the word embeddings of the labels are not in the file: the network answers once it has been given some, "
            "by model.set_label_embeddings(names, vectors)"
        )
    if found.other_keys:
        why = ""
        if run and run.average_measured is not None and found.key in ("state_dict", "state_dict_ema"):
            measured = "state_dict_ema" if run.average_measured else "state_dict"
            why = f"; the run's metric was that of {measured}"
        yield f"taken: {found.key!r}, not {', '.join(map(repr, found.other_keys))} (--key KEY chooses){why}"
    if found.left_out:
        yield f"left out, since it is beside the network: {name_some(found.left_out)}"
    if fault:
        yield fault
    if found.num_classes:
        yield f"class names: {source or 'none known; give some with --labels FILE'}"
    if found.inplace_abn:
        yield "In-Place ABN weights became batch norm weights, |w| + 1e-5"
    if found.dtypes:
        yield f"weights were cast from {', '.join(sorted(map(str, found.dtypes)))} to torch.float32"
    unknown = [name for name in NAMES if name not in facts.known]
    if unknown:
        yield (
            f"unknown, and left out: {', '.join(unknown)}; whoever loads it assumes those of {found.architecture}, so "
            "take another's with --like WEIGHTS, or give what you know"
        )

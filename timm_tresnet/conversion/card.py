"""Model cards: the README.md of a Hub repository with converted weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from timm_tresnet.utils.notes import MULTI_LABEL
from timm_tresnet.utils.tables import format_markdown
from timm_tresnet.weights.catalogue import NOTHING_KNOWN, PublicWeight, WeightFacts

PLACEHOLDER = "local-dir:FOLDER"  # model name in a card that has no repository yet

_TRESNET = "arXiv:2003.13630"
_PAPERS = {  # title, authors and year as arXiv has them
    _TRESNET: (
        "TResNet: High Performance GPU-Dedicated Architecture",
        "Tal Ridnik and Hussam Lawen and Asaf Noy and Emanuel Ben Baruch and Gilad Sharir and Itamar Friedman",
        2020,
    ),
    "arXiv:2009.14119": (
        "Asymmetric Loss For Multi-Label Classification",
        "Emanuel Ben-Baruch and Tal Ridnik and Nadav Zamir and Asaf Noy and Itamar Friedman and Matan Protter and "
        "Lihi Zelnik-Manor",
        2020,
    ),
    "arXiv:2104.10972": (
        "ImageNet-21K Pretraining for the Masses",
        "Tal Ridnik and Emanuel Ben-Baruch and Asaf Noy and Lihi Zelnik-Manor",
        2021,
    ),
    "arXiv:2110.10955": (
        "Multi-label Classification with Partial Annotations using Class-aware Selective Loss",
        "Emanuel Ben-Baruch and Tal Ridnik and Itamar Friedman and Avi Ben-Cohen and Nadav Zamir and Asaf Noy and "
        "Lihi Zelnik-Manor",
        2021,
    ),
    "arXiv:2107.10834": (
        "Query2Label: A Simple Transformer Way to Multi-Label Classification",
        "Shilong Liu and Lei Zhang and Xiao Yang and Hang Su and Jun Zhu",
        2021,
    ),
    "arXiv:2204.03475": (
        "Solving ImageNet: a Unified Scheme for Training any Backbone to Top Results",
        "Tal Ridnik and Hussam Lawen and Emanuel Ben-Baruch and Asaf Noy",
        2022,
    ),
    "arXiv:2111.12933": (
        "ML-Decoder: Scalable and Versatile Classification Head",
        "Tal Ridnik and Gilad Sharir and Avi Ben-Cohen and Emanuel Ben-Baruch and Asaf Noy",
        2021,
    ),
}
_HUB_DATASETS = {"ImageNet-1k": "ILSVRC/imagenet-1k"}  # only Hub repositories of a data set's own authors

CLASSIFY = """\
```python
import timm
import torch
from PIL import Image

model = timm.create_model("{model}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
image = transform(Image.open("photo.jpg").convert("RGB")).unsqueeze(0)

names = model.pretrained_cfg.get("label_names") or range(model.num_classes)
descriptions = model.pretrained_cfg.get("label_descriptions") or {{}}
with torch.inference_mode():
    probabilities = model(image)[0].{activation}
for probability, index in zip(*probabilities.topk({top})):
    print(descriptions.get(names[index], names[index]), float(probability))
```"""
_FEATURES = """\
```python
import timm
import torch

extractor = timm.create_model("{model}", pretrained=True, features_only=True).eval()
config = timm.data.resolve_data_config(model=extractor)
for features in extractor(torch.rand(1, *config["input_size"])):
    print(features.shape)
```"""
EMBED = """\
```python
import timm
import torch
from PIL import Image

embedder = timm.create_model("{model}", pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=embedder))
image = transform(Image.open("photo.jpg").convert("RGB")).unsqueeze(0)

with torch.inference_mode():
    embedding = embedder(image)  # a row for each image
```"""
_FINE_TUNE = """\
```python
import timm
import torch

model = timm.create_model("{model}", pretrained=True, num_classes=5).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

images = torch.rand(4, *model.pretrained_cfg["input_size"])  # your batch
labels = torch.tensor([0, 1, 2, 3])
loss = torch.nn.functional.cross_entropy(model(images), labels)
loss.backward()
optimizer.step()
```"""


def make_card(facts: WeightFacts | None, architecture: str, num_classes: int, repo_id: str | None = None) -> str:
    """Write the model card of converted weights.

    Args:
        facts: known facts about the weights, a `PublicWeight` for public ones; the card leaves unknown facts out.
        architecture: name of the variant.
        num_classes: outputs of the converted network; 0 if it has no classifier.
        repo_id: Hub repository of the card, OWNER/NAME; None if there is none yet. The examples then load
            `PLACEHOLDER`.

    Returns:
        Content of README.md: the Hub's metadata, then Markdown.

    Raises:
        ValueError: if repo_id is not of the form OWNER/NAME.
    """
    if repo_id is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, re.ASCII):
        raise ValueError(f"make_card needs repo_id to be OWNER/NAME, got {repo_id!r}")
    facts = facts or NOTHING_KNOWN
    public = facts if isinstance(facts, PublicWeight) else None
    name = public.name if public else repo_id.partition("/")[2] if repo_id else architecture
    sections = [f"# {plain(name)}", _introduce(facts, architecture, num_classes)]
    if table := _tabulate(facts, num_classes):
        sections.append(table)
    sections += _explain_use(facts, num_classes, f"hf-hub:{repo_id}" if repo_id else PLACEHOLDER)
    if data := [plain(each) for each in (public and public.pretraining, facts.dataset) if each]:
        sections += ["## Training data", f"{', then '.join(data)}."]
    if public:
        official = _refer("official code", public.code)
        licence = f"{plain(public.license)}, as the {official}." if public.license else _UNLICENSED
        sections += ["## Licence", licence]
    elif facts.license:
        sections += ["## Licence", f"{plain(facts.license)}, as given at the conversion of the weights."]
    sections += ["## Citation", cite([public.paper] if public and public.paper else [])]
    metadata = _describe(facts, name, num_classes).to_yaml()
    return f"---\n{metadata}\n---\n" + "\n\n".join(sections) + "\n"


_UNLICENSED = "The authors name no licence for these weights. Ask them before you use the weights."


def _describe(facts: WeightFacts, name: str, num_classes: int) -> ModelCardData:
    public = facts if isinstance(facts, PublicWeight) else None
    pipeline = "image-classification" if num_classes else "image-feature-extraction"
    tags = [pipeline, "timm", "tresnet"]
    if facts.multi_label:
        tags.append(MULTI_LABEL)
    named = (facts.dataset, public and public.pretraining)
    datasets = [_HUB_DATASETS[dataset] for dataset in named if dataset in _HUB_DATASETS]
    results = None
    if public and public.metric and public.dataset and _has_published_head(public, num_classes):
        repository = public.metric.published.partition(",")[0]
        if repository == "timm":
            repository = "huggingface/pytorch-image-models"
        results = [
            EvalResult(
                task_type=pipeline,
                dataset_type=_HUB_DATASETS.get(public.dataset, _slug(public.dataset)),
                dataset_name=public.dataset,
                metric_type="accuracy" if public.metric.name == "top-1 accuracy" else _slug(public.metric.name),
                metric_name=public.metric.name,
                metric_value=public.metric.value,
                source_name=public.metric.published,
                source_url=f"https://github.com/{repository}",
            )
        ]
    return ModelCardData(
        license=facts.license,
        library_name="timm",
        pipeline_tag=pipeline,
        tags=tags,
        datasets=datasets or None,
        model_name=name if results else None,
        eval_results=results,
    )


def _introduce(facts: WeightFacts, architecture: str, num_classes: int) -> str:
    public = facts if isinstance(facts, PublicWeight) else None
    kind = "A multi-label image classifier" if facts.multi_label else "An image classifier"
    if not num_classes:
        kind = "An image feature extractor"
    text = (
        f"{kind}: TResNet ({link(_TRESNET)}), variant {as_code(architecture)}, for timm with the plugin timm-tresnet."
    )
    if public is None:
        known = f"trained on {plain(facts.dataset)}" if facts.dataset else "of unknown training"
        return f"{text} Converted from a checkpoint {known}."
    files = " or ".join(map(as_code, public.files))
    code = _refer("code", public.code)
    if public.paper:
        source = f"The weights of {link(public.paper)}, converted from {files} of its {code}."
    else:
        source = f"The weights were converted from {files} of their authors' {code}."
    return f"{text} {source}"


def _tabulate(facts: WeightFacts, num_classes: int) -> str:
    rows: list[tuple[str, Any]] = [("classes", num_classes)] if num_classes else []
    if facts.multi_label and num_classes:
        rows.append(("outputs", "one sigmoid a class; an image can have any number of classes"))
        if facts.threshold is not None:
            rows.append(("threshold", f"an image has each class with a probability of at least {facts.threshold:g}"))
    if facts.input_size:
        rows.append(("image", _describe_preprocessing(facts, facts.input_size)))
    if isinstance(facts, PublicWeight) and facts.metric:
        metric = f"{facts.metric.value} %, published in {plain(facts.metric.published)}"
        if not _has_published_head(facts, num_classes):
            metric += "; with the published head, which is not part of these weights"
        rows.append((plain(f"{facts.metric.name} on {facts.dataset}"), metric))
    return format_markdown(["", ""], rows) if rows else ""


def _describe_preprocessing(facts: WeightFacts, sides: int | tuple[int, int]) -> str:
    height, width = (sides, sides) if isinstance(sides, int) else sides
    size = f"{height} × {width}"
    if facts.crop_mode == "squash":
        text = f"RGB, resized to {size} pixels whatever its shape"
    elif facts.crop_pct and height == width:
        text = f"RGB, shorter side resized to {int(height / facts.crop_pct)} pixels, then the central {size}"
    elif facts.crop_pct:
        resized = f"{int(height / facts.crop_pct)} × {int(width / facts.crop_pct)}"
        text = f"RGB, resized to cover {resized} pixels, then the central {size}"
    else:
        text = f"RGB, {size} pixels"
    if facts.interpolation:
        text += f" ({plain(facts.interpolation)})"
    return f"{text}; mean {list(facts.mean)}, std {list(facts.std)}" if facts.mean and facts.std else text


def _explain_use(facts: WeightFacts, num_classes: int, model: str) -> list[str]:
    examples = {"Feature maps": _FEATURES, "Embeddings": EMBED, "Fine-tuning": _FINE_TUNE}
    if num_classes:
        examples = {"Classification": CLASSIFY, **examples}
    activation = "sigmoid()" if facts.multi_label else "softmax(-1)"
    sections = ["## Use", "With timm and timm-tresnet installed; the preprocessing comes with the weights."]
    for title, example in examples.items():
        sections += [f"### {title}", example.format(model=model, activation=activation, top=min(5, num_classes))]
    return sections


def cite(papers: Sequence[str]) -> str:
    """Return the BibTeX of papers, arXiv:NUMBER, followed by TResNet's."""
    return "\n\n".join(_format_bibtex(paper) for paper in dict.fromkeys([*papers, _TRESNET]))


def _format_bibtex(paper: str) -> str:
    title, authors, year = _PAPERS[paper]
    number = paper.removeprefix("arXiv:")
    return (
        f"```bibtex\n@misc{{arxiv{number},\n  title = {{{title}}},\n  author = {{{authors}}},\n  year = {{{year}}},\n"
        f"  eprint = {{{number}}},\n  archivePrefix = {{arXiv}}\n}}\n```"
    )


def _has_published_head(public: PublicWeight, num_classes: int) -> bool:
    return bool(num_classes) and num_classes == public.converted_classes


def link(paper: str) -> str:
    """Return a paper, arXiv:NUMBER, as a Markdown link."""
    return f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"


def _refer(text: str, address: str) -> str:
    """Return a Markdown link if the address is a plain https URL, else the address as text."""
    if re.fullmatch(r"https://[\w.~/-]+", address, re.ASCII):
        return f"[{text}]({address})"
    return f"{text} ({plain(address)})"


def plain(text: str) -> str:
    """Return text in one line with Markdown and HTML characters escaped."""
    return re.sub(r"([\\`*\[\]<>#~])", r"\\\1", " ".join(text.split()))


def as_code(text: str) -> str:
    """Return text in one line as Markdown code."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower())

"""Model cards: the README.md of a Hub repository with converted weights."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCardData

if TYPE_CHECKING:
    from timm_tresnet.recipes import Recipe

PLACEHOLDER = "local-dir:FOLDER"  # stands for the model's name in a card that is not for a repository yet

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
    "arXiv:2111.12933": (
        "ML-Decoder: Scalable and Versatile Classification Head",
        "Tal Ridnik and Gilad Sharir and Avi Ben-Cohen and Emanuel Ben-Baruch and Asaf Noy",
        2021,
    ),
}
_HUB_DATASETS = {"ImageNet-1k": "ILSVRC/imagenet-1k"}  # data sets whose Hub repository is that of their authors

_CLASSIFY = """\
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
_EMBED = """\
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

images = torch.rand(4, *model.pretrained_cfg["input_size"])  # a batch of yours
labels = torch.tensor([0, 1, 2, 3])
loss = torch.nn.functional.cross_entropy(model(images), labels)
loss.backward()
optimizer.step()
```"""


def make_card(recipe: Recipe | None, architecture: str, num_classes: int, repo_id: str | None = None) -> str:
    """Write the model card of converted weights.

    Args:
        recipe: what is known about the weights; None if they are not public ones. What it does not say, the card leaves
            out.
        architecture: name of the variant.
        num_classes: outputs of the converted network; 0 if it has no classifier.
        repo_id: Hub repository, "organisation/name", in which the card will be; None if there is none yet, and the
            examples then load `PLACEHOLDER`.

    Returns:
        Content of README.md: metadata as the Hub reads it, then Markdown.
    """
    name = recipe.name if recipe else repo_id.partition("/")[2] if repo_id else architecture
    sections = [f"# {name}", _introduce(recipe, architecture, num_classes)]
    if table := _tabulate(recipe, num_classes):
        sections.append(table)
    sections += _explain_use(recipe, num_classes, f"hf-hub:{repo_id}" if repo_id else PLACEHOLDER)
    if recipe:
        sections += ["## Training data", _name_training_data(recipe)]
        licence = f"{recipe.license}, as the [official code]({recipe.code})." if recipe.license else _UNLICENSED
        sections += ["## Licence", licence]
    sections += ["## Citation", _cite(recipe)]
    metadata = _describe(recipe, name, num_classes).to_yaml()
    return f"---\n{metadata}\n---\n" + "\n\n".join(sections) + "\n"


_UNLICENSED = "Their authors name no licence for these weights; ask them before you use the weights."


def _describe(recipe: Recipe | None, name: str, num_classes: int) -> ModelCardData:
    pipeline = "image-classification" if num_classes else "image-feature-extraction"
    tags = [pipeline, "timm", "tresnet"]
    if recipe is None:
        return ModelCardData(library_name="timm", pipeline_tag=pipeline, tags=tags)
    if recipe.multi_label:
        tags.append("multi-label")
    datasets = [_HUB_DATASETS[dataset] for dataset in (recipe.dataset, recipe.pretraining) if dataset in _HUB_DATASETS]
    results = None
    if _has_published_head(recipe, num_classes):
        repository = recipe.metric.published.partition(",")[0]
        if repository == "timm":
            repository = "huggingface/pytorch-image-models"
        results = [
            EvalResult(
                task_type=pipeline,
                dataset_type=_HUB_DATASETS.get(recipe.dataset, _slug(recipe.dataset)),
                dataset_name=recipe.dataset,
                metric_type="accuracy" if recipe.metric.name == "top-1 accuracy" else _slug(recipe.metric.name),
                metric_name=recipe.metric.name,
                metric_value=recipe.metric.value,
                source_name=recipe.metric.published,
                source_url=f"https://github.com/{repository}",
            )
        ]
    return ModelCardData(
        license=recipe.license,
        library_name="timm",
        pipeline_tag=pipeline,
        tags=tags,
        datasets=datasets or None,
        model_name=name if results else None,
        eval_results=results,
    )


def _introduce(recipe: Recipe | None, architecture: str, num_classes: int) -> str:
    kind = "A multi-label image classifier" if recipe and recipe.multi_label else "An image classifier"
    if not num_classes:
        kind = "An image feature extractor"
    text = f"{kind}: TResNet ({_link(_TRESNET)}), variant `{architecture}`, for timm with the plugin timm-tresnet."
    if recipe is None:
        return f"{text} Converted from a checkpoint whose training is not known."
    files = " or ".join(f"`{file}`" for file in recipe.files)
    source = f"The weights are those of {_link(recipe.paper)}, converted from {files} of its [code]({recipe.code})."
    if recipe.head == "ml_decoder" and not num_classes:
        source += " The ML-Decoder head is left out."
    return f"{text} {source}"


def _tabulate(recipe: Recipe | None, num_classes: int) -> str:
    rows = [("classes", num_classes)] if num_classes else []
    if recipe:
        if recipe.multi_label and num_classes:
            rows.append(("outputs", "one sigmoid a class; an image can have any number of the classes"))
        if recipe.input_size:
            rows.append(("image", _describe_preprocessing(recipe)))
        metric = f"{recipe.metric.value} %, published in {recipe.metric.published}"
        if not _has_published_head(recipe, num_classes):
            metric += "; that is with the published head, which is not part of these weights"
        rows.append((f"{recipe.metric.name} on {recipe.dataset}", metric))
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]) if rows else ""


def _describe_preprocessing(recipe: Recipe) -> str:
    size = recipe.input_size
    if recipe.crop_mode == "squash":
        resizing = f"resized to {size} × {size} pixels whatever its shape"
    else:
        resizing = f"shorter side resized to {int(size / recipe.crop_pct)} pixels, then the central {size} × {size}"
    return f"RGB, {resizing} ({recipe.interpolation}); mean {list(recipe.mean)}, std {list(recipe.std)}"


def _explain_use(recipe: Recipe | None, num_classes: int, model: str) -> list[str]:
    sections = ["## Use", "With timm and timm-tresnet installed; the preprocessing comes with the weights."]
    if num_classes:
        multi_label = recipe is not None and recipe.multi_label
        activation = "sigmoid()" if multi_label else "softmax(-1)"
        sections += [
            "### Classification",
            _CLASSIFY.format(model=model, activation=activation, top=min(5, num_classes)),
        ]
    return [
        *sections,
        "### Feature maps",
        _FEATURES.format(model=model),
        "### Embeddings",
        _EMBED.format(model=model),
        "### Fine-tuning",
        _FINE_TUNE.format(model=model),
    ]


def _name_training_data(recipe: Recipe) -> str:
    return f"{recipe.pretraining}, then {recipe.dataset}." if recipe.pretraining else f"{recipe.dataset}."


def _cite(recipe: Recipe | None) -> str:
    papers = dict.fromkeys([recipe.paper, _TRESNET] if recipe else [_TRESNET])
    return "\n\n".join(_format_bibtex(paper) for paper in papers)


def _format_bibtex(paper: str) -> str:
    title, authors, year = _PAPERS[paper]
    number = paper.removeprefix("arXiv:")
    return (
        f"```bibtex\n@misc{{arxiv{number},\n  title = {{{title}}},\n  author = {{{authors}}},\n  year = {{{year}}},\n"
        f"  eprint = {{{number}}},\n  archivePrefix = {{arXiv}}\n}}\n```"
    )


def _has_published_head(recipe: Recipe, num_classes: int) -> bool:
    return recipe.head != "ml_decoder" and num_classes == recipe.num_classes


def _link(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower())

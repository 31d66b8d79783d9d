"""Checks of a repository of converted weights, or of a Space, shared by publish.py and verify.py."""

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, RepoCard
from huggingface_hub.hf_api import RepoFile
from safetensors import safe_open

from timm_tresnet.conversion.card import PLACEHOLDER, plain
from timm_tresnet.utils.archives import check_claims
from timm_tresnet.utils.errors import summarise
from timm_tresnet.weights.catalogue import TRAINED_ON, PublicWeight, load_catalogue, make_pretrained_cfg
from timm_tresnet.weights.checkpoint import find_misfits
from timm_tresnet.weights.config import read_config
from timm_tresnet.weights.labels import MULTI_LABEL, is_multi_label
from timm_tresnet.weights.loading import build_skeleton

WEIGHTS, CONFIG, CARD = REQUIRED = ("model.safetensors", "config.json", "README.md")
SPACE_REQUIRED = (CARD, "requirements.txt")
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".tar")

SPACE_SDK = "gradio"
_SPACE_METADATA = ("title", "sdk", "sdk_version", "app_file", "license")
_COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")  # of the Hub's pages
_LONGEST_DESCRIPTION = 60

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class LocalFile:
    """A file on this machine.

    Args:
        content: its bytes if they differ from the file on the disk, else its path.
        size: size in bytes.
        sha256: the Hub's hash of LFS files.
        git_blob: git's SHA-1 of other files.
    """

    content: bytes | Path
    size: int
    sha256: str
    git_blob: str

    def is_same(self, held: RepoFile) -> bool:
        """Return whether a repository's file has the same hash."""
        return self.sha256 == held.lfs.sha256 if held.lfs else self.git_blob == held.blob_id


def hash_file(content: bytes | Path) -> LocalFile:
    """Hash a file as the Hub does.

    Args:
        content: its bytes, or its path.

    Returns:
        The file with its hashes.
    """
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256")
        file.seek(0)
        git_blob = hashlib.file_digest(file, lambda: hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False))
    return LocalFile(content, size, sha256.hexdigest(), git_blob.hexdigest())


def list_files(api: HfApi, repo_id: str, commit: str, repo_type: str = "model") -> dict[str, RepoFile]:
    """List the files of a repository.

    Args:
        api: client of the Hub.
        repo_id: the repository.
        commit: the revision.
        repo_type: "model" or "space".

    Returns:
        The Hub's description of each file by its path.
    """
    tree = api.list_repo_tree(repo_id, revision=commit, recursive=True, repo_type=repo_type)
    return {file.path: file for file in tree if isinstance(file, RepoFile)}


def read_shapes(path: Path) -> Shapes:
    """Read names and shapes from the header of a safetensors file.

    Args:
        path: the file.

    Returns:
        Shape of each tensor by its name.

    Raises:
        SafetensorError: if the file is damaged or not a safetensors file.
        ValueError: if its header declares more than the file has.
    """
    check_claims(path)
    with safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def find_problems(folder: Path, shapes: Shapes, repo_id: str) -> list[str]:
    """Check config.json and README.md of a repository, and that its weights fit the config's network.

    Args:
        folder: folder with config.json and README.md.
        shapes: shape of each tensor in model.safetensors by its name.
        repo_id: the repository.

    Returns:
        The problems, one sentence each.
    """
    try:
        config = read_config(folder / CONFIG, CONFIG)
        if "pretrained_cfg" not in config:
            raise ValueError(f"{CONFIG} needs pretrained_cfg, timm's present form")
    except ValueError as error:
        return [str(error), *_check_card(folder / CARD, None, repo_id, {})]
    public = load_catalogue().get(f"{config['architecture']}.{config['pretrained_cfg'].get('tag')}")
    problems = _check_weights(folder, shapes)
    names = config.get("label_names")
    if names and len(names) != config.get("num_classes"):
        problems.append(f"{CONFIG} names {len(names)} classes but has num_classes {config.get('num_classes')}")
    if public:
        problems += _compare_with_catalogue(config, public)
    return problems + _check_card(folder / CARD, public, repo_id, config)


def find_space_problems(folder: Path) -> list[str]:
    """Check the card of a Space, whose metadata say how the Hub runs it.

    Args:
        folder: folder with README.md and the app.

    Returns:
        The problems, one sentence each.
    """
    data, problems = _read_card(folder / CARD)
    if problems:
        return problems
    problems = [f"{CARD} has no {name}, which the Hub needs" for name in _SPACE_METADATA if not data.get(name)]
    if data.get("sdk", SPACE_SDK) != SPACE_SDK:
        problems.append(f"{CARD} has sdk {data.get('sdk')!r} instead of {SPACE_SDK!r}")
    app = data.get("app_file")
    if app and not (isinstance(app, str) and (folder / app).is_file()):
        problems.append(f"{CARD} has app_file {app!r}, which does not exist")
    if len(str(data.get("short_description"))) > _LONGEST_DESCRIPTION:
        problems.append(f"{CARD} has a short_description of more than {_LONGEST_DESCRIPTION} characters")
    for name in ("colorFrom", "colorTo"):
        if data.get(name, _COLOURS[0]) not in _COLOURS:
            problems.append(f"{CARD} has {name} {data.get(name)!r} instead of one of {', '.join(_COLOURS)}")
    return problems


def _check_weights(folder: Path, shapes: Shapes) -> list[str]:
    try:
        model = build_skeleton(f"local-dir:{folder.absolute()}")
    except ValueError as error:
        return [str(error)]
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return [
        f"{WEIGHTS} has {kind} tensors for the model of {CONFIG}: {_shorten(names)}"
        for kind, names in zip(("missing", "unexpected", "misshapen"), find_misfits(shapes, expected), strict=True)
        if names
    ]


def _compare_with_catalogue(config: dict[str, Any], public: PublicWeight) -> list[str]:
    pretrained_cfg = config["pretrained_cfg"]
    classes = config.get("num_classes") if public.head == "unknown" else public.converted_classes
    expected = json.loads(json.dumps(make_pretrained_cfg(public, classes)))
    pairs = [(name, pretrained_cfg.get(name), expected[name]) for name in public.known if name in expected]
    pairs.append(("num_classes", config.get("num_classes"), classes))
    pairs.append(("multi_label", is_multi_label(pretrained_cfg), is_multi_label(expected)))
    arguments = config.get("model_args", {})
    pairs += [(name, arguments.get(name), value) for name, value in public.slopes.items()]
    return [
        f"{CONFIG} has {name} {actual!r}, public weight {public.name} has {value!r}"
        for name, actual, value in pairs
        if actual != value
    ]


def _read_card(path: Path, kind: type[RepoCard] = RepoCard) -> tuple[Any, list[str]]:
    """Return the metadata of a card, or None and the problems."""
    content = path.read_text(encoding="utf-8", errors="replace")
    if not content.startswith("---\n"):
        return None, [f"{CARD} has no metadata"]
    try:
        return kind(content).data, []
    except Exception as error:  # the client takes the metadata apart unchecked, so that any error is one of its shape
        return None, [f"{CARD} has metadata that the Hub cannot read: {summarise(error)}"]


def _check_card(path: Path, public: PublicWeight | None, repo_id: str, config: dict[str, Any]) -> list[str]:
    data, problems = _read_card(path, ModelCard)
    if problems:
        return problems
    content = path.read_text(encoding="utf-8", errors="replace")
    expected = {"library_name": "timm"}
    if public and public.license:
        expected["license"] = public.license
    problems = [
        f"{CARD} has {name} {data.get(name)!r} instead of {value!r}"
        for name, value in expected.items()
        if data.get(name) != value
    ]
    problems += _compare_with_config(data, content, config, expected)
    if public and data.eval_results:
        values = [result.metric_value for result in data.eval_results]
        if any(value != public.metric.value for value in values):
            problems.append(f"{CARD} has results {values}, public weight {public.name} has {public.metric.value}")
    named = set(re.findall(rf"{PLACEHOLDER}|hf-hub:[\w./-]+", content)) - {f"hf-hub:{repo_id}"}
    return problems + [f"{CARD} tells its readers to load {name}" for name in sorted(named)]


def _compare_with_config(data: Any, content: str, config: dict[str, Any], expected: dict[str, str]) -> Iterator[str]:
    """Yield contradictions between a card and the config beside it."""
    pretrained_cfg = config.get("pretrained_cfg", {})
    license = pretrained_cfg.get("license")
    if license and "license" not in expected and data.get("license") != license:
        yield f"{CARD} has license {data.get('license')!r}, {CONFIG} has {license!r}"
    description = pretrained_cfg.get("description") or ""
    if description.startswith(TRAINED_ON) and plain(description.removeprefix(TRAINED_ON)) not in content:
        yield f"{CARD} does not say what {CONFIG} says: {description}"
    if config:
        multi_label = is_multi_label(pretrained_cfg)
        if multi_label != (MULTI_LABEL in (data.get("tags") or [])):
            yield f"{CARD} {'lacks' if multi_label else 'has'} the tag {MULTI_LABEL}, against {CONFIG}"
        wrong, right = ("softmax(", "sigmoid()") if multi_label else ("sigmoid()", "softmax(-1)")
        if wrong in content:
            yield f"{CARD} computes probabilities by {wrong.strip('()')}, by {CONFIG} it is {right}"


def _shorten(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown

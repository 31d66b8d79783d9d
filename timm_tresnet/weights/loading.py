"""Load networks by name; an untrusted folder or repository is validated first."""

import contextlib
import dataclasses
import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from timm_tresnet.utils.archives import check_claims
from timm_tresnet.utils.errors import summarise
from timm_tresnet.variants import ARCHITECTURES, explain_unknown
from timm_tresnet.weights import config
from timm_tresnet.weights.catalogue import load_catalogue
from timm_tresnet.weights.hub import require_hub

_MOST_PARAMETERS = 10**9  # TResNet-XL has 8e7
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".tar")  # suffixes that timm looks for in a folder


def load_network(name: str) -> nn.Module:
    """Load a TResNet with its weights.

    Args:
        name: a variant or variant.tag, local-dir:FOLDER or hf-hub:OWNER/NAME[@REVISION].

    Returns:
        The network, in eval mode.

    Raises:
        ValueError: if the network does not exist, or cannot be downloaded, read or built; the message says why.
    """
    try:
        source, rest = _split(name)
        if source == "local-dir":
            _check_folder(Path(rest))
        elif not source:
            _check_name(rest)
        checked = _check_repository(rest) if source == "hf-hub" else name
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\b")  # about odd pickles, which torch then refuses or loads
            return timm.create_model(checked, pretrained=True).eval()
    # The Hub's client and the unpickling of untrusted weights can raise anything.
    except Exception as error:
        raise ValueError(f"cannot load the model {name}: {summarise(error)}") from error


@dataclasses.dataclass(frozen=True)
class Weights:
    """The description of weights that are not loaded.

    Args:
        architecture: name of the variant.
        model_args: arguments of the network that differ from the variant's.
        pretrained_cfg: timm's pretrained config, completed by `preprocessing.fill_preprocessing`.
    """

    architecture: str
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]


def look_up_weights(name: str) -> Weights:
    """Look up weights by name, see `load_network`; from a repository, only config.json is downloaded.

    Raises:
        ValueError: if no weights have this name, or config.json cannot be downloaded or is damaged.
    """
    try:
        source, rest = _split(name)
        if source:
            path, pinned, display_name = _find_config(source, rest)
            model_args = config.read_config(path, display_name).get("model_args", {})
            pretrained_cfg: Any = build_skeleton(pinned, display_name).pretrained_cfg
        else:
            _check_name(rest)
            with torch.device("meta"), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Mapping deprecated model name")
                pretrained_cfg = timm.create_model(rest, pretrained=False).pretrained_cfg
            public = load_catalogue().get(f"{pretrained_cfg['architecture']}.{pretrained_cfg.get('tag')}")
            model_args = public.network_arguments if public else {}
    # The Hub's client can raise anything.
    except Exception as error:
        raise ValueError(f"cannot look up the weights {name}: {summarise(error)}") from error
    return Weights(pretrained_cfg["architecture"], dict(model_args), dict(pretrained_cfg))


def build_skeleton(name: str, display_name: str = config.NAME) -> nn.Module:
    """Build the network of a checked config.json on the meta device, without memory for parameters, and run it.

    Args:
        name: local-dir:FOLDER or hf-hub:OWNER/NAME@REVISION.
        display_name: name of the config in messages.

    Returns:
        The network, on the meta device.

    Raises:
        ValueError: if the network cannot be built, is too large, or cannot run on images of its config's size.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            model: Any = timm.create_model(name, pretrained=False).eval()
            parameters = sum(parameter.numel() for parameter in model.parameters())
            if parameters > _MOST_PARAMETERS:
                raise ValueError(f"it has {parameters:.1e} parameters, more than {_MOST_PARAMETERS:.0e}")
            # Before 1.0.31, timm does not adapt the size's first number to in_chans.
            logits = model(torch.empty(1, model.in_chans, *model.pretrained_cfg.get("input_size", (3, 224, 224))[1:]))
            if model.num_classes and logits.ndim != 2:
                raise ValueError("it needs a global_pool to classify images, got ''")
    # timm's layers raise these for combinations of arguments that are valid on their own.
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{display_name} describes a network that cannot run: {summarise(error)}") from error
    return model


def _check_name(name: str) -> None:
    unknown = explain_unknown(name)
    if unknown and timm.models.is_model(name.partition(".")[0]) and name.partition(".")[0] not in ARCHITECTURES:
        raise ValueError("it is not a TResNet; see `timm-tresnet list`, or timm.create_model for other networks")
    if unknown:
        raise ValueError(unknown)


def _split(name: str) -> tuple[str, str]:
    """Split a name into its source, "" for the registry, and the rest, as timm does."""
    source, colon, rest = name.partition(":")
    if not colon:
        return "", name
    source = source.lower().replace("_", "-")
    if source not in ("local-dir", "hf-hub") or not rest:
        raise ValueError("needs a name from `timm-tresnet list`, hf-hub:OWNER/NAME or local-dir:FOLDER")
    return source, rest


def _find_config(source: str, name: str) -> tuple[Path, str, str]:
    """Return the path of a config.json, timm's name for exactly these weights, and its name in messages."""
    if source == "local-dir":
        path = Path(name) / config.NAME
        return path, f"local-dir:{name}", str(path)
    repo_id, at, revision = name.partition("@")
    if at and not revision:
        raise ValueError(f"needs a revision after @, got {name}")
    require_hub(repo_id, config.NAME, revision=revision or None)
    path = Path(hf_hub_download(repo_id, config.NAME, revision=revision or None))
    return path, f"hf-hub:{repo_id}@{path.parent.name}", f"{config.NAME} of {repo_id}"


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    config.read_config(folder / config.NAME)
    build_skeleton(f"local-dir:{folder}", str(folder / config.NAME))
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(_WEIGHTS):
                _check_file(Path(entry.path))


def _check_file(path: Path) -> None:
    try:
        check_claims(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_repository(name: str) -> str:
    """Check a repository; return its name with the checked commit, so that timm loads the same one."""
    path, pinned, display_name = _find_config("hf-hub", name)
    config.read_config(path, display_name)
    build_skeleton(pinned, display_name)
    _check_hash(name.partition("@")[0], path.parent.name)
    return pinned


def _check_hash(repo_id: str, revision: str) -> None:
    """Compare the downloaded weights with the Hub's hash, which the Hub's client does not check."""
    try:
        blob = Path(hf_hub_download(repo_id, "model.safetensors", revision=revision)).resolve()
    except EntryNotFoundError:
        with contextlib.suppress(EntryNotFoundError):  # timm then loads this file
            _check_file(Path(hf_hub_download(repo_id, "pytorch_model.bin", revision=revision)))
        return
    _check_file(blob)
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):  # in a cache without links, the file is not named by its hash
        with blob.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != blob.name:
            blob.unlink()
            raise ValueError(
                f"model.safetensors of {repo_id} needs the SHA-256 {blob.name}, got {found}; it was removed from the "
                "cache, try again"
            )

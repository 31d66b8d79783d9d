"""Helpers of the tests of publishing."""

import functools
import importlib
import sys
import time
from pathlib import Path
from types import ModuleType

import huggingface_hub
import pytest
import timm
from hub_server import HubServer
from huggingface_hub import HfApi
from packaging.version import Version
from timm.models import save_for_hf

from timm_tresnet.conversion.card import make_card
from timm_tresnet.weights.catalogue import Metric, PublicWeight

HUB = Path(__file__).parents[1] / "hub"
TOKEN = "hf_aTokenThatNobodyMaySee"
PUBLIC_WEIGHT = PublicWeight(
    architecture="test_tresnet",
    tag="insects",
    files=("insects.pth",),
    dataset="Insects",
    num_classes=3,
    interpolation="bilinear",
    crop_pct=1.0,
    crop_mode="squash",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    metric=Metric("top-1 accuracy", 61.5, "owner/insects, README.md"),
    paper="arXiv:2003.13630",
    code="https://github.com/owner/insects",
    input_size=64,
    license="mit",
)


def make_insects(folder: Path, repo_id: str | None = None) -> Path:
    """A folder as conversion writes them, its card for a repository or with the placeholder."""
    model = timm.create_model("test_tresnet", num_classes=3)
    model_config = {
        "label_names": ["ant", "bee", "cicada"],
        "pretrained_cfg": {"tag": PUBLIC_WEIGHT.tag, "crop_mode": "squash", "license": "mit"},
    }
    save_for_hf(model, folder, model_config=model_config, safe_serialization=True)
    (folder / "README.md").write_text(make_card(PUBLIC_WEIGHT, "test_tresnet", 3, repo_id), encoding="utf-8")
    return folder


def direct_client(patch: pytest.MonkeyPatch, hub: HubServer, cache: Path) -> None:
    """Have this process's client ask a stand-in for the Hub, without waiting between its tries."""
    if Version(huggingface_hub.__version__) < Version("1"):
        pytest.skip("this huggingface_hub reads its address only when it is imported")
    patch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    patch.setitem(sys.modules["huggingface_hub.utils.tqdm"].progress_bar_states, "_global", False)
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setattr(time, "sleep", lambda seconds: None)  # no variable shortens the waits between the client's tries


def load_tools(patch: pytest.MonkeyPatch, hub: HubServer) -> dict[str, ModuleType]:
    """The scripts of hub/ as modules, their client directed to a stand-in for the Hub."""
    patch.syspath_prepend(str(HUB))
    scripts = {name: importlib.import_module(name) for name in ("checks", "client", "publish", "verify")}
    patch.setattr(scripts["checks"], "load_catalogue", lambda: {PUBLIC_WEIGHT.name: PUBLIC_WEIGHT})
    patch.setattr(scripts["client"], "HfApi", functools.partial(HfApi, endpoint=hub.url, token=TOKEN))
    return scripts

"""Loading weights with the real huggingface_hub client, through timm, from a stand-in for the Hub on loopback."""

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from hub_server import Fault
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

# For the children, which import timm alone: PyTorch's autoload has to bring the plugin.
TIMM = """
import sys
import timm
import torch
from safetensors.torch import load_file

def create_short(name, **kwargs):
    return timm.create_model(name, pretrained=True, layers=(1, 1, 1, 1), **kwargs)

def assert_holds(model, folder):
    assert (type(model).__module__, type(model).__name__) == ("timm_tresnet.models.network", "TResNet"), type(model)
    weights = load_file(f"{folder}/model.safetensors")
    torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0, check_dtype=False)
"""

NO_WAITING = """
import time

time.sleep = lambda seconds: None  # no variable shortens the 23 s that the client waits between its tries
"""

ASSERT_EXPLAINED = f"""
{TIMM}
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

with pytest.raises(LocalEntryNotFoundError) as caught:
    create_short("tresnet_m.miil_in1k")
for part in (
    "model.safetensors", "timm/tresnet_m.miil_in1k", "HF_ENDPOINT", "HF_HOME", "cache_dir",
    "'local-dir:FOLDER', pretrained=True", "test_tresnet",
):
    assert part in str(caught.value), part
"""


# Older clients ask again after a failure only when they are told to, not by themselves.
RETRIES = int(huggingface_hub.__version__.split(".")[0]) >= 1


def draw_weights(model: nn.Module, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Integers small enough that half precision holds them, sums of three and quarters of them exactly."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(-512, 513, tensor.shape, generator=generator, dtype=torch.int16).to(dtype)
        for name, tensor in model.state_dict().items()
    }


@pytest.fixture(scope="session")
def tresnet_m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository as timm/tresnet_m.* are, but in half precision and of a block a stage, to write and send less."""
    folder = tmp_path_factory.mktemp("tresnet_m")
    with torch.device("meta"):
        model = timm.create_model("tresnet_m", layers=(1, 1, 1, 1))
    save_file(draw_weights(model, 0, torch.float16), folder / "model.safetensors")
    return folder


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small model as users do who share one."""

    def save(name: str, seed: int) -> Path:
        model = timm.create_model("test_tresnet", num_classes=3)
        model.load_state_dict(draw_weights(model, seed, torch.float32))
        model_config = {"label_names": ["ant", "bee", "cicada"]}
        save_for_hf(model, tmp_path / name, model_config=model_config, safe_serialization=True)
        return tmp_path / name

    return save


def test_registry_name_downloads_the_safetensors_file_and_gives_exactly_its_weights(hub, run_child, tresnet_m):
    hub.add("timm/tresnet_m.miil_in1k", tresnet_m)
    run_child(
        f"{TIMM}assert_holds(create_short('tresnet_m.miil_in1k'), sys.argv[1])",
        tresnet_m,
    )
    path = "/timm/tresnet_m.miil_in1k/resolve/main/model.safetensors"
    assert hub.requests == [("HEAD", path, 200), ("GET", path, 200)]


@pytest.mark.thorough  # the client's own
@pytest.mark.skipif(not RETRIES, reason="huggingface_hub older than 1.0 does not take up a broken download by itself")
def test_download_that_breaks_off_is_resumed(hub, run_child, tresnet_m):
    hub.add("timm/tresnet_m.miil_in1k", tresnet_m)
    hub.faults.append(Fault(r"GET .*/model\.safetensors", break_off_at=12 * 2**20))  # the client keeps chunks of 10 MiB
    run_child(
        """
import filecmp
import sys
from huggingface_hub import hf_hub_download

downloaded = hf_hub_download("timm/tresnet_m.miil_in1k", "model.safetensors")
assert filecmp.cmp(downloaded, f"{sys.argv[1]}/model.safetensors", shallow=False)
""",
        tresnet_m,
        HF_HUB_VERBOSITY="error",  # the client warns that it resumes
    )
    path = "/timm/tresnet_m.miil_in1k/resolve/main/model.safetensors"
    assert hub.requests == [("HEAD", path, 200), ("GET", path, 200), ("GET", path, 206)]


def test_download_that_always_breaks_off_says_so_and_leaves_a_cache_that_works(hub, run_child, save_model, tmp_path):
    folder = save_model("insects", seed=1)
    hub.add("owner/insects", folder)
    tries = 6 if RETRIES else 1
    hub.faults.append(Fault(r"GET .*/model\.safetensors", break_off_at=100_000, times=tries))
    run_child(
        f"""
{TIMM}{NO_WAITING}
from pathlib import Path
import pytest

with pytest.raises(ConnectionError) as caught:
    timm.create_model("hf-hub:owner/insects", pretrained=True)
for part in ("test_tresnet needs", "repository owner/insects", "the download broke off", "HF_ENDPOINT"):
    assert part in str(caught.value), part
(cached,) = Path(sys.argv[2]).glob("hub/models--owner--insects/snapshots/*")
assert [path.name for path in cached.iterdir()] == ["config.json"]
assert not list(Path(sys.argv[2]).rglob("*.incomplete")) or not {RETRIES}
assert_holds(timm.create_model("hf-hub:owner/insects", pretrained=True), sys.argv[1])
""",
        folder,
        tmp_path / "hf_home",
        HF_HUB_VERBOSITY="error",  # the client warns of each try
    )


@pytest.mark.thorough
def test_hub_that_fails_for_a_while_gives_the_weights_afterwards(hub, run_child, save_model):
    folder = save_model("insects", seed=1)
    hub.add("owner/insects", folder)
    hub.faults.append(Fault(r"GET .*/model\.safetensors", status=500))
    if RETRIES:
        hub.faults.append(Fault(r"HEAD .*/config\.json", status=503, times=2))
    run_child(
        f"""
{TIMM}{NO_WAITING}
import pytest
from huggingface_hub.errors import HfHubHTTPError

with pytest.raises(HfHubHTTPError, match="500.*/owner/insects/resolve/main/model.safetensors"):
    timm.create_model("hf-hub:owner/insects", pretrained=True)
assert_holds(timm.create_model("hf-hub:owner/insects", pretrained=True), sys.argv[1])
""",
        folder,
        HF_HUB_VERBOSITY="error",  # the client warns of each try
    )


@pytest.mark.thorough  # the client's own
def test_two_processes_that_load_at_once_download_once(hub, run_child, save_model, tmp_path):
    folder = save_model("insects", seed=1)
    hub.add("owner/insects", folder)
    code = f"""
{TIMM}
import time
from pathlib import Path

ready = Path(sys.argv[2])
(ready / sys.argv[3]).touch()
while len(list(ready.iterdir())) < 2:
    time.sleep(0.01)
assert_holds(timm.create_model("hf-hub:owner/insects", pretrained=True), sys.argv[1])
"""
    (tmp_path / "ready").mkdir()
    with ThreadPoolExecutor(2) as pool:
        children = [pool.submit(run_child, code, folder, tmp_path / "ready", name) for name in "ab"]
    for child in children:
        child.result()
    path = "/owner/insects/resolve/main/model.safetensors"
    assert hub.requests.count(("GET", path, 200)) == 1
    assert hub.requests.count(("HEAD", path, 200)) == 2


@pytest.mark.thorough
def test_downloaded_weights_fit_other_channels_and_classes_without_a_warning(hub, run_child, tresnet_m):
    hub.add("timm/tresnet_m.miil_in1k", tresnet_m)
    run_child(
        TIMM
        + """
weights = load_file(f"{sys.argv[1]}/model.safetensors")
by_pixel = weights.pop("body.conv1.conv.weight").float().unflatten(1, (16, 3))
del weights["head.fc.weight"], weights["head.fc.bias"]
for in_chans in (1, 2, 4, 6):
    model = create_short("tresnet_m.miil_in1k", in_chans=in_chans, num_classes=5)
    state_dict = dict(model.state_dict())
    if in_chans == 1:
        stem = by_pixel.sum(2, keepdim=True)
    else:
        stem = torch.stack([by_pixel[:, :, channel % 3] for channel in range(in_chans)], 2) * 3 / in_chans
    assert torch.equal(state_dict.pop("body.conv1.conv.weight"), stem.flatten(1, 2)), in_chans
    assert state_dict.pop("head.fc.weight").shape == (5, 2048)
    assert state_dict.pop("head.fc.bias").shape == (5,)
    torch.testing.assert_close(state_dict, weights, rtol=0, atol=0, check_dtype=False)
""",
        tresnet_m,
    )


def test_hub_name_gives_the_weights_and_config_of_the_revision_it_names(hub, run_child, save_model):
    old, new = save_model("old", seed=1), save_model("new", seed=2)
    commit = hub.add("owner/insects", old)
    hub.add("owner/insects", new)
    run_child(
        TIMM
        + """
from huggingface_hub import model_info

old, new, commit = sys.argv[1:]
newest = model_info("owner/insects").sha
assert model_info("owner/insects", revision=commit).sha == commit != newest
for revision, folder in (("", new), (f"@{newest}", new), (f"@{commit}", old)):
    model = timm.create_model(f"hf-hub:owner/insects{revision}", pretrained=True)
    assert_holds(model, folder)
    assert model.num_classes == 3
    assert model.pretrained_cfg["label_names"] == ["ant", "bee", "cicada"]
""",
        old,
        new,
        commit,
    )


@pytest.mark.thorough
def test_cache_dir_takes_the_files_instead_of_hf_home(hub, run_child, save_model, tmp_path):
    folder = save_model("insects", seed=1)
    commit = hub.add("owner/insects", folder)
    run_child(
        TIMM
        + """
model = timm.create_model("hf-hub:owner/insects", pretrained=True, cache_dir=sys.argv[2])
assert_holds(model, sys.argv[1])
""",
        folder,
        tmp_path / "cache",
    )
    cached = tmp_path / "cache" / "models--owner--insects" / "snapshots" / commit
    assert sorted(path.name for path in cached.iterdir()) == ["config.json", "model.safetensors"]
    assert not list((tmp_path / "hf_home").rglob("*insects*"))


def test_offline_mode_loads_what_was_downloaded_before_without_a_request(hub, run_child, save_model):
    folder = save_model("insects", seed=1)
    hub.add("owner/insects", folder)
    run_child(
        """
from huggingface_hub import hf_hub_download

for name in ("config.json", "model.safetensors"):
    hf_hub_download("owner/insects", name)
"""
    )
    hub.requests.clear()
    run_child(
        f"{TIMM}assert_holds(timm.create_model('hf-hub:owner/insects', pretrained=True), sys.argv[1])",
        folder,
        HF_HUB_OFFLINE="1",
    )
    assert hub.requests == []


@pytest.mark.thorough
def test_local_dir_loads_a_saved_folder_without_a_request(hub, run_child, save_model):
    folder = save_model("insects", seed=1)
    run_child(
        f"{TIMM}assert_holds(timm.create_model('local-dir:' + sys.argv[1], pretrained=True), sys.argv[1])",
        folder,
    )
    assert hub.requests == []


def test_offline_mode_with_an_empty_cache_says_what_is_missing_and_what_to_do(run_child):
    run_child(ASSERT_EXPLAINED, HF_HUB_OFFLINE="1")


@pytest.mark.thorough
def test_hub_that_cannot_be_reached_says_what_is_missing_and_what_to_do(run_child):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # bound, so that nobody else listens there either
        run_child(
            NO_WAITING + ASSERT_EXPLAINED,
            HF_ENDPOINT=f"http://127.0.0.1:{deaf.getsockname()[1]}",
            HF_HUB_VERBOSITY="error",  # the client warns of each try
        )


def test_refusals_of_the_hub_are_reported_and_no_pickle_is_requested_instead(hub, run_child, tmp_path):
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_model.bin").touch()
    hub.add("timm/tresnet_m.miil_in1k_448", tmp_path / "pickle", gated=True)
    hub.add("timm/tresnet_m.miil_in21k_ft_in1k", tmp_path / "pickle")
    run_child(
        TIMM
        + """
import pytest
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

def assert_refused(name, error, **kwargs):
    with pytest.raises(error, match=f"/timm/{name}/resolve/") as caught:
        create_short(name, **kwargs)
    return caught.type

assert assert_refused("tresnet_m.miil_in1k", RepositoryNotFoundError) is not GatedRepoError
assert_refused("tresnet_m.miil_in1k_448", GatedRepoError)
revision = {"hf_hub_id": "timm/tresnet_m.miil_in21k_ft_in1k@nowhere"}
assert_refused("tresnet_m.miil_in21k_ft_in1k", RevisionNotFoundError, pretrained_cfg_overlay=revision)
assert_refused("tresnet_m.miil_in21k_ft_in1k", EntryNotFoundError)
"""
    )
    assert not [path for _, path, _ in hub.requests if not path.endswith("/model.safetensors")]

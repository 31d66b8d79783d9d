"""classify, hub/verify.py and hub/publish.py with a server that gives arbitrary answers."""

import itertools
import time

import pytest
from bad_servers import FAULTS, WHERE, Doors, find_disorder, make_files
from hub_server import Fault, HubServer
from publishing import TOKEN, make_insects

from timm_tresnet.cli import main as cli
from timm_tresnet.utils.images import SAMPLES

# huggingface_hub 2.4 uploads LFS files with an argument that its transport, httpx2, deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")


@pytest.fixture(scope="module")
def insects(tmp_path_factory):
    return make_insects(tmp_path_factory.mktemp("servers") / "insects")


@pytest.fixture
def doors(hub, tools, monkeypatch, insects):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(tools["checks"], "_check_weights", lambda folder, shapes: [])  # slow, and elsewhere
    return Doors(hub, tools, insects)


@pytest.fixture
def knock(doors, capsys):
    """Calls a command with a fault in its way, and returns its repository and exit status, if all is in order."""

    def call(door, fault):
        repo_id, run = doors.prepare(door, fault)
        capsys.readouterr()
        status = run()
        assert find_disorder(door, repo_id, status, *capsys.readouterr()) == ""
        return repo_id, status

    return call


@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.thorough)], ids=["some", "all"])
@pytest.mark.parametrize("door", WHERE)
def test_any_answer_to_any_request_ends_in_one_sentence(knock, door, step):
    requests = itertools.cycle(WHERE[door])  # tests/fuzz.py has all pairs
    for fault, request in itertools.islice(zip(FAULTS.values(), requests, strict=False), None, None, step):
        knock(door, Fault(request, times=-1, **fault))


@pytest.fixture
def stranger():
    """Another host: the same address, another port."""
    with HubServer() as server:
        yield server


@pytest.mark.parametrize("door", WHERE)
def test_no_login_goes_to_another_host(doors, knock, door, stranger):
    redirect = {"status": 302, "headers": {"Location": f"{stranger.url}/owner/name/resolve/main/config.json"}}
    for request in WHERE[door][:-1]:
        knock(door, Fault(request, times=-1, **redirect))
    if door != "classify":
        link = {"Link": f'<{stranger.url}/api/models/owner/name/tree/main>; rel="next"'}
        knock(door, Fault(".*/tree/.*", headers=link, times=1))
    assert stranger.requests
    assert not any(stranger.logins)
    assert f"Bearer {TOKEN}" in doors.hub.logins


@pytest.mark.parametrize("door", WHERE)
def test_redirects_that_never_end_are_given_up(doors, knock, door):
    here = f"{doors.hub.url}/owner/name/resolve/main/config.json"
    fault = Fault(f"{WHERE[door][-1]}|.*/owner/name/.*", status=302, headers={"Location": here}, times=-1)
    assert knock(door, fault)[1]


@pytest.mark.parametrize(
    ("door", "slow"),
    [("classify", ".*json"), ("verify", ".*insects.*/tree/.*"), ("publish", ".*tag.*")],
    ids=["classify", "verify", "publish"],
)
def test_silent_server_is_waited_for_only_so_long(doors, knock, door, slow, monkeypatch):
    monkeypatch.setattr(doors.tools["client"], "PATIENCE_S", 0.5)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    before = time.monotonic()
    assert knock(door, Fault(slow, delay=60, times=-1))[1]
    assert time.monotonic() - before < 60  # or it waited to the end


def test_failed_download_leaves_nothing_half_written(doors, knock, tmp_path):
    repo_id, status = knock("classify", Fault(".*safetensors", times=-1, break_off_at=5000))
    assert status == 2
    whole = make_files(doors.folder, repo_id)
    for path in tmp_path.rglob("snapshots/*/*"):
        assert path.read_bytes() == whole[path.name]
    assert cli.main(["classify", "--model", f"hf-hub:{repo_id}", str(SAMPLES / "cat.jpg")]) == 0


def test_client_that_tells_everything_tells_no_login(hub, run_child, tmp_path):
    hub.add("owner/insects", make_insects(tmp_path / "insects", "owner/insects"))
    hub.faults.append(Fault("GET .*safetensors", status=403, times=-1))
    code = """
import sys
from timm_tresnet.cli.main import main

sys.stderr = sys.stdout
for status in (2, 0):
    assert main(["classify", "--model", "hf-hub:owner/insects"]) == status
"""
    hub.faults[0].times = 1
    output = run_child(code, HF_TOKEN=TOKEN, HF_DEBUG="1", HF_HUB_VERBOSITY="debug")
    assert f"Bearer {TOKEN}" in hub.logins
    assert "cannot load the model" in output
    assert TOKEN not in output

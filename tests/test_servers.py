"""What classify, hub/verify.py and hub/publish.py make of a server that answers anything at all."""

import itertools
import re
import time

import pytest
from hub_server import Fault, HubServer
from publishing import TOKEN, make_insects

from timm_tresnet import cli
from timm_tresnet.conversion.card import PLACEHOLDER
from timm_tresnet.images import SAMPLES

# huggingface_hub 2.4 uploads LFS files with an argument that its transport, httpx2, deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")

HTML = b"<html><body>Sign in to the network of this hotel</body></html>"
STATUSES = (400, 401, 403, 404, 408, 409, 412, 416, 429, 500, 502, 503, 504, 302)
CODES = {401: "RepoNotFound", 403: "GatedRepo", 404: "EntryNotFound", 410: "RevisionNotFound"}
BODIES = {
    "nothing": b"",
    "html": HTML,
    "null": b"null",
    "list": b"[]",
    "numbers": b"[1]",
    "text": b'"text"',
    "half": b'{"id": ',
    "no_text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "no_siblings": b'{"id": "owner/name", "sha": "%s", "siblings": null}' % (b"0" * 40),
    "path_for_a_commit": b'{"id": "owner/name", "sha": "../../../../evil", "siblings": []}',
}
FAULTS = {
    **{str(status): {"status": status} for status in STATUSES},
    **{code: {"status": status, "code": code} for status, code in CODES.items()},
    **{name: {"status": 200, "body": body} for name, body in BODIES.items()},
    "refusal_in_html": {"status": 403, "body": HTML},
    "refusal_is_a_list": {"status": 400, "body": b"[1, 2]"},
    "cut_short": {"break_off_at": 10},
    "reset_before": {"drop": "before"},
    "reset_after": {"drop": "after"},
    "no_etag": {"headers": {"ETag": ""}},
    "wrong_etag": {"headers": {"ETag": f'"{"0" * 64}"'}},
    "etag_is_a_path": {"headers": {"ETag": '"../../../../evil"'}},
    "commit_is_a_path": {"headers": {"X-Repo-Commit": "../../../../evil"}},
    "wrong_size": {"headers": {"X-Linked-Size": "77", "X-Linked-ETag": '"abc"'}},
    "ends_early": {"headers": {"Content-Length": "5"}},
    "length_is_no_number": {"headers": {"Content-Length": "many"}},
    "wrong_encoding": {"headers": {"Content-Encoding": "gzip"}},
    "redirect_to_nowhere": {"status": 302, "headers": {"Location": "ftp://nowhere"}},
    "redirect_to_nonsense": {"status": 302, "headers": {"Location": "http://[nonsense"}},
}
WHERE = {  # requests of each door that a fault is tried on
    "classify": ("HEAD .*/config.json", "GET .*/config.json", ".*safetensors", ".*"),
    "verify": (
        "GET /api/models/owner/insects[0-9]*",
        *(f".*/insects.*{rest}" for rest in ("/tree/.*", "json", "safetensors", "")),
    ),
    "publish": (
        *("GET .*/api/models/[^/]*/[^/]*", ".*/tree/.*", ".*/refs", ".*/create", ".*/validate-yaml", ".*/preupload/.*"),
        *(".*/batch", "PUT .*", ".*/commit/.*", ".*/resolve/.*", ".*/tag/.*", ".*"),
    ),
}
ONE_SENTENCE = {
    "classify": r"timm-tresnet: cannot load the model [^\n]+\n",
    "verify": r"",
    "publish": r"publish: [^\n]+\n",
}


class Doors:
    """The three commands, each called with a repository that has a name of its own."""

    def __init__(self, hub, tools, folder, capsys):
        self.hub, self.tools, self.folder, self.capsys, self.number = hub, tools, folder, capsys, 0
        hub.commit("owner/sound", make_files(folder, "owner/sound"))

    def call(self, door, fault):
        """Exit status, stdout and stderr of a command whose repository has a fault."""
        self.number += 1
        repo_id = f"owner/insects{self.number}"
        if door == "publish":
            commands = (
                self.tools["publish"].main,
                [str(self.folder), "--repo", repo_id, "--push", "--revision-tag", "v1"],
            )
            if re.search("tree|refs", fault.request):
                self.hub.commit(repo_id, {"README.md": b"# insects\n"})
        else:
            self.hub.commit(repo_id, make_files(self.folder, repo_id))
        if door == "verify":
            commands = self.tools["verify"].main, ["--weights", repo_id, "owner/sound"]
        if door == "classify":
            commands = cli.main, ["classify", "--model", f"hf-hub:{repo_id}", str(SAMPLES / "cat.jpg")]
        self.hub.objects.clear()
        self.hub.faults[:] = [fault]
        self.capsys.readouterr()
        function, words = commands
        status = function(words)
        self.hub.faults.clear()
        captured = self.capsys.readouterr()
        return status, captured.out, captured.err, repo_id


def make_files(folder, repo_id):
    """What publishing makes of a folder."""
    return {
        path.name: path.read_bytes().replace(PLACEHOLDER.encode(), f"hf-hub:{repo_id}".encode())
        for path in folder.iterdir()
    }


@pytest.fixture(scope="module")
def insects(tmp_path_factory):
    return make_insects(tmp_path_factory.mktemp("servers") / "insects")


@pytest.fixture
def doors(hub, tools, monkeypatch, insects, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1)
    return Doors(hub, tools, insects, capsys)


def assert_in_order(door, status, out, err, repo_id):
    """All went well, or it ended in one sentence; whichever, no login is printed."""
    assert TOKEN not in out + err
    assert "Traceback" not in out + err
    if door == "verify":
        assert "owner/sound: nothing to report" in out.splitlines()
        assert status == int(f"{repo_id}: nothing to report" not in out.splitlines())
        assert all(line.startswith((repo_id, "owner/sound: ")) for line in out.splitlines())
        assert err == ""
    elif status == 0:
        assert err == ""
        assert "nan" not in out
    else:
        assert status == {"classify": 2, "publish": 1}[door]
        assert re.fullmatch(ONE_SENTENCE[door], err), err


@pytest.mark.parametrize("door", WHERE)
def test_any_answer_to_any_request_ends_in_one_sentence(doors, door):
    requests = itertools.cycle(WHERE[door])  # tests/fuzz.py has all pairs
    for fault, request in zip(FAULTS.values(), requests, strict=False):
        assert_in_order(door, *doors.call(door, Fault(request, times=-1, **fault)))


@pytest.fixture
def stranger():
    """Another host: the same address, another port."""
    with HubServer() as server:
        yield server


@pytest.mark.parametrize("door", WHERE)
def test_no_login_goes_to_another_host(doors, door, stranger):
    redirect = {"status": 302, "headers": {"Location": f"{stranger.url}/owner/name/resolve/main/config.json"}}
    for request in WHERE[door][:-1]:
        assert_in_order(door, *doors.call(door, Fault(request, times=-1, **redirect)))
    if door != "classify":
        link = {"Link": f'<{stranger.url}/api/models/owner/name/tree/main>; rel="next"'}
        assert_in_order(door, *doors.call(door, Fault(".*/tree/.*", headers=link, times=1)))
    assert stranger.requests
    assert not any(stranger.logins)
    assert f"Bearer {TOKEN}" in doors.hub.logins


@pytest.mark.parametrize("door", WHERE)
def test_redirects_that_never_end_are_given_up(doors, door):
    here = f"{doors.hub.url}/owner/name/resolve/main/config.json"
    fault = Fault(f"{WHERE[door][-1]}|.*/owner/name/.*", status=302, headers={"Location": here}, times=-1)
    status, *printed = doors.call(door, fault)
    assert_in_order(door, status, *printed)
    assert status


@pytest.mark.parametrize(
    ("door", "slow"),
    [("classify", ".*json"), ("verify", ".*insects.*/tree/.*"), ("publish", ".*tag.*")],
    ids=["classify", "verify", "publish"],
)
def test_silent_server_is_waited_for_only_so_long(doors, door, slow, monkeypatch):
    monkeypatch.setattr(doors.tools["client"], "PATIENCE_S", 0.5)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    before = time.monotonic()
    status, *printed = doors.call(door, Fault(slow, delay=60, times=-1))
    assert_in_order(door, status, *printed)
    assert status
    assert time.monotonic() - before < 60  # or it waited to the end


def test_failed_download_leaves_nothing_half_written(doors, tmp_path):
    *_, repo_id = doors.call("classify", Fault(".*safetensors", times=-1, break_off_at=5000))
    whole = make_files(doors.folder, repo_id)
    for path in tmp_path.rglob("snapshots/*/*"):
        assert path.read_bytes() == whole[path.name]
    assert cli.main(["classify", "--model", f"hf-hub:{repo_id}", str(SAMPLES / "cat.jpg")]) == 0


def test_client_that_tells_everything_tells_no_login(hub, run_child, tmp_path):
    hub.add("owner/insects", make_insects(tmp_path / "insects", "owner/insects"))
    hub.faults.append(Fault("GET .*safetensors", status=403, times=-1))
    code = """
import sys
from timm_tresnet.cli import main

sys.stderr = sys.stdout
for status in (2, 0):
    assert main(["classify", "--model", "hf-hub:owner/insects"]) == status
"""
    hub.faults[0].times = 1
    output = run_child(code, HF_TOKEN=TOKEN, HF_DEBUG="1", HF_HUB_VERBOSITY="debug")
    assert f"Bearer {TOKEN}" in hub.logins
    assert "cannot load the model" in output
    assert TOKEN not in output

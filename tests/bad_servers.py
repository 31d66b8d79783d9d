"""Wrong answers of a server, the commands that receive them, and checks of the outcome."""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from hub_server import Fault, HubServer
from publishing import TOKEN

from timm_tresnet.cli import main as cli
from timm_tresnet.conversion.card import PLACEHOLDER
from timm_tresnet.utils.images import SAMPLES

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


def make_files(folder: Path, repo_id: str) -> dict[str, bytes]:
    """What publishing makes of a folder."""
    return {
        path.name: path.read_bytes().replace(PLACEHOLDER.encode(), f"hf-hub:{repo_id}".encode())
        for path in folder.iterdir()
    }


class Doors:
    """The three commands, each called with a repository that has a name of its own."""

    def __init__(self, hub: HubServer, tools: dict[str, ModuleType], folder: Path) -> None:
        self.hub, self.tools, self.folder, self.number = hub, tools, folder, 0
        hub.commit("owner/sound", make_files(folder, "owner/sound"))

    def prepare(self, door: str, fault: Fault) -> tuple[str, Callable[[], int]]:
        """A repository, and what calls a command on it with a fault in the way and returns the exit status."""
        self.number += 1
        repo_id = f"owner/insects{self.number}"
        words: list[Any]
        if door == "publish":
            words = [str(self.folder), "--repo", repo_id, "--push", "--revision-tag", "v1"]
            if re.search("tree|refs", fault.request):
                self.hub.commit(repo_id, {"README.md": b"# insects\n"})
        else:
            self.hub.commit(repo_id, make_files(self.folder, repo_id))
            if door == "verify":
                words = ["--weights", repo_id, "owner/sound"]
            else:
                words = ["classify", "--model", f"hf-hub:{repo_id}", str(SAMPLES / "cat.jpg")]
        main = cli.main if door == "classify" else self.tools[door].main

        def call() -> int:
            self.hub.objects.clear()
            self.hub.faults[:] = [fault]
            try:
                return main(words)
            finally:
                self.hub.faults.clear()

        return repo_id, call


def find_disorder(door: str, repo_id: str, status: int, out: str, err: str) -> str:
    """Return the fault of a command's end; "" if it succeeded, or reported an error in one sentence."""
    if TOKEN in out + err:
        return "a login is printed"
    if "Traceback" in out + err:
        return "traceback"
    if door == "verify":
        lines = out.splitlines()
        sound = "owner/sound: nothing to report" in lines
        named = all(line.startswith((f"{repo_id}: ", "owner/sound: ")) for line in lines)
        fits = status == int(f"{repo_id}: nothing to report" not in lines)
        return "" if sound and named and fits and not err else f"status {status}, {lines}, {err!r}"
    if status == 0:
        return f"{err!r}" if err else "nan" if re.search(r"\bnan\b", out) else ""
    if door == "classify" and status == 1:  # weights of the right form and wrong numbers
        return "" if re.fullmatch(r"timm-tresnet: skipped [^\n]+\n", err) else f"status 1, {err!r}"
    sentence = {"classify": r"timm-tresnet: cannot load the model [^\n]+\n", "publish": r"publish: [^\n]+\n"}[door]
    fits = status == {"classify": 2, "publish": 1}[door]
    return "" if fits and re.fullmatch(sentence, err) else f"status {status}, {err!r}"

"""A stand-in for the Hugging Face Hub on loopback, for the real huggingface_hub client.

It answers what the client of huggingface_hub 2.4 asks when it loads a model, and, with HF_HUB_DISABLE_XET=1, when it
creates a repository, uploads to it and tags a revision. Faults can be ordered for the requests to come.
"""

import base64
import contextlib
import hashlib
import json
import re
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml


@dataclass
class Fault:
    """A fault of the next requests.

    Attributes:
        request: regular expression for all of "METHOD /path".
        status: answered instead of what was asked for.
        code: X-Error-Code of that answer.
        body: of that answer; None for the Hub's JSON.
        headers: of any answer, in place of those of the same name.
        change: makes the body of any answer into another.
        break_off_at: number of bytes of the body, sent or received, after which the connection breaks off; None for
            all of it.
        drop: "before" or "after" the request is carried out, the connection is reset without an answer.
        delay: seconds in which nothing comes, in the middle of the body.
        trickle: seconds between any two hundred bytes of the body.
        times: how many requests; -1 for all to come.
    """

    request: str
    status: int | None = None
    code: str = ""
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    change: Callable[[bytes], bytes] | None = None
    break_off_at: int | None = None
    drop: str = ""
    delay: float = 0
    trickle: float = 0
    times: int = 1


@dataclass
class Repository:
    revisions: dict[str, Path] = field(default_factory=dict)  # commit hash -> folder; the last one is main
    tags: dict[str, str] = field(default_factory=dict)  # name -> commit hash
    gated: bool = False


class HubServer:
    """Context manager that serves repositories; each revision is a folder.

    Attributes:
        url: what HF_ENDPOINT has to be.
        requests: (method, path, status) of every request, in order; a broken-off upload has no status and no entry.
        logins: the Authorization header of every request, "" where there is none.
        repositories: by "owner/name", Spaces by "spaces/owner/name".
        faults: of several for one request, the first counts; spent ones are dropped.
        objects: content of LFS files by SHA-256.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, int]] = []
        self.logins: list[str] = []
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.objects: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.closing = threading.Event()  # ends what is delayed
        self._uploads = tempfile.TemporaryDirectory()  # folders of the uploaded revisions
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, repo_id: str, folder: Path, gated: bool = False) -> str:
        """Commit the files of a folder to a repository, new or not, and return the commit's hash."""
        repository = self.repositories.setdefault(repo_id, Repository(gated=gated))
        commit = hashlib.sha1(f"{repo_id} {len(repository.revisions)}".encode()).hexdigest()
        repository.revisions[commit] = folder
        return commit

    def commit(self, repo_id: str, files: dict[str, bytes]) -> str:
        """Commit files on top of the newest revision, and return the commit's hash."""
        repository = self.repositories.setdefault(repo_id, Repository())
        folder = Path(tempfile.mkdtemp(dir=self._uploads.name))
        if repository.revisions:
            shutil.copytree(list(repository.revisions.values())[-1], folder, dirs_exist_ok=True)
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return self.add(repo_id, folder)

    def take_fault(self, request: str) -> Fault | None:
        """First fault for a request, "METHOD /path"; counts it as having happened."""
        with self.lock:
            for fault in self.faults:
                if re.fullmatch(fault.request, request):
                    fault.times -= 1
                    if fault.times == 0:
                        self.faults.remove(fault)
                    return fault
        return None

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._uploads.cleanup()


class _HubError(Exception):
    """An answer from whose X-Error-Code the client chooses its exception."""

    def __init__(self, status: int, code: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(code)
        self.status = status
        self.headers = {"X-Error-Code": code, **(headers or {})} if code else {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every body waits 40 ms for the client to acknowledge the headers

    def __init__(self, hub: HubServer, *args: object) -> None:
        self.hub = hub
        super().__init__(*args)  # answers the connection's requests

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.logins.append(self.headers.get("Authorization", ""))
        self.fault = self.hub.take_fault(f"{self.command} {path}") or Fault("")
        try:
            body = self._receive()
            if self.fault.drop == "before":
                self._reset()
            if self.close_connection:
                return
            if self.fault.status and self.fault.body is not None:
                self._send(self.fault.status, self.fault.body, {"X-Error-Code": self.fault.code})
                return
            if self.fault.status:
                raise _HubError(self.fault.status, self.fault.code)
            for method, pattern, answer in self._ROUTES:
                if self.command in method and (match := pattern.fullmatch(path)):
                    arguments = match.groupdict()
                    if arguments.pop("kind", "models") == "spaces":
                        arguments["repo_id"] = f"spaces/{arguments['repo_id']}"
                    if self.command in ("POST", "PUT"):
                        arguments["body"] = body
                    answer(self, **arguments)
                    return
            raise _HubError(404)
        except _HubError as error:
            self._send(error.status, json.dumps({"error": str(error)}).encode(), error.headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def _receive(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        size = int(self.headers.get("Content-Length", 0))
        if size and self.fault.break_off_at is not None:
            self.close_connection = True
            size = min(size, self.fault.break_off_at)
        return self.rfile.read(size)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST, not FIN
        self.close_connection = True

    # ---- download

    def _send_file(self, repo_id: str, revision: str, path: str) -> None:
        repository = self._find_repository(repo_id)
        if repository.gated:
            raise _HubError(403, "GatedRepo")
        commit = self._find_commit(repository, revision)
        headers = {"X-Repo-Commit": commit}
        if path not in _list_files(repository.revisions[commit]):
            raise _HubError(404, "EntryNotFound", headers)
        body = (repository.revisions[commit] / path).read_bytes()
        headers |= {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part:
            start, end = int(part[1]), min(int(part[2] or len(body)) + 1, len(body))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
            self._send(206, body[start:end], headers)
        else:
            self._send(200, body, headers)

    def _send_info(self, repo_id: str, revision: str | None) -> None:
        repository = self._find_repository(repo_id)
        commit = self._find_commit(repository, revision or "main")
        siblings = [{"rfilename": path} for path in _list_files(repository.revisions[commit])]
        self._send_json(
            {"id": repo_id.removeprefix("spaces/"), "sha": commit, "siblings": siblings, "gated": repository.gated}
        )

    def _send_tree(self, repo_id: str, revision: str) -> None:
        repository = self._find_repository(repo_id)
        folder = repository.revisions[self._find_commit(repository, revision)]
        self._send_json([_describe_file(path, (folder / path).read_bytes()) for path in _list_files(folder)])

    def _send_refs(self, repo_id: str) -> None:
        repository = self._find_repository(repo_id)
        branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": self._find_commit(repository, "main")}]
        tags = [
            {"name": name, "ref": f"refs/tags/{name}", "targetCommit": commit}
            for name, commit in repository.tags.items()
        ]
        self._send_json({"branches": branches, "converts": [], "tags": tags})

    # ---- upload

    def _create_repository(self, body: bytes) -> None:
        self._need_token()
        request = json.loads(body)
        repo_id = f"{request['organization']}/{request['name']}"
        if request.get("type") == "space":
            if request.get("sdk") not in ("gradio", "docker", "static"):
                raise _HubError(400)
            repo_id = f"spaces/{repo_id}"
        if repo_id in self.hub.repositories:
            self._send_json({"error": "You already created this repo", "url": f"{self.hub.url}/{repo_id}"}, 409)
            return
        self.hub.commit(repo_id, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self._send_json({"url": f"{self.hub.url}/{repo_id}"})

    def _validate_card(self, body: bytes) -> None:
        card = json.loads(body)["content"]
        try:
            yaml.safe_load(card.split("---\n")[1])
        except (IndexError, yaml.YAMLError) as error:
            self._send_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        else:
            self._send_json({"errors": [], "warnings": []})

    def _choose_upload_modes(self, repo_id: str, revision: str, body: bytes) -> None:
        self._need_token()
        repository = self._find_repository(repo_id)
        folder = repository.revisions[self._find_commit(repository, revision)]
        held = {path: _describe_file(path, (folder / path).read_bytes()) for path in _list_files(folder)}
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _is_lfs(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": _get_oid(held[file["path"]]) if file["path"] in held else None,
            }
            for file in json.loads(body)["files"]
        ]
        self._send_json({"files": files})

    def _offer_uploads(self, repo_id: str, body: bytes) -> None:
        self._need_token()
        self._find_repository(repo_id)
        objects = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs-objects/{entry['oid']}"}}
        self._send_json({"objects": objects, "transfer": "basic"})

    def _store_object(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _HubError(400)
        self.hub.objects[oid] = body
        self._send(200, b"", {})

    def _commit(self, repo_id: str, revision: str, body: bytes) -> None:
        self._need_token()
        repository = self._find_repository(repo_id)
        files = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value.get("parentCommit") not in (None, list(repository.revisions)[-1]):
                raise _HubError(412)
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _HubError(400)
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = self.hub.commit(repo_id, files)
        self._send_json({"commitOid": commit, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit}"})

    def _tag(self, repo_id: str, revision: str, body: bytes) -> None:
        self._need_token()
        repository = self._find_repository(repo_id)
        name = json.loads(body)["tag"]
        if name in repository.tags:
            raise _HubError(409)
        repository.tags[name] = self._find_commit(repository, revision)
        self._send_json({})

    _REPO_ID, _REVISION = r"(?P<repo_id>(?:spaces/)?[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
    _API = r"/api/(?P<kind>models|spaces)/(?P<repo_id>[^/]+/[^/]+)"
    _ROUTES = (
        (("GET", "HEAD"), re.compile(rf"/{_REPO_ID}/resolve/{_REVISION}/(?P<path>.+)"), _send_file),
        (("GET", "HEAD"), re.compile(rf"{_API}(?:/revision/{_REVISION})?"), _send_info),
        (("GET",), re.compile(rf"{_API}/tree/{_REVISION}"), _send_tree),
        (("GET",), re.compile(rf"{_API}/refs"), _send_refs),
        (("POST",), re.compile(r"/api/repos/create"), _create_repository),
        (("POST",), re.compile(r"/api/validate-yaml"), _validate_card),
        (("POST",), re.compile(rf"{_API}/preupload/{_REVISION}"), _choose_upload_modes),
        (("POST",), re.compile(rf"/{_REPO_ID}\.git/info/lfs/objects/batch"), _offer_uploads),
        (("PUT",), re.compile(r"/lfs-objects/(?P<oid>[0-9a-f]{64})"), _store_object),
        (("POST",), re.compile(rf"{_API}/commit/{_REVISION}"), _commit),
        (("POST",), re.compile(rf"{_API}/tag/{_REVISION}"), _tag),
    )

    def _need_token(self) -> None:
        if not self.headers.get("Authorization"):
            raise _HubError(401)

    def _find_repository(self, repo_id: str) -> Repository:
        if repo_id not in self.hub.repositories:
            raise _HubError(401, "RepoNotFound")  # not 404: the Hub does not tell a missing one from a private one
        return self.hub.repositories[repo_id]

    def _find_commit(self, repository: Repository, revision: str) -> str:
        commit = list(repository.revisions)[-1] if revision == "main" else repository.tags.get(revision, revision)
        if commit not in repository.revisions:
            raise _HubError(404, "RevisionNotFound")
        return commit

    def _send_json(self, answer: Any, status: int = 200) -> None:
        self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self.fault.drop == "after":
            self._reset()
            return
        if self.fault.change:
            body = self.fault.change(body)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body)), **self.fault.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault.break_off_at is not None:
            body = body[: self.fault.break_off_at]
            self.close_connection = True
        if self.fault.delay:
            self.wfile.write(body[: len(body) // 2])
            self.hub.closing.wait(self.fault.delay)
            body = body[len(body) // 2 :]
        while self.fault.trickle and body and not self.hub.closing.wait(self.fault.trickle):
            self.wfile.write(body[:100])
            body = body[100:]
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        self.hub.requests.append((self.command, self.path, int(code)))

    def handle(self) -> None:
        """Answer the requests of a connection; a client may have gone before the end."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_error(self, *args: object) -> None:
        """Write nothing to stderr; `requests` has the status."""


def _list_files(folder: Path) -> Iterable[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def _describe_file(path: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    description: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if _is_lfs(path):
        description["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return description


def _get_oid(description: dict[str, Any]) -> str:
    return description.get("lfs", description)["oid"]

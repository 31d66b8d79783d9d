"""A read-only stand-in for the Hugging Face Hub on loopback, for the real huggingface_hub client.

It answers what the client of huggingface_hub 2.4 asks when it loads a model: files and the description of a repository.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


@dataclass
class Repository:
    revisions: dict[str, Path] = field(default_factory=dict)  # commit hash -> folder; the last one is main
    gated: bool = False


class HubServer:
    """Serves repositories, whose every revision is a folder, while used as a context manager.

    Attributes:
        url: what HF_ENDPOINT has to be.
        requests: (method, path, status) of every request, in order.
        repositories: by "owner/name".
        break_off_at: number of bytes after which the next download of a file breaks off; None for never.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, int]] = []
        self.repositories: dict[str, Repository] = {}
        self.break_off_at: int | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, repo_id: str, folder: Path, gated: bool = False) -> str:
        """Commit the files of a folder to a repository, new or not, and return the commit's hash."""
        repository = self.repositories.setdefault(repo_id, Repository(gated=gated))
        commit = hashlib.sha1(f"{repo_id} {len(repository.revisions)}".encode()).hexdigest()
        repository.revisions[commit] = folder
        return commit

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _HubError(Exception):
    """An answer from whose X-Error-Code the client chooses its exception."""

    def __init__(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(code)
        self.status = status
        self.headers = {"X-Error-Code": code, **(headers or {})}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: HubServer, *args: object) -> None:
        self.hub = hub
        super().__init__(*args)  # answers the connection's requests

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        for pattern, answer in self._ROUTES:
            if match := pattern.fullmatch(path):
                try:
                    answer(self, **match.groupdict())
                except _HubError as error:
                    self._send(error.status, str(error).encode(), error.headers)
                return
        self.send_error(404)

    do_HEAD = do_GET

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
        rest = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))  # the client resumes, it wants no middle
        if rest:
            start, size = int(rest[1]), len(body)
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            self._send(206, body[start:], headers)
        else:
            self._send(200, body, headers)

    def _send_info(self, repo_id: str, revision: str | None) -> None:
        repository = self._find_repository(repo_id)
        commit = self._find_commit(repository, revision or "main")
        siblings = [{"rfilename": path} for path in _list_files(repository.revisions[commit])]
        body = json.dumps({"id": repo_id, "sha": commit, "siblings": siblings})
        self._send(200, body.encode(), {"Content-Type": "application/json"})

    _ROUTES = (
        (re.compile(r"/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"), _send_file),
        (re.compile(r"/api/models/(?P<repo_id>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?"), _send_info),
    )

    def _find_repository(self, repo_id: str) -> Repository:
        if repo_id not in self.hub.repositories:
            raise _HubError(401, "RepoNotFound")  # not 404: the Hub does not tell a missing one from a private one
        return self.hub.repositories[repo_id]

    def _find_commit(self, repository: Repository, revision: str) -> str:
        commit = list(repository.revisions)[-1] if revision == "main" else revision
        if commit not in repository.revisions:
            raise _HubError(404, "RevisionNotFound")
        return commit

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.break_off_at is not None:
            body, self.hub.break_off_at = body[: self.hub.break_off_at], None
            self.close_connection = True
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        self.hub.requests.append((self.command, self.path, int(code)))

    def log_error(self, *args: object) -> None:
        """Write nothing to stderr; `requests` has the status."""


def _list_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

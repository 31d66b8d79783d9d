"""Middleware that allows only the requests that the demo's page needs; Gradio alone answers many others."""

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

_API = "/gradio_api"
_ROUTES = {  # routes that the page needs; Gradio's other routes fetch URLs, call functions or query the Hub
    "GET": rf"/|/config/?|/(theme\.css|manifest\.json|robots\.txt|favicon\.ico)|/(assets|static|svelte)/[^?]*|"
    rf"/pwa_icon(/\d+)?|{_API}/(theme\.css|startup-events|app_id|login_check/?|info/?|queue/(data|status)|"
    rf"upload_progress|heartbeat/[\w-]+)|{_API}/file=/.*",
    "POST": rf"{_API}/(queue/join|upload|cancel|reset/?)",
}
_ROUTES["HEAD"] = _ROUTES["GET"]
_UPLOAD = f"{_API}/upload"
_LARGEST_JSON = 2**16  # bytes
_PATIENCE_S = 120  # until the whole body of a request has arrived
_MOST_KEPT = 2**30  # bytes of uploaded files; beyond it, the oldest are removed

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class RequestFilter:
    """ASGI middleware that passes on the requests of the demo's page and refuses all others.

    Files must be uploaded: a payload with a URL, which Gradio would fetch, is refused. A request's body is bounded in
    size and in time; uploaded files are bounded in total size.

    Args:
        app: Gradio's ASGI app.
        largest: largest upload, in bytes.
        uploaded: returns the set of uploaded files.
        patience_s: time for a request's body to arrive, in seconds.
        most_kept: largest total size of uploaded files, in bytes.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        largest: int,
        uploaded: Callable[[], set[str]],
        patience_s: float = _PATIENCE_S,
        most_kept: int = _MOST_KEPT,
    ) -> None:
        self._app = app
        self._largest = largest
        self._uploaded = uploaded
        self._patience_s = patience_s
        self._most_kept = most_kept

    async def __call__(self, scope: MutableMapping[str, Any], receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # the page uses no web sockets
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if not re.fullmatch(_ROUTES.get(scope["method"], "(?!)"), path):
            return await _answer(send, 404, "There is no such page.")
        body = _Body(receive, self._largest if path == _UPLOAD else _LARGEST_JSON, self._patience_s)
        try:
            if scope["method"] == "POST" and path != _UPLOAD:
                checked = _check_event(await body.read())
                scope["headers"] = _with_length(scope["headers"], len(checked))
                await self._app(scope, _replay(checked, receive), send)
            else:
                await self._app(scope, body.receive, send)
        except _RefusedError as refusal:
            return await _answer(send, refusal.status, str(refusal))
        if path == _UPLOAD:
            await asyncio.to_thread(self._remove_oldest)
        return None

    def _remove_oldest(self) -> None:
        kept = {}
        for name in list(self._uploaded()):
            try:
                kept[name] = Path(name).stat()
            except OSError:
                self._uploaded().discard(name)
        total = sum(each.st_size for each in kept.values())
        for name in sorted(kept, key=lambda each: kept[each].st_mtime_ns):
            if total <= self._most_kept:
                break
            Path(name).unlink(missing_ok=True)
            self._uploaded().discard(name)
            total -= kept[name].st_size


class _RefusedError(Exception):
    """A request is refused; status and message are the response."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Body:
    """A request's body, bounded in size and time."""

    def __init__(self, receive: _Receive, largest: int, patience_s: float) -> None:
        self._receive = receive
        self._left = largest
        self._largest = largest
        self._end = asyncio.get_running_loop().time() + patience_s
        self._complete = False

    async def receive(self) -> _Message:
        """Receive the next ASGI message."""
        if self._complete:  # the next message is the disconnect, which may come at any time
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._end):
                message = await self._receive()
        except TimeoutError as error:
            raise _RefusedError(408, "The request took too long to arrive.") from error
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise _RefusedError(413, f"The request needs to have at most {self._largest} bytes.")
        self._complete = not message.get("more_body")
        return message

    async def read(self) -> bytes:
        """Receive the whole body."""
        parts = []
        while not self._complete:
            parts.append((await self.receive()).get("body", b""))
        return b"".join(parts)


def _check_event(body: bytes) -> bytes:
    """Check an event's JSON and return it re-encoded, so that Gradio reads exactly what was checked."""
    if not body:
        return body
    try:
        event = json.loads(body, parse_constant=_refuse_constant)
        for path in _find_addresses(event):
            if not (isinstance(path, str) and os.path.isabs(path)) or path.startswith(("//", "\\\\")):
                raise _RefusedError(400, "The demo needs uploaded files and fetches no URLs.")
        return json.dumps(event).encode()
    except (ValueError, RecursionError) as error:
        raise _RefusedError(400, "The request needs to be JSON.") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _find_addresses(value: Any) -> Iterator[Any]:
    """Yield the paths of files in a payload, and remove their URLs from it."""
    if isinstance(value, dict):
        if "path" in value:
            yield value["path"]
        value.pop("url", None)
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _find_addresses(each)


def _with_length(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    others = [(name, value) for name, value in headers if name.lower() not in (b"content-length", b"transfer-encoding")]
    return [*others, (b"content-length", str(length).encode())]


def _replay(body: bytes, receive: _Receive) -> _Receive:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> _Message:
        return messages.pop() if messages else await receive()

    return replay


async def _answer(send: _Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})

"""The demo's request filter alone, called as by an ASGI server."""

import asyncio
import json

import pytest

from timm_tresnet.demo.request_filter import RequestFilter

JOIN, UPLOAD = "/gradio_api/queue/join", "/gradio_api/upload"


def ask(method, path, *parts, wait=0.0, uploaded=frozenset(), root="", **options):
    """Return the status of a request's response, and the body that the application has read."""
    read, sent = [], []

    async def app(scope, receive, send):
        message = {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            read.append(message.get("body", b""))
        read.append(dict(scope["headers"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def run():
        messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        messages.append({"type": "http.request", "body": b"", "more_body": False})

        async def receive():
            await asyncio.sleep(wait)
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        headers = [(b"content-length", b"7"), (b"host", b"x")]
        scope = {"type": "http", "method": method, "path": root + path, "root_path": root, "headers": headers}
        door = RequestFilter(app, **{"largest": 1000, "uploaded": lambda: uploaded, **options})
        await asyncio.wait_for(door(scope, receive, send), 60)

    asyncio.run(run())
    return sent[0]["status"], read


CLOSED = [
    ("GET", "/gradio_api/run-history/buckets"),
    ("GET", "/gradio_api/run-history/records"),
    ("POST", "/gradio_api/run-history/connect"),
    ("GET", "/gradio_api/runs"),
    ("GET", "/gradio_api/proxy=http://example.com"),
    ("GET", "/gradio_api/file=http://example.com/a"),
    ("GET", "/gradio_api/file=HTTP://example.com/a"),
    ("GET", "/gradio_api/deep_link"),
    ("GET", "/gradio_api/openapi.json"),
    ("GET", "/gradio_api/token"),
    ("GET", "/monitoring"),
    ("GET", "/docs"),
    ("POST", "/gradio_api/component_server"),
    ("POST", "/gradio_api/process_recording"),
    ("POST", "/gradio_api/run/predict"),
    ("POST", "/gradio_api/api/predict"),
    ("POST", "/gradio_api/call/predict"),
    ("POST", "/gradio_api/call/v2/predict"),
    ("POST", "/gradio_api/stream/1"),
    ("POST", "/gradio_api/vibe-edit"),
    ("POST", "/login"),
    ("PUT", "/"),
    ("DELETE", JOIN),
    ("OPTIONS", JOIN),
    ("GET", JOIN + "\n"),
    ("GET", "//example.com"),
]


@pytest.mark.parametrize(("method", "path"), CLOSED, ids=map(" ".join, CLOSED))
def test_whatever_the_page_does_not_need_is_not_there(method, path):
    assert ask(method, path) == (404, [])


@pytest.mark.parametrize("root", ["", "/behind/a/proxy"])
@pytest.mark.parametrize(
    "path", ["/", "/config", "/theme.css", "/assets/a-b.js", "/gradio_api/file=/tmp/a b.jpg", "/gradio_api/queue/data"]
)
def test_requests_of_the_page_are_answered(path, root):
    for method in ("GET", "HEAD"):
        assert ask(method, path, root=root)[0] == 200


def file(path, **more):
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


ADDRESSES = [
    "http://x/a.jpg",
    "HTTPS://x/a.jpg",
    " http://x",
    "//x/a",
    "file:///etc/passwd",
    "data:,x",
    "",
    None,
    3,
    ["/a"],
]


@pytest.mark.parametrize("wrap", [lambda each: each, lambda each: [[each]], lambda each: {"a": {"b": each}}])
@pytest.mark.parametrize("path", ADDRESSES, ids=repr)
def test_payload_that_names_an_address_is_refused(path, wrap):
    body = json.dumps({"data": [wrap(file(path)), "a", "b"], "fn_index": 1}).encode()
    assert ask("POST", JOIN, body) == (400, [])


def test_payload_of_an_uploaded_file_passes_without_its_address():
    event = {"data": [file("/tmp/gradio/a.jpg", url="http://x/a.jpg", size=3)], "fn_index": 1, "session_hash": "é"}
    status, (*parts, headers) = ask("POST", JOIN, *(bytes([each]) for each in json.dumps(event).encode()))
    assert status == 200
    del event["data"][0]["url"]
    body = b"".join(parts)
    assert json.loads(body) == event
    assert headers == {b"content-length": str(len(body)).encode(), b"host": b"x"}


ODD = {
    "no_json": b"{",
    "no_text": b"\xff\xfe",
    "constant": b'{"data": [NaN]}',
    "deep": b"[" * 50_000,
    "two_of_one_name": b'{"path": "/a", "path": "http://x"}',
}


@pytest.mark.parametrize("body", ODD.values(), ids=ODD)
def test_odd_payload_is_refused(body):
    assert ask("POST", JOIN, body) == (400, [])


@pytest.mark.parametrize(("path", "largest"), [(JOIN, 2**16), (UPLOAD, 1000), ("/gradio_api/cancel", 2**16)])
def test_large_body_is_refused_whatever_it_claims(path, largest):
    status, read = ask("POST", path, *[b" " * 500] * (largest // 500 + 1))
    assert status == 413
    assert sum(map(len, read)) <= largest


@pytest.mark.parametrize("path", [JOIN, UPLOAD])
def test_body_that_trickles_has_a_deadline(path):
    assert ask("POST", path, *[b"["] * 900, wait=0.01, patience_s=0.1)[0] == 408
    assert ask("POST", path, b"{}", patience_s=30)[0] == 200


def test_oldest_uploads_are_removed_when_there_are_too_many(tmp_path):
    import os

    names = [str(tmp_path / f"{number}.jpg") for number in range(5)]
    for number, name in enumerate(names):
        with open(name, "wb") as content:
            content.write(bytes(100))
        os.utime(name, (number, number))
    uploaded = {*names, str(tmp_path / "gone.jpg")}
    assert ask("POST", UPLOAD, b"x", uploaded=uploaded, most_kept=250)[0] == 200
    assert uploaded == {*names[3:]}
    assert sorted(map(str, tmp_path.iterdir())) == names[3:]

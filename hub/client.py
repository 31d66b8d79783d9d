"""The tools' client of the Hub: bounded waits, a protected login, and explanations of failures."""

import re
import time
from collections.abc import Iterator
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import HTTPError as ClientError  # base class of its transport's errors

from timm_tresnet.utils.errors import summarise

PATIENCE_S = 60  # longest wait for a byte, or on the Hub's request; the client alone would wait for ever
LEAST_RATE = 10_000  # bytes a second, for answers that take longer than PATIENCE_S


class WaitError(OSError):
    """A wait would be too long; the message says what for."""


def connect() -> HfApi:
    """Return a client of the Hub whose waits are bounded and whose login goes to no other host.

    It transfers files by HTTP only. The default, Xet, is a program of its own (hf_xet) that ignores these bounds: with
    a server that lacks Xet's routes, it did not give up within three minutes.
    """
    constants.HF_HUB_DISABLE_XET = True
    huggingface_hub.close_session()
    session = huggingface_hub.get_session()
    hooks = {name: list(session.event_hooks.get(name, ())) for name in ("request", "response")}
    session.event_hooks = {"request": [*hooks["request"], _restrain], "response": [*hooks["response"], _bound]}
    return HfApi()


def _bound(response: Any) -> None:
    """Refuse a wait that is too long, and abort an answer that arrives too slowly."""
    if response.status_code == 429 or response.status_code >= 500:  # the client obeys these headers, whatever they say
        asked = (response.headers.get("Retry-After", ""), response.headers.get("ratelimit", "").partition("t=")[2])
        waits = (re.match(r"\s*([0-9]{1,99})\s*(;|$)", each) for each in asked)
        wait = max((int(match[1]) for match in waits if match), default=0)
        if wait > PATIENCE_S:
            raise WaitError(f"the Hub asks to wait for {wait} seconds")
    base = next(each for each in type(response.stream).__mro__ if each.__name__ == "SyncByteStream")

    class Timed(base):  # httpx, or the client's transport of another name, accepts only its own class
        def __iter__(self) -> Iterator[bytes]:
            start, received = time.monotonic(), 0
            for chunk in stream:
                yield chunk
                received += len(chunk)
                if time.monotonic() - start > PATIENCE_S + received / LEAST_RATE:
                    raise WaitError(f"{received} bytes came in {time.monotonic() - start:.0f} seconds")

        def close(self) -> None:
            stream.close()

    stream, response.stream = response.stream, Timed()


def _restrain(request: Any) -> None:
    """Bound a request's waits, and remove the login from requests that are redirected to another host."""
    waits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        name: PATIENCE_S if waits.get(name) is None else waits[name] for name in ("connect", "read", "write", "pool")
    }
    home = type(request.url)(constants.ENDPOINT)
    if (request.url.scheme, request.url.host, request.url.port) != (home.scheme, home.host, home.port):
        request.headers.pop("Authorization", None)


def find_commit(api: HfApi, repo_id: str, revision: str | None = None, repo_type: str = "model") -> str:
    """Return the commit of a branch or tag, by default the newest; checked, since it becomes part of a path."""
    commit = api.repo_info(repo_id, revision=revision, repo_type=repo_type).sha
    if not re.fullmatch("[0-9a-f]{40}", str(commit)):
        raise TypeError(f"{str(commit)[:99]!r} is not the hash of a commit")
    return str(commit)


def explain(error: Exception, repo_id: str) -> str:
    """Explain a failure of the Hub or of its client, and say what to do.

    Args:
        error: the client's error.
        repo_id: the requested repository.

    Returns:
        One sentence, followed by the client's message.
    """
    if isinstance(error, RuntimeError) and error.__cause__:  # the client wraps errors of an upload
        error = error.__cause__
    said = summarise(error).removeprefix(type(error).__name__).removeprefix(": ")
    return f"{_interpret(error, repo_id)} ({type(error).__name__}: {said or 'no message'})"


def _interpret(error: BaseException, repo_id: str) -> str:
    login = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: accept its conditions on its page, then {login}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} does not exist, or is private: check its name, or {login}"
    if isinstance(error, LocalEntryNotFoundError):
        return "the Hub cannot be reached: check the network and HF_ENDPOINT, then run this again"
    if isinstance(error, RevisionNotFoundError | EntryNotFoundError):
        return f"{repo_id} does not have the requested file or revision"
    if isinstance(error, WaitError):
        return f"the Hub is too slow or asks for a long wait for {repo_id}: run this again later"
    if isinstance(error, HfHubHTTPError):
        return _interpret_status(error.response.status_code, repo_id, login)
    if isinstance(error, ClientError | OSError):
        return f"the request to the Hub about {repo_id} failed: check the network and HF_ENDPOINT, then run this again"
    return (
        f"the Hub's client does not understand the answer about {repo_id}: check HF_ENDPOINT and whether a proxy "
        "answers in place of the Hub, then run this again"
    )


def _interpret_status(status: int, repo_id: str, login: str) -> str:
    meanings = {
        401: f"the Hub does not accept your login: {login}",
        403: f"your token does not allow this for {repo_id}: use one with write access to publish",
        409: f"{repo_id} was changed by someone else meanwhile: run this again and look at the new plan",
        412: f"{repo_id} was changed by someone else meanwhile: run this again and look at the new plan",
        408: "the Hub waited too long for the request: check the network, then run this again",
        429: "the Hub asks for fewer requests: run this again in some minutes",
    }
    if status >= 500:
        return "the Hub failed: run this again later; uploaded files are not sent again"
    return meanings.get(status, f"the Hub refuses the request about {repo_id}: check HF_ENDPOINT and the name")

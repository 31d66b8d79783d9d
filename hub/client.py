"""The client of the Hub as these tools use it, and what its failures mean."""

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
from huggingface_hub.errors import HTTPError as ClientError  # base of what its transport raises, whichever that is

from timm_tresnet.utils.errors import summarise

PATIENCE_S = 60  # without a byte, or as the Hub asks for it; the client by itself waits for ever
LEAST_RATE = 10_000  # bytes a second of an answer that takes longer than that


class WaitError(OSError):
    """Says what would have to be waited for too long."""


def connect() -> HfApi:
    """A client of the Hub that waits only so long, whatever the server does, and hands its login to no other host.

    It transfers files by HTTP alone. The default, Xet, is a program of its own (hf_xet), which none of these bounds
    reaches: of a server without Xet's routes it did not let go within three minutes.
    """
    constants.HF_HUB_DISABLE_XET = True
    huggingface_hub.close_session()
    session = huggingface_hub.get_session()
    hooks = {name: list(session.event_hooks.get(name, ())) for name in ("request", "response")}
    session.event_hooks = {"request": [*hooks["request"], _restrain], "response": [*hooks["response"], _bound]}
    return HfApi()


def _bound(response: Any) -> None:
    """Refuse a wait that is too long, and give up an answer that only trickles."""
    if response.status_code == 429 or response.status_code >= 500:  # the client obeys these headers, whatever they say
        asked = (response.headers.get("Retry-After", ""), response.headers.get("ratelimit", "").partition("t=")[2])
        waits = (re.match(r"\s*([0-9]{1,99})\s*(;|$)", each) for each in asked)
        wait = max((int(match[1]) for match in waits if match), default=0)
        if wait > PATIENCE_S:
            raise WaitError(f"the Hub asks to wait for {wait} seconds")
    base = next(each for each in type(response.stream).__mro__ if each.__name__ == "SyncByteStream")

    class Timed(base):  # httpx, or what the client's transport is called in its version, takes no other
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
    """Bound the waits of a request that has no bounds, and keep the login at home wherever an answer sends us."""
    waits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        name: PATIENCE_S if waits.get(name) is None else waits[name] for name in ("connect", "read", "write", "pool")
    }
    home = type(request.url)(constants.ENDPOINT)
    if (request.url.scheme, request.url.host, request.url.port) != (home.scheme, home.host, home.port):
        request.headers.pop("Authorization", None)


def find_commit(api: HfApi, repo_id: str, revision: str | None = None, repo_type: str = "model") -> str:
    """The hash of a branch, a tag or, by default, the newest commit; it is about to become part of a path."""
    commit = api.repo_info(repo_id, revision=revision, repo_type=repo_type).sha
    if not re.fullmatch("[0-9a-f]{40}", str(commit)):
        raise TypeError(f"{str(commit)[:99]!r} is no hash of a commit")
    return str(commit)


def explain(error: Exception, repo_id: str) -> str:
    """Say what a failure of the Hub or of its client means, and what to do.

    Args:
        error: what the client raised.
        repo_id: repository that was asked for.

    Returns:
        One sentence, and what the client says behind it.
    """
    if isinstance(error, RuntimeError) and error.__cause__:  # the client wraps what stops an upload
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
        return f"{repo_id} does not have the file or revision that was asked for"
    if isinstance(error, WaitError):
        return f"the Hub is too slow or asks for patience, so {repo_id} was not waited for: run this again later"
    if isinstance(error, HfHubHTTPError):
        return _interpret_status(error.response.status_code, repo_id, login)
    if isinstance(error, ClientError | OSError):
        return f"asking the Hub about {repo_id} failed: check the network and HF_ENDPOINT, then run this again"
    return (
        f"the Hub's answer about {repo_id} is not one that its client understands: check HF_ENDPOINT and whether a "
        "proxy answers in the Hub's place, then run this again"
    )


def _interpret_status(status: int, repo_id: str, login: str) -> str:
    meanings = {
        401: f"the Hub does not accept your login: {login}",
        403: f"your token may not do this with {repo_id}: take one with write access to publish",
        409: f"{repo_id} was changed by someone else meanwhile: run this again and look at the new plan",
        412: f"{repo_id} was changed by someone else meanwhile: run this again and look at the new plan",
        408: "the Hub waited too long for the request: check the network, then run this again",
        429: "the Hub asks for fewer requests: run this again in some minutes",
    }
    if status >= 500:
        return "the Hub failed: run this again later, what is uploaded is not sent again"
    return meanings.get(status, f"the Hub refuses what was asked about {repo_id}: check HF_ENDPOINT and the name")

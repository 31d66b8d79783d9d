"""Check that the Hugging Face Hub is reachable; its client would retry for 23 seconds a file."""

import functools
import socket
import threading
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

_PATIENCE_S = 5.0  # in total, for the name lookup and the connection


def require_hub(
    repo_id: str, *filenames: str, revision: str | None = None, cache_dir: str | Path | None = None
) -> None:
    """Raise an error if a file is not in the cache and the Hub's server cannot be reached.

    A connection is opened, but no request is sent. With a proxy or in offline mode, nothing is checked.

    Args:
        repo_id: repository, OWNER/NAME.
        *filenames: files of the repository; one of them in the cache is enough.
        revision: a branch, tag or commit; None for the main branch.
        cache_dir: the client's cache folder; None for its default.

    Raises:
        LocalEntryNotFoundError: if the server cannot be reached; the message says why.
    """
    find = functools.partial(
        huggingface_hub.try_to_load_from_cache, repo_id, cache_dir=cache_dir, revision=revision or "main"
    )
    address = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or not address.hostname or any(isinstance(find(name), str) for name in filenames):
        return
    if address.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(address.hostname):
        return
    reason = _find_obstacle(address.hostname, address.port or (80 if address.scheme == "http" else 443))
    if reason:
        raise LocalEntryNotFoundError(
            f"{filenames[0]} of {repo_id} is not in the cache, and {address.hostname} cannot be reached ({reason}); "
            "connect to the network, set HF_ENDPOINT to a mirror, or use a folder, local-dir:FOLDER"
        )


def _find_obstacle(host: str, port: int) -> str | None:
    """Return why a connection to a server fails; None if it succeeds."""
    found: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=_PATIENCE_S).close()
            found.append(None)
        except OSError as error:  # includes unknown names
            found.append(error.strerror or str(error))

    # In a thread, since a name lookup has no timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)
    return found[0] if found else f"no answer in {_PATIENCE_S:.0f} s"

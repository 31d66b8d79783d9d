"""Whether the Hugging Face Hub can be reached, before its client tries for 23 seconds a file."""

import functools
import socket
import threading
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

_PATIENCE_S = 5.0  # in all, to find the server's address and to connect


def require_hub(
    repo_id: str, *filenames: str, revision: str | None = None, cache_dir: str | Path | None = None
) -> None:
    """Refuse a file that is not in the cache where the Hub's server cannot be reached.

    Nothing is asked of the server. With a proxy, or in offline mode, the client is left to find out.

    Args:
        repo_id: repository, OWNER/NAME.
        *filenames: of files in it, any of which will do.
        revision: a branch, tag or commit; None for the main branch.
        cache_dir: where the client keeps what it has downloaded; None for its own place.

    Raises:
        LocalEntryNotFoundError: says why the server cannot be reached.
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
    """Why a server cannot be connected to; None if it can."""
    found: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=_PATIENCE_S).close()
            found.append(None)
        except OSError as error:  # unknown names among them
            found.append(error.strerror or str(error))

    # In a thread, since looking up a name cannot be given a limit.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)
    return found[0] if found else f"no answer in {_PATIENCE_S:.0f} s"

"""Load networks in the background, without blocking the page."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

_PATIENCE_S = 900  # for a download
_KEPT = 3  # networks in memory


@dataclass
class _Fetch:
    """A network that is loading, has loaded, or has failed to load."""

    begun: float = field(default_factory=time.monotonic)
    network: nn.Module | None = None
    error: str | None = None


class Networks:
    """Networks by name, each loaded once in a thread of its own; the last used ones stay in memory.

    Args:
        load: loads a network by name, or raises a ValueError.
        patience_s: seconds until `get` reports that a network has not arrived; loading continues.
    """

    def __init__(self, load: Callable[[str], nn.Module], patience_s: float = _PATIENCE_S) -> None:
        self._load = load
        self._patience_s = patience_s
        self._fetches: OrderedDict[str, _Fetch] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> nn.Module | None:
        """Return the network, or None while it is loading. Never blocks.

        Raises:
            ValueError: if loading failed (the next call tries again) or takes too long.
        """
        with self._lock:
            fetch = self._fetches.get(name)
            if fetch is None:
                fetch = self._fetches[name] = _Fetch()
                threading.Thread(target=self._fetch, args=(name, fetch), daemon=True).start()
            self._fetches.move_to_end(name)
            if fetch.error is not None:
                del self._fetches[name]
                raise ValueError(fetch.error)
            if fetch.network is None and time.monotonic() - fetch.begun > self._patience_s:
                raise ValueError(f"the weights {name} have not arrived within {self._patience_s:.0f} seconds")
            return fetch.network

    def _fetch(self, name: str, fetch: _Fetch) -> None:
        try:
            network = self._load(name)
        except ValueError as error:
            fetch.error = str(error)
            return
        except BaseException as error:
            fetch.error = f"{name} cannot be loaded: {type(error).__name__}"
            raise
        with self._lock:  # in one step for concurrent calls of get
            fetch.network = network
            arrived = [name for name, each in self._fetches.items() if each.network is not None]
            for old in arrived[:-_KEPT]:
                del self._fetches[old]

"""How timm finds the plugin: an import hook registers the variants as soon as `timm.models` has been imported.

timm has no plugin mechanism, so the hook waits for `timm.models`, from whichever copy of timm. It is armed when
`timm_tresnet` is imported. `import torch` does that, since the package is an entry point in PyTorch's autoload group
`torch.backends`. Nothing here imports torch or timm.
"""

import importlib
import importlib.abc
import importlib.machinery
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_logger = logging.getLogger(__name__)
_PACKAGE = __name__.partition(".")[0]


def arm() -> None:
    """Register the variants as soon as `timm.models` is imported; at once if it already is."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        disarm()  # a hook from an earlier import of this module, removed from sys.modules since: two would recurse
        sys.meta_path.insert(0, _Finder())
    if "timm.models" in sys.modules:
        _register()


def disarm() -> None:
    """Stop waiting for `timm.models`; registered variants stay."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_ours(finder)]


def _is_ours(finder: object) -> bool:
    return (type(finder).__module__, type(finder).__qualname__) == (__name__, _Finder.__qualname__)


def _register() -> None:
    try:
        tresnet = importlib.import_module(f"{_PACKAGE}.tresnet")
        if getattr(sys.modules["timm.models"], "TResNet", None) is not tresnet.TResNet:
            tresnet.register()
    except BaseException as error:  # `import timm` must work even if the plugin is broken
        if _is_of_user(error):
            raise
        _logger.warning("timm_tresnet could not register its models, timm keeps its own: %r", error)


def _is_of_user(error: BaseException) -> bool:
    """Return whether an interrupt or the process's signal handler raised the error, not a broken module."""
    handlers = [getattr(signal.getsignal(number), "__code__", None) for number in signal.valid_signals()]
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, KeyboardInterrupt) or any(frame.f_code in handlers for frame in frames)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `timm.models` and this package's modules by the other finders, and wraps their loaders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "timm.models" and not fullname.startswith(f"{_PACKAGE}."):
            return None
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, "find_spec"):  # Python skips finders without it, too
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Runs the original loader, then registers the variants if `timm.models` has been imported.

    Registration waits until none of this package's modules is half imported: if `import timm_tresnet.models.blocks`
    imports timm, `timm_tresnet.tresnet` can only be imported after it has finished.
    """

    _lock = threading.Lock()
    _running = 0

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:  # get_code for `python -m`, resources and so on
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec: Any = module.__spec__  # never None while a module is loaded
        module.__loader__ = spec.loader = self._loader  # leave no trace in the module
        with _Loader._lock:
            _Loader._running += 1
        try:
            self._loader.exec_module(module)
        finally:
            with _Loader._lock:
                _Loader._running -= 1
                last = _Loader._running == 0  # if two threads finish together, one must see that it is the last
        if last and "timm.models" in sys.modules:
            _register()

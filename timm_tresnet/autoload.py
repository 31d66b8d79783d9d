"""How timm finds the plugin: the variants are registered as soon as `timm.models` has been imported.

timm has no plugins of its own, so an import hook waits for `timm.models`, whichever copy of timm that belongs to. The
hook is armed when `timm_tresnet` is imported, and that happens by itself: the package is an entry point in PyTorch's
autoload group `torch.backends`, hence `import torch` imports it. Nothing here imports torch or timm.
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
    """Register the variants with timm as soon as `timm.models` is there; at once if it already is."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        disarm()  # that of an earlier import of this module, if it was removed from sys.modules: two would recurse
        sys.meta_path.insert(0, _Finder())
    if "timm.models" in sys.modules:
        _register()


def disarm() -> None:
    """Stop waiting for `timm.models`; what is registered stays."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_ours(finder)]


def _is_ours(finder: object) -> bool:
    return (type(finder).__module__, type(finder).__qualname__) == (__name__, _Finder.__qualname__)


def _register() -> None:
    try:
        tresnet = importlib.import_module(f"{_PACKAGE}.tresnet")
        if getattr(sys.modules["timm.models"], "TResNet", None) is not tresnet.TResNet:
            tresnet.register()
    except BaseException as error:  # whatever is wrong with the plugin, `import timm` has to work
        if _is_of_user(error):
            raise
        _logger.warning("timm_tresnet could not register its models, timm keeps its own: %r", error)


def _is_of_user(error: BaseException) -> bool:
    """Whether a key or a signal handler of the process stops it, and not a module that is broken or calls sys.exit."""
    handlers = [getattr(signal.getsignal(number), "__code__", None) for number in signal.valid_signals()]
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, KeyboardInterrupt) or any(frame.f_code in handlers for frame in frames)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `timm.models` and this package's modules where they are, and has their loaders call back."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "timm.models" and not fullname.startswith(f"{_PACKAGE}."):
            return None
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, "find_spec"):  # Python passes over those without it, too
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Runs another loader, then registers the variants if `timm.models` is there.

    Waits until no module of ours is half imported: where `import timm_tresnet.models.blocks` is what imports timm,
    `timm_tresnet.tresnet` cannot be imported before that has finished.
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
        spec: Any = module.__spec__  # there, of a module that is loaded
        module.__loader__ = spec.loader = self._loader  # leave no trace in the module
        with _Loader._lock:
            _Loader._running += 1
        try:
            self._loader.exec_module(module)
        finally:
            with _Loader._lock:
                _Loader._running -= 1
                last = _Loader._running == 0  # of two threads that end together, one has to see that it is the last
        if last and "timm.models" in sys.modules:
            _register()

"""How tests import scripts, which are in no package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def load_script(path: str) -> ModuleType:
    """Import a script anew, with its folder on the path while it is read, as if it ran.

    Args:
        path: from the root of the repository.
    """
    file = ROOT / path
    name = "_".join(Path(path).with_suffix("").parts)  # not the stem, under which others may look for another module
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(file.parent)
        patch.setitem(sys.modules, name, module)  # where dataclasses look
        spec.loader.exec_module(module)
    return module

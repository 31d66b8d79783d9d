import importlib.machinery
import importlib.util
import sys
import threading
import types

import pytest
import timm.models
from interpreters import BUILTIN, OURS, STRICTLY, WHO_BUILDS

import timm_tresnet
from timm_tresnet import autoload


@pytest.mark.parametrize(
    "before", ["", pytest.param("import timm_tresnet; ", marks=pytest.mark.thorough)], ids=["nothing", "ours"]
)
def test_timm_builds_ours_whatever_is_imported_first(run_python, before):
    process = run_python(*STRICTLY, "-c", before + WHO_BUILDS)
    assert set(process.stdout.split()) == {OURS}
    assert process.stderr == ""


RELOAD = """
import timm, importlib
importlib.reload(timm.models)
assert timm.models.tresnet_m.__module__ == "timm_tresnet.tresnet"
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    "before",
    [
        "import timm; import timm_tresnet",
        "import timm.models.resnet",
        "from timm_tresnet.models.blocks import Bottleneck",
        "import timm_tresnet.cli.main",
        RELOAD,
    ],
    ids=["timm", "submodule_of_timm", "our_blocks", "our_cli", "timm_reloaded"],
)
def test_timm_builds_ours_whatever_is_imported_after_pytorch(run_child, before):
    """PyTorch comes first in every child."""
    assert run_child(f"{before}\n{WHO_BUILDS}").split() == [OURS]


def test_threads_that_import_ours_and_timm_at_once_all_get_ours(run_child):
    code = """
import threading

names = ("timm", "timm_tresnet.models.blocks") * 4
threads = [threading.Thread(target=__import__, args=(name,)) for name in names]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    assert run_child(code + WHO_BUILDS).split() == [OURS]


@pytest.mark.thorough
def test_broken_plugin_warns_once_and_leaves_timm_its_own_models(run_python):
    """Not even the hook, which PyTorch arms, can be imported."""
    process = run_python(*STRICTLY, "-c", sabotage("autoload", "SystemExit('sabotage')"))
    assert process.stdout.split() == [BUILTIN, "10"]
    assert process.stderr.count("timm keeps its own") == 1
    assert "sabotage" in process.stderr


def sabotage(module, error):
    """Code that prints who builds, and how many pretrained models timm lists, where a module raises an error."""
    return f"""
import importlib.abc, sys
class Saboteur(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "timm_tresnet.{module}":
            raise {error}
sys.meta_path.insert(0, Saboteur())
import torch
{WHO_BUILDS}
print(len(timm.list_models("tresnet*", pretrained=True)))
"""


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("models.blocks", "SystemExit('sabotage')"),
        pytest.param("tresnet", "ImportError('sabotage')", marks=pytest.mark.thorough),
    ],
)
def test_network_that_cannot_be_imported_warns_once_and_leaves_timm_its_own_models(run_child, module, error):
    said, *words = run_child("import sys; sys.stderr = sys.stdout" + sabotage(module, error)).splitlines()
    assert "timm keeps its own" in said
    assert "sabotage" in said
    assert words == [BUILTIN, "10"]


def test_handler_of_the_user_stops_the_process_while_the_plugin_is_imported(run_child):
    code = """
import importlib.abc, os, signal, sys

class Stopper(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "timm_tresnet.tresnet":
            os.kill(os.getpid(), signal.SIGTERM)

signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
sys.meta_path.insert(0, Stopper())
try:
    import timm
except SystemExit as error:
    print("stopped with", error.code)
"""
    assert run_child(code) == "stopped with 7\n"


@pytest.mark.thorough
def test_process_whose_user_presses_a_key_stops_while_the_plugin_is_imported(run_python):
    code = """
import importlib.abc, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Stopper(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "timm_tresnet.tresnet":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Stopper())
import timm
print("went on")
"""
    process = run_python("-c", code, check=False)
    assert process.stdout == ""
    assert process.returncode != 0
    assert process.stderr.endswith("\nKeyboardInterrupt\n")


@pytest.mark.thorough  # PyTorch's, with a plugin of another name
def test_package_that_is_gone_is_an_error_that_names_pytorchs_variable(run_python, tmp_path):
    (tmp_path / "plugin-1.dist-info").mkdir()
    (tmp_path / "plugin-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    entry = "[torch.backends]\nplugin = plugin_that_is_gone:_autoload\n"
    (tmp_path / "plugin-1.dist-info" / "entry_points.txt").write_text(entry)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch; print(torch.ones(1).item())"
    process = run_python("-c", code, check=False)
    assert process.returncode == 1
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in process.stderr
    assert run_python("-c", code, TORCH_DEVICE_BACKEND_AUTOLOAD="0").stdout == "1.0\n"


def test_modules_keep_their_own_loaders():
    loaders = {type(loader) for loader in (timm.models.__loader__, timm.models.__spec__.loader)}
    assert loaders == {importlib.machinery.SourceFileLoader}


def test_finders_that_python_passes_over_are_passed_over(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [object(), autoload._Finder(), importlib.machinery.PathFinder])
    spec = sys.meta_path[1].find_spec("timm_tresnet.models", timm_tresnet.__path__)
    assert spec.origin.endswith("__init__.py")


def test_of_two_threads_whose_modules_finish_together_one_registers(monkeypatch):
    registered = []
    monkeypatch.setattr(autoload, "_register", lambda: registered.append(threading.current_thread().name))

    class Lock:
        """Lets neither thread count itself out before both have run their module."""

        lock, visits, both_ran = threading.Lock(), threading.local(), threading.Barrier(2)

        def __enter__(self):
            self.visits.count = getattr(self.visits, "count", 0) + 1
            if self.visits.count == 2:
                self.both_ran.wait(60)
            self.lock.acquire()

        def __exit__(self, *exception):
            self.lock.release()

    both_started = threading.Barrier(2)
    monkeypatch.setattr(autoload._Loader, "_lock", Lock())
    monkeypatch.setitem(sys.modules, "timm.models", types.ModuleType("timm.models"))

    def load(name):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        loader = types.SimpleNamespace(exec_module=lambda module: both_started.wait(60))
        autoload._Loader(loader).exec_module(module)

    threads = [threading.Thread(target=load, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(registered) == 1


def test_package_that_is_removed_and_imported_again_asks_once(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    before = [finder for finder in sys.meta_path if type(finder).__name__ == "_Finder"]
    again = importlib.util.module_from_spec(importlib.util.find_spec("timm_tresnet.autoload"))
    again.__spec__.loader.exec_module(again)
    again.arm()
    finders = [finder for finder in sys.meta_path if type(finder).__name__ == "_Finder"]
    assert len(before) == len(finders) == 1
    assert type(finders[0]) is again._Finder

import pytest
from conftest import STRICTLY

OURS, BUILTIN = "timm_tresnet.tresnet", "timm.models.tresnet"
WHO_BUILDS = "import timm; print(type(timm.create_model('tresnet_m', device='meta')).__module__)"


@pytest.mark.parametrize(
    "code",
    [
        WHO_BUILDS,
        "import timm_tresnet; " + WHO_BUILDS,
        "import timm; import timm_tresnet; " + WHO_BUILDS,
        "import torch; import timm_tresnet; " + WHO_BUILDS,
        "import timm.models.resnet; " + WHO_BUILDS,
        "from timm_tresnet import TResNet; " + WHO_BUILDS,
        "from timm_tresnet.blocks import Bottleneck; " + WHO_BUILDS,
        "from timm_tresnet.layers import BlurPool2d; " + WHO_BUILDS,
        "import timm_tresnet.layers.conv_norm_act; " + WHO_BUILDS,
        "import timm_tresnet.cli; " + WHO_BUILDS,
        "import timm, importlib; importlib.reload(timm.models); "
        "print(timm.models.tresnet_m.__module__, end=' '); " + WHO_BUILDS.replace("import timm; ", ""),
        "import threading; import torch\n"
        "names = ('timm', 'timm_tresnet.blocks') * 4\n"
        "threads = [threading.Thread(target=__import__, args=(name,)) for name in names]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n" + WHO_BUILDS,
    ],
    ids=[
        "nothing",
        "ours_first",
        "timm_first",
        "torch_first",
        "submodule_of_timm",
        "public_name",
        "our_blocks",
        "our_layers",
        "our_submodule",
        "our_cli",
        "timm_reloaded",
        "threads",
    ],
)
def test_timm_builds_ours_whatever_was_imported_first(run_python, code):
    process = run_python(*STRICTLY, "-c", code)
    assert set(process.stdout.split()) == {OURS}
    assert process.stderr == ""


def test_import_of_torch_arms_the_hook_without_importing_timm(run_python):
    code = "import sys, torch; print(sorted(name for name in sys.modules if name.startswith(('timm', 'huggingface'))))"
    assert run_python("-c", code).stdout.strip() == "['timm_tresnet', 'timm_tresnet.autoload']"


@pytest.mark.parametrize("switch", ["TIMM_TRESNET_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_switch_leaves_timm_alone_until_the_plugin_is_imported(run_python, switch):
    code = WHO_BUILDS + "; import timm_tresnet; " + WHO_BUILDS
    assert run_python("-c", code, **{switch: "0"}).stdout.split() == [BUILTIN, OURS]
    assert run_python("-c", "import timm_tresnet; " + WHO_BUILDS, **{switch: "0"}).stdout.strip() == OURS


@pytest.mark.parametrize("module", ["tresnet", "blocks", "autoload"])
def test_broken_plugin_warns_once_and_leaves_timm_its_own_models(run_python, module):
    code = f"""
import importlib.abc, sys
class Saboteur(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "timm_tresnet.{module}":
            raise ImportError("sabotage")
sys.meta_path.insert(0, Saboteur())
import torch
{WHO_BUILDS}
import timm
print(len(timm.list_models("tresnet*", pretrained=True)))
"""
    process = run_python(*STRICTLY, "-c", code)
    assert process.stdout.split() == [BUILTIN, "10"]
    assert process.stderr.count("timm keeps its own") == 1
    assert "sabotage" in process.stderr


def test_modules_keep_their_own_loaders(run_python):
    code = (
        "import timm, inspect; print(type(timm.models.__loader__).__name__, type(timm.models.__spec__.loader).__name__)"
    )
    assert run_python("-c", code).stdout.split() == ["SourceFileLoader"] * 2


def test_script_runs_with_the_plugin_and_its_own_arguments(run_python, tmp_path):
    (tmp_path / "beside.py").write_text("VALUE = 3\n")
    script = tmp_path / "script.py"
    script.write_text(f"import sys, beside\nprint(__name__, sys.argv[1:], beside.VALUE)\n{WHO_BUILDS}\n")
    process = run_python("-m", "timm_tresnet", script, "--model", "x", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert process.stdout.split("\n")[:2] == ["__main__ ['--model', 'x'] 3", OURS]


def test_script_runs_in_every_process_of_torchrun(run_python, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import os\nprint(os.environ['WORLD_SIZE'])\n{WHO_BUILDS}\n")
    process = run_python(
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "localhost", "--master-port", "29511",
        "-m", "timm_tresnet", script, TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )  # fmt: skip
    assert sorted(process.stdout.split()) == ["2", "2", OURS, OURS]


def test_missing_script_is_named(run_python):
    process = run_python("-m", "timm_tresnet", "missing.py", check=False)
    assert process.returncode == 1
    assert "no file missing.py" in process.stderr


def test_without_a_script_the_module_is_the_command(run_python):
    assert "classify" in run_python("-m", "timm_tresnet", "--help").stdout


def test_package_lists_its_public_names():
    import timm_tresnet

    assert set(timm_tresnet.__all__) <= set(dir(timm_tresnet))
    assert timm_tresnet.__version__
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        timm_tresnet.nonsense  # noqa: B018
    assert all(getattr(timm_tresnet, name).__module__.startswith("timm_tresnet.") for name in timm_tresnet.__all__)

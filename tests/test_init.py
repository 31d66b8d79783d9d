import ast
from pathlib import Path

import pytest
from interpreters import BUILTIN, OURS, WHO_BUILDS

import timm_tresnet


def test_import_of_torch_arms_the_hook_without_importing_timm(run_child):
    code = "import sys, torch; print(sorted(name for name in sys.modules if name.startswith(('timm', 'huggingface'))))"
    assert run_child(code).strip() == "['timm_tresnet', 'timm_tresnet.autoload']"


def test_autoload_undoes_itself_where_the_variable_asks_for_it(run_child):
    code = "import timm_tresnet; timm_tresnet._autoload()  # as PyTorch does\n"
    code += f"{WHO_BUILDS}; import timm_tresnet; {WHO_BUILDS}"
    assert run_child(code, TIMM_TRESNET_AUTOLOAD="0").split() == [BUILTIN, OURS]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("switch", "before", "builders"),
    [
        ("TIMM_TRESNET_AUTOLOAD", "import timm_tresnet", [OURS]),
        ("TORCH_DEVICE_BACKEND_AUTOLOAD", f"{WHO_BUILDS}; import timm_tresnet", [BUILTIN, OURS]),
    ],
    ids=["first", "after_timm"],
)
def test_switch_leaves_timm_alone_until_the_plugin_is_imported(run_python, switch, before, builders):
    assert run_python("-c", f"{before}; {WHO_BUILDS}", **{switch: "0"}).stdout.split() == builders


def test_package_lists_its_public_names():
    assert {"TResNet", "export_model"} <= set(timm_tresnet.__all__) <= set(dir(timm_tresnet))
    assert timm_tresnet.__version__
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        timm_tresnet.nonsense  # noqa: B018
    assert all(getattr(timm_tresnet, name).__module__.startswith("timm_tresnet.") for name in timm_tresnet.__all__)


def test_editors_see_the_public_names_where_they_are():
    tree = ast.parse(Path(timm_tresnet.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.asname: each.module for each in block.body for alias in each.names}
    assert seen == {name: f"timm_tresnet.{module}" for name, module in timm_tresnet._PUBLIC.items()}
    assert (Path(timm_tresnet.__file__).parent / "py.typed").exists()

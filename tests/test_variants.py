"""The table of variants, and CONTRIBUTING.md's example of a new one."""

import re
import shutil
from pathlib import Path

import pytest
import timm

import timm_tresnet.tresnet
from timm_tresnet.variants import WEIGHTS, name_weights

ROOT = Path(__file__).parents[1]


def test_names_are_those_of_timm_in_its_order():
    assert name_weights() == timm.list_models(module="tresnet", include_tags=True)


def test_a_variant_without_weights_has_a_config_that_says_so():
    untrained = {name.partition(".")[0] for name in WEIGHTS if name.endswith(".untrained")}
    assert untrained == {"tresnet_s", "tresnet_v2_xl", "tresnet_d"}
    assert timm_tresnet.tresnet.default_cfgs["tresnet_v2_xl"].default.architecture is None
    assert timm_tresnet.tresnet.default_cfgs["tresnet_v2_xl"].tags[0] == "untrained"


def test_a_variant_says_what_it_is():
    assert timm_tresnet.tresnet.tresnet_l.__doc__ == "TResNet with layers=(4, 5, 18, 3), width_factor=1.2."
    assert timm_tresnet.tresnet.tresnet_l.__module__ == "timm_tresnet.tresnet"


def read_row():
    """The row that CONTRIBUTING.md adds as an example."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("### A variant, for example")[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


@pytest.mark.thorough
def test_the_row_of_contributing_is_all_that_a_variant_needs(run_python, tmp_path):
    package = tmp_path / "clone" / "timm_tresnet"
    shutil.copytree(ROOT / "timm_tresnet", package, ignore=shutil.ignore_patterns("__pycache__"))
    table = package / "variants.py"
    text = table.read_text(encoding="utf-8")
    table.write_text(text.replace('    "test_tresnet": {', f'    {read_row().strip()}\n    "test_tresnet": {{', 1))
    code = """
import sys
from timm_tresnet.cli.commands.list import describe_weights
(row,) = (row for row in describe_weights() if row["model"].startswith("tresnet_xs"))
assert row["weights"] == "none" and "torch" not in sys.modules, row
import timm, torch
from timm_tresnet.bench.measuring import make_network
from timm_tresnet.conversion.recognition import recognise
model = timm.create_model("tresnet_xs", num_classes=1000)
assert "timm_tresnet" in type(model).__module__ and "clone" in sys.modules["timm_tresnet"].__file__
assert sum(parameter.numel() for parameter in model.parameters()) == round(row["params_m"] * 1e6)
assert timm.list_models("tresnet_xs", include_tags=True) == ["tresnet_xs.untrained"]
builtin = make_network("built-in:tresnet_xs")
builtin.load_state_dict(model.state_dict())
print(recognise(model.state_dict()).architecture)
"""
    printed = run_python("-c", code, PYTHONPATH=str(package.parent)).stdout
    assert printed == "tresnet_xs\n"

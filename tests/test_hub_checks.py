import importlib
import json
from pathlib import Path

import pytest
import timm
from damaging import DAMAGES, MISSING, damage
from safetensors.torch import load_file

HUB = Path(__file__).parent.parent / "hub"


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.syspath_prepend(HUB)
    return importlib.import_module("checks")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder as timm writes them, with a card, and the shapes of its tensors."""
    folder = tmp_path_factory.mktemp("good")
    arguments = {"num_classes": 10, "in_chans": 3}  # which older timm does not write by itself
    model = timm.create_model("test_tresnet", **arguments)
    timm.models.save_for_hf(model, folder, safe_serialization=True, model_args=arguments)
    (folder / "README.md").write_text("---\nlibrary_name: timm\n---\n")
    config = json.loads((folder / "config.json").read_text())
    return folder, config, {name: tuple(each.shape) for name, each in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize(("path", "value"), DAMAGES, ids=lambda each: "" if each is MISSING else repr(each)[:30])
def test_every_damage_of_a_config_is_found_in_one_sentence(path, value, good, checks):
    folder, config, shapes = good
    (folder / "config.json").write_text(json.dumps(damage(config, path, value)))
    (problem,) = checks.find_problems(folder, shapes, "owner/name")
    assert problem.startswith("config.json ")
    assert len(problem.splitlines()) == 1


def test_a_good_folder_has_no_problems(good, checks):
    folder, config, shapes = good
    (folder / "config.json").write_text(json.dumps(config))
    assert checks.find_problems(folder, shapes, "owner/name") == []

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import timm
from damaging import DAMAGES, damage, first_of_each_path
from safetensors.torch import load_file

from timm_tresnet.conversion.card import make_card
from timm_tresnet.weights.catalogue import NOTHING_KNOWN

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
    (folder / "README.md").write_text("---\nlibrary_name: timm\nlicense: apache-2.0\n---\n")
    config = json.loads((folder / "config.json").read_text())
    return folder, config, {name: tuple(each.shape) for name, each in load_file(folder / "model.safetensors").items()}


@first_of_each_path(DAMAGES)
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


CONTRADICTIONS = {  # fields of the pretrained config, what is done to the card, and what is said
    "other_licence": ({"license": "mit"}, ("license: mit", "license: gpl"), "has license 'gpl', config.json has 'mit'"),
    "no_licence": ({"license": "mit"}, ("license: mit\n", ""), "has license None, config.json has 'mit'"),
    "no_data_set": (
        {"description": "Trained on My birds"},
        ("My birds", "things"),
        "does not say what config.json says",
    ),
    "no_tag": ({"notes": ["multi-label"]}, ("- multi-label\n", ""), "lacks the tag multi-label"),
    "tag": ({}, ("- tresnet\n", "- tresnet\n- multi-label\n"), "has the tag multi-label"),
    "softmax": ({"notes": ["multi-label"]}, (".sigmoid()", ".softmax(-1)"), "computes probabilities by softmax"),
    "sigmoid": ({}, (".softmax(-1)", ".sigmoid()"), "computes probabilities by sigmoid"),
}


@pytest.mark.parametrize(("fields", "change", "said"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_card_that_contradicts_its_config_is_found(fields, change, said, good, checks):
    folder, config, shapes = good
    facts = {"license": fields.get("license"), "multi_label": "notes" in fields}
    facts["dataset"] = fields.get("description", "").removeprefix("Trained on ") or None
    card = make_card(dataclasses.replace(NOTHING_KNOWN, **facts), "test_tresnet", 10, "owner/name")
    pretrained_cfg = {**config["pretrained_cfg"], "license": None, "description": None, **fields}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": pretrained_cfg}))
    (folder / "README.md").write_text(card)
    assert checks.find_problems(folder, shapes, "owner/name") == []
    assert change[0] in card
    (folder / "README.md").write_text(card.replace(*change))
    (problem,) = checks.find_problems(folder, shapes, "owner/name")
    assert said in problem

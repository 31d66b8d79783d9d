import dataclasses
import json
import os

import pytest
import timm
import torch
from tagged import LABELS, SMALL

from timm_tresnet.tagging.card import Training
from timm_tresnet.tagging.settings import Settings
from timm_tresnet.tagging.start import make_pretrained_cfg
from timm_tresnet.tagging.writing import TrainedNetwork, write_tagger
from timm_tresnet.weights.labels import is_multi_label, read_thresholds
from timm_tresnet.weights.loading import load_network

THRESHOLDS = [0.25, 0.5, 0.75]


@pytest.fixture
def network():
    return timm.create_model("test_tresnet", num_classes=3, **SMALL).eval()


@pytest.fixture
def tagged(network):
    training = Training(
        labels=LABELS,
        thresholds=THRESHOLDS,
        average_precisions=[0.5] * 3,
        scores={"mAP": 50.0, "CF1": 50.0, "OF1": 50.0},
        label_counts=[1] * 3,
        images=(3, 1),
        data=("a.csv", "b.csv"),
        settings=Settings(),
        head="linear",
        epoch=1,
        averaged=False,
        image_size=32,
        command="",
    )
    return TrainedNetwork("test_tresnet", SMALL, make_pretrained_cfg(network, 32), network.state_dict(), training)


def test_the_folder_gives_the_network_its_labels_and_its_thresholds(tagged, network, tmp_path):
    write_tagger(tagged, tmp_path / "tagger", network)
    assert sorted(os.listdir(tmp_path)) == ["tagger"]
    loaded = load_network(f"local-dir:{tmp_path / 'tagger'}")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), network(images))
    assert tuple(loaded.pretrained_cfg["label_names"]) == LABELS
    assert is_multi_label(loaded.pretrained_cfg)
    assert read_thresholds(loaded.pretrained_cfg, 3) == THRESHOLDS


def test_weights_that_are_not_what_the_network_computes_are_not_written(tagged, network, tmp_path, monkeypatch):
    monkeypatch.setattr("timm_tresnet.tagging.writing.load_network", lambda name: lambda images: torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="gives logits that differ from the trained network's"):
        write_tagger(tagged, tmp_path / "tagger", network)
    assert os.listdir(tmp_path) == []


def test_an_earlier_tagger_is_replaced_only_when_asked(tagged, network, tmp_path):
    folder = tmp_path / "tagger"
    write_tagger(tagged, folder, network)
    with pytest.raises(FileExistsError, match="name another folder, or overwrite it"):
        write_tagger(tagged, folder, network)
    other = dataclasses.replace(tagged, training=dataclasses.replace(tagged.training, thresholds=[0.1] * 3))
    write_tagger(other, folder, network, overwrite=True)
    assert "0.1, 0.1, 0.1" in json.loads((folder / "config.json").read_text())["pretrained_cfg"]["notes"][1]

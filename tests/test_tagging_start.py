import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from tagged import LABELS, SMALL

from timm_tresnet.models.network import TResNet
from timm_tresnet.tagging.start import make_network, make_pretrained_cfg
from timm_tresnet.weights.labels import make_notes


def equal_parts(network, other):
    """Names of the tensors that two networks have in common, with equal values."""
    first, second = network.state_dict(), other.state_dict()
    return {
        name
        for name in first.keys() & second.keys()
        if first[name].shape == second[name].shape and torch.equal(first[name], second[name])
    }


@pytest.fixture
def saved(tmp_path):
    """Save a network as a tagger's folder; returns the network and the folder's name for timm."""

    def save(head, labels=LABELS, multi_label=True):
        arguments = {**SMALL, "head": head, **({"decoder_embedding": 8} if head == "ml_decoder" else {})}
        network = timm.create_model("test_tresnet", num_classes=len(labels), **arguments)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter)
        folder = tmp_path / head
        folder.mkdir()
        pretrained_cfg = {**make_pretrained_cfg(network, 32), "notes": list(make_notes(multi_label))}
        config = {"architecture": "test_tresnet", "num_classes": len(labels), "model_args": arguments}
        config |= {"pretrained_cfg": pretrained_cfg, "label_names": list(labels)}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(network.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        return network, f"local-dir:{folder}"

    return save


def test_the_body_comes_from_the_weights_and_the_classifier_is_new():
    source = timm.create_model("test_tresnet", pretrained=True)
    network, arguments = make_network("test_tresnet", {}, source.pretrained_cfg["label_names"])
    of_body = {name for name in source.state_dict() if name.startswith("body.")}
    assert equal_parts(network, source) & set(network.state_dict()) >= of_body
    assert "head.fc.weight" not in equal_parts(network, source)  # ten classes, but of one right class each
    assert arguments == {}


def test_another_head_goes_on_the_same_body():
    source = timm.create_model("test_tresnet", pretrained=True)
    network, arguments = make_network("test_tresnet", {"head": "ml_decoder", "decoder_embedding": 8}, LABELS)
    assert {name for name in source.state_dict() if name.startswith("body.")} <= equal_parts(network, source)
    assert arguments == {"head": "ml_decoder", "decoder_embedding": 8}
    assert network(torch.rand(2, 3, 64, 64)).shape == (2, 3)


def test_a_taggers_decoder_stays_for_other_labels_and_all_of_it_for_the_same(saved):
    source, name = saved("ml_decoder")
    network, arguments = make_network(name, {}, LABELS)
    assert equal_parts(network, source) == set(source.state_dict())
    assert arguments == {**SMALL, "head": "ml_decoder", "decoder_embedding": 8}
    network, _ = make_network(name, {}, ("other", "labels"))
    kept = equal_parts(network, source)
    assert {key for key in source.state_dict() if "decoder" in key} <= kept
    assert not {key for key in kept if key.startswith("head.fc.")}


def test_labels_in_another_order_get_a_new_classifier(saved):
    source, name = saved("linear")
    network, _ = make_network(name, {}, LABELS[::-1])
    assert "head.fc.weight" not in equal_parts(network, source)
    network, _ = make_network(name, {}, LABELS)
    assert "head.fc.weight" in equal_parts(network, source)


def test_random_weights_depend_on_the_seed_alone():
    networks = []
    for _ in range(2):
        torch.manual_seed(3)
        networks.append(make_network("test_tresnet", SMALL, LABELS, pretrained=False)[0])
    assert equal_parts(*networks) == set(networks[0].state_dict())
    assert isinstance(networks[0], TResNet)


@pytest.mark.parametrize(
    ("name", "arguments", "pretrained", "message"),
    [
        ("tresnet_q", {}, True, "cannot load the model tresnet_q"),
        ("tresnet_q", {}, False, "cannot make the network tresnet_q"),
        ("resnet18", {}, True, "it is not a TResNet"),
        ("test_tresnet", {"heads": 3}, False, "cannot make the network test_tresnet with {'heads': 3}.*heads"),
        ("test_tresnet", {"head": "linaer"}, True, "cannot make the network .*linaer"),
        ("test_tresnet", {"in_chans": 4}, False, "needs images with 4 channels; training reads images with 3"),
        ("test_tresnet", {"width_factor": 0.5}, True, "the weights need a network with the same body"),
        ("tresnet_s", {}, True, "tresnet_s"),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_sentence(name, arguments, pretrained, message):
    with pytest.raises(ValueError, match=message):
        make_network(name, arguments, LABELS, pretrained)


def test_images_are_squashed_for_it():
    network, _ = make_network("test_tresnet", SMALL, LABELS, pretrained=False)
    config = make_pretrained_cfg(network, None)
    assert (config["input_size"], config["crop_mode"], config["crop_pct"]) == ([3, 64, 64], "squash", 1.0)
    assert make_pretrained_cfg(network, 96)["input_size"] == [3, 96, 96]

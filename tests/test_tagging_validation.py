import pytest
import torch
from tagged import LABELS, write_images

from timm_tresnet.tagging import validation
from timm_tresnet.tagging.annotations import read_annotations


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", 40)


class Named:
    """As much of a network as labels are matched with."""

    def __init__(self, names, descriptions=None):
        self.pretrained_cfg = {"label_names": names, "label_descriptions": descriptions}
        self.num_classes = len(names)


def test_labels_are_found_by_name_description_and_whatever_their_case():
    network = Named(["n01", "n02", "n03", "n04"], {"n01": "red fox", "n02": "crane", "n03": "crane", "n04": "Emu"})
    found = validation.match_labels(["n02", "red fox", "EMU", "crane", "yak"], network)
    assert found == validation.Matching({"n02": 1, "red fox": 0, "EMU": 3}, ("crane", "yak"), (2,))
    assert validation.match_labels(["Red_Fox"], network).outputs == {"Red_Fox": 0}
    assert validation.match_labels(["red  fox"], network).outputs == {"red  fox": 0}
    accents = Named(["caf\u00e9", "cafe"], {})  # a folder of macOS may be named by the second form below
    assert validation.match_labels(["cafe\u0301"], accents).outputs == {"cafe\u0301": 0}
    assert validation.match_labels(["3", "0"], network).outputs == {"3": 3, "0": 0}
    assert validation.match_labels(list("abcd"), network, by_order=True).outputs == dict(
        zip("abcd", range(4), strict=True)
    )
    with pytest.raises(ValueError, match="--by-order needs as many labels as the network has outputs, 4, got 3"):
        validation.match_labels(list("abc"), network, by_order=True)


def test_imagenets_classes_are_found_by_synset(monkeypatch):
    network = Named(["x"] * 1000)
    network.pretrained_cfg = {"label_names": None, "architecture": "tresnet_m"}
    monkeypatch.setattr(network, "num_classes", 1000)
    assert validation.match_labels(["n01440764", "n15075141"], network).outputs == {"n01440764": 0, "n15075141": 999}


def test_logits_that_are_not_finite_are_an_error(images):
    class Broken(torch.nn.Module):
        num_classes = in_chans = 3
        pretrained_cfg = {"input_size": (3, 32, 32), "label_names": list(LABELS)}

        def forward(self, x):
            return torch.full((len(x), 3), torch.nan)

    annotations = read_annotations(images)
    matching = validation.match_labels(annotations.names, Broken())
    with pytest.raises(ValueError, match="logits for 40 of 40 images are not finite"):
        validation.run_network(Broken(), annotations, matching, Broken())


def test_nothing_to_measure_is_an_error(images):
    outputs = validation.Outputs(torch.rand(2, 3), torch.tensor([[1, -1, 0], [-1, -1, 0]]), ())
    with pytest.raises(ValueError, match="validation needs a label that some images have"):
        validation.measure(Named(["a", "b", "c"]), outputs, 3, True)


def test_several_labels_of_one_output_are_that_output():
    network = Named(["dog", "cat", "emu"])
    matching = validation.match_labels(["Dog", "dog", "CAT"], network)
    assert (matching.outputs, matching.missing) == ({"Dog": 0, "dog": 0, "CAT": 1}, (2,))


def test_an_image_with_none_of_the_networks_labels_has_no_accuracy():
    outputs = validation.Outputs(torch.eye(3), torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 0]], dtype=torch.int8), ())
    found = validation.measure(Named(["a", "b", "c"]), outputs, 3, False)
    assert (found["images"], found["measured_labels"], found["scores"]) == (2, 1, {"top-1": 50})

import pytest
import timm

from timm_tresnet.weights.labels import (
    LABEL_SETS,
    is_multi_label,
    label_config,
    label_lookup,
    list_names,
    make_notes,
    read_thresholds,
)

COUNTS = {"imagenet-1k": 1000, "imagenet-21k-p": 11221, "coco": 80, "voc": 20}


def test_every_label_set_has_a_count():
    assert set(COUNTS) == set(LABEL_SETS)


@pytest.mark.parametrize(("labels", "count"), COUNTS.items(), ids=COUNTS)
def test_every_class_has_one_name_of_its_own(labels, count):
    config = label_config(labels)
    names = config["label_names"]
    assert len(names) == len(set(names)) == count
    assert all(name and name == name.strip() for name in names)
    if "label_descriptions" in config:
        assert list(config["label_descriptions"]) == names
        assert all(config["label_descriptions"].values())


@pytest.mark.parametrize(("labels", "name"), [("imagenet-1k", "m.miil_in1k"), ("imagenet-21k-p", "m.miil_in21k")])
def test_imagenet_labels_count_the_classes_of_the_registered_weights(labels, name):
    assert timm.get_pretrained_cfg(f"tresnet_{name}").num_classes == COUNTS[labels]


def test_imagenet_classes_are_in_the_order_of_the_synset_identifiers():
    # Class folders sort so, and the official code reads ImageNet with torchvision's ImageFolder.
    for labels in ("imagenet-1k", "imagenet-21k-p"):
        names = label_config(labels)["label_names"]
        assert names == sorted(names)


def test_imagenet_names_are_described_in_words():
    config = label_config("imagenet-1k")
    assert config["label_names"][281] == "n02123045"
    assert config["label_descriptions"]["n02123045"] == "tabby, tabby cat"


@pytest.mark.parametrize(
    ("labels", "module", "weights"),
    [
        ("coco", "torchvision.models.detection", "FasterRCNN_ResNet50_FPN_Weights"),
        ("voc", "torchvision.models.segmentation", "FCN_ResNet50_Weights"),
    ],
    ids=["coco", "voc"],
)
def test_names_and_order_are_those_that_torchvision_has(labels, module, weights):
    models = pytest.importorskip(module, reason="needs torchvision, whose own lists these are compared with")
    categories = getattr(models, weights).DEFAULT.meta["categories"]
    if labels == "coco":  # torchvision keeps the ids that COCO left empty
        categories = [name for name in categories if name != "N/A"]
    assert label_config(labels)["label_names"] == categories[1:]  # the first is the background


def test_unknown_label_set_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"imagenet-1k, imagenet-21k-p, coco, voc, got 'openimages'"):
        label_config("openimages")


def test_classes_are_named_by_config_then_imagenet_then_number():
    named = timm.create_model("test_tresnet", pretrained_cfg_overlay={"label_names": ["a", "b"]}, num_classes=2)
    assert label_lookup(named)(1) == "b"
    named.reset_classifier(3)
    assert label_lookup(named)(1) == "class 1"
    described = timm.create_model(
        "test_tresnet",
        pretrained_cfg_overlay={"label_names": ["a", "b"], "label_descriptions": {"b": "the letter b"}},
        num_classes=2,
    )
    assert [label_lookup(described)(index) for index in range(2)] == ["a", "the letter b"]
    assert label_lookup(timm.create_model("tresnet_m", device="meta"))(281) == "tabby, tabby cat"
    assert label_lookup(timm.create_model("tresnet_m", num_classes=17, device="meta"))(4) == "class 4"


def test_all_names_of_each_class_are_listed():
    described = {"label_names": ["a", "b"], "label_descriptions": {"b": "the letter b"}}
    model = timm.create_model("test_tresnet", pretrained_cfg_overlay=described, num_classes=2)
    assert list_names(model) == [("a",), ("b", "the letter b")]
    assert list_names(timm.create_model("tresnet_m", device="meta"))[281] == ("n02123045", "tabby, tabby cat")
    model.reset_classifier(3)
    assert list_names(model) == [()] * 3


@pytest.mark.parametrize(
    ("config", "multi_label"),
    [({}, False), ({"notes": None}, False), ({"notes": ["other"]}, False), ({"notes": ("multi-label",)}, True)],
    ids=["nothing", "none", "other_notes", "multi_label"],
)
def test_config_says_whether_an_image_has_any_number_of_labels(config, multi_label):
    assert is_multi_label(config) == multi_label


def test_thresholds_are_read_as_they_were_noted():
    thresholds = [0.25, 0.1234567, 1.0]
    config = {"notes": make_notes(True, thresholds)}
    assert is_multi_label(config)
    assert read_thresholds(config, 3) == pytest.approx(thresholds, abs=1e-6)
    assert read_thresholds(config, 4) is None  # the classifier has been replaced
    assert read_thresholds({"notes": make_notes(True)}, 3) is None
    assert read_thresholds({"notes": None}, 3) is None
    assert make_notes(False) == ()


def test_one_threshold_is_that_of_all_labels_of_the_weights():
    config = {"num_classes": 3, "notes": make_notes(True, 0.7)}
    assert config["notes"] == ("multi-label", "thresholds: 0.7")
    assert read_thresholds(config, 3) == [0.7, 0.7, 0.7]
    assert read_thresholds(config, 4) is None  # the classifier has been replaced


def test_thresholds_reach_a_network_from_the_registry():
    model = timm.create_model("test_tresnet.mosaic_cifar10", pretrained=True)
    thresholds = read_thresholds(model.pretrained_cfg, model.num_classes)
    assert len(thresholds) == len(model.pretrained_cfg["label_names"]) == 10
    assert all(0 < threshold < 1 for threshold in thresholds)


@pytest.mark.parametrize(
    "note", ["thresholds: [0.5, 2]", "thresholds: 1.5", "thresholds: true", "thresholds: [", 'thresholds: ["a"]']
)
def test_thresholds_that_are_none_are_refused(note):
    with pytest.raises(ValueError, match="needs the note of thresholds to be"):
        read_thresholds({"notes": [note]}, 2)

import pytest
import timm

from timm_tresnet.weights.labels import (
    LABEL_SETS,
    describe_labels,
    is_multi_label,
    join_source,
    label_config,
    label_lookup,
    list_names,
    make_notes,
    note_source,
    order_names,
    read_labels,
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


def test_where_the_names_are_from_is_said():
    def describe(num_classes, name="test_tresnet", **config):
        return describe_labels(
            timm.create_model(name, pretrained_cfg_overlay=config, num_classes=num_classes, device="meta")
        )

    numbered = "no names are known, classes are numbered"
    assert describe(2, label_names=["a", "b"]) == ""
    noted = {"label_names": ["a", "b"], "notes": ("multi-label", note_source("a file of labels"))}
    assert describe(2, **noted) == "a file of labels, in the weights' config"
    assert describe(3, **noted) == f"the weights' config has 2 names for 3 classes; {numbered}"
    assert describe(3, "tresnet_m") == numbered
    assert describe(1000, "tresnet_m") == "timm's list for 1000 classes, imagenet-1k"
    few = "the weights' config has 1 names for 11221 classes; timm's list for 11221 classes, imagenet-21k-miil"
    assert describe(11221, "tresnet_m", label_names=["a"]) == few
    assert (join_source("a list", ""), join_source("a list", "2 of 3")) == ("a list", "a list (2 of 3)")


ORDERED = {  # names of three classes as files have them, and in the order of the outputs
    "list": (["a", "b", "c"], ("a", "b", "c")),
    "tuple": (("c", "b", "a"), ("c", "b", "a")),
    "numbers": ({2: "c", 0: "a", 1: "b"}, ("a", "b", "c")),
    "numbers_of_json": ({"2": "c", "000000000": "a", "1": "b"}, ("a", "b", "c")),
    "by_name": ({"c": 2, "b": 1, "a": 0}, ("a", "b", "c")),
    "by_name_of_json": ({"c": "2", "b": "1", "a": "0"}, ("a", "b", "c")),
    "numbers_for_names": ({0: "2", 1: "1", 2: "0"}, ("2", "1", "0")),
    "few": (["a"], ("a", "class 1", "class 2")),
    "last": ({2: "c"}, ("class 0", "class 1", "c")),
    "like_ours": (["class 2"], ("class 2", "unnamed class 1", "unnamed class 2")),
    "not_like_ours": (["class 0"], ("class 0", "class 1", "class 2")),
}


@pytest.mark.parametrize(("in_file", "names"), ORDERED.values(), ids=ORDERED)
def test_names_in_a_file_are_put_in_the_order_of_the_outputs(in_file, names):
    gap = "" if len(in_file) == 3 else "1 names for 3 classes, the rest are numbered"
    assert order_names(in_file, 3) == (names, gap)


TEXT = "text without control characters"
UNORDERED = {
    "none": (None, "needs a dict or a list of names, got NoneType"),
    "text": ("abc", "needs a dict or a list of names, got str"),
    "empty": ([], "needs 3 names, one for each class, got 0"),
    "more": ({0: "a", 1: "b", 2: "c", 3: "d"}, "needs 3 names, one for each class, got 4"),
    "behind": ({0: "a", 3: "d"}, "needs the keys 0 to 2"),
    "negative": ({-1: "a"}, "needs the keys 0 to 2"),
    "bool": ({False: "a", True: "b"}, "needs the keys 0 to 2"),
    "fraction": ({0.0: "a"}, "needs the keys 0 to 2"),
    "long": ({"0000000000": "a"}, "needs the keys 0 to 2"),
    "digits_elsewhere": ({"\u0661": "a"}, "needs the keys 0 to 2"),
    "one_number": ({"a": 1, "b": 1}, "needs the keys 0 to 2"),
    "blank": (["a", " "], f'needs name 1 to be {TEXT}, got " "'),
    "escape": (["a", "b", "\x1b"], f'needs name 2 to be {TEXT}, got "\\u001b"'),
    "no_text": (["a", 7], f"needs name 1 to be {TEXT}, got int"),
    "twice": (["a", "b", "a"], "needs a name for each class, got a more than once"),
}


@pytest.mark.parametrize(("in_file", "fault"), UNORDERED.values(), ids=UNORDERED)
def test_what_names_no_outputs_is_told(in_file, fault):
    assert order_names(in_file, 3) == ((), fault)


def test_of_names_that_come_twice_five_are_told():
    names = [*"abcdefgh"] * 2
    assert order_names(names, 16) == ((), "needs a name for each class, got a, b, c, d, e more than once")


def test_files_of_labels_are_texts_or_json(tmp_path):
    for name, content, expected in (
        ("a.txt", " ä \r\n\nb\n\n", ["ä", "", "b"]),
        ("a", "a\n", ["a"]),
        ("a.JSON", '{"a": 1}', {"a": 1}),
    ):
        (tmp_path / name).write_bytes(content.encode())
        assert read_labels(tmp_path / name) == expected
    path = tmp_path / "b.txt"
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=f"^{path} is not text in UTF-8: 'utf-8' codec can't decode byte 0xff"):
        read_labels(path)
    with path.open("wb") as file:
        file.truncate(2**26 + 1)  # sparse
    with pytest.raises(ValueError, match=f"^{path} needs to be at most 67108864 bytes long, got 67108865"):
        read_labels(path)
    with pytest.raises(FileNotFoundError):
        read_labels(tmp_path / "c.txt")


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
    assert make_notes(False, [0.12345678, 1]) == ("thresholds: [0.123457, 1.0]",)
    assert make_notes(True, 0.12345678) == ("multi-label", "thresholds: 0.123457")
    assert make_notes(True, 1) == ("multi-label", "thresholds: 1.0")


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

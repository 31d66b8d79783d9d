import timm

from timm_tresnet.utils.notes import ASSUMED, MULTI_LABEL, NAMED_BY, THRESHOLDS, drop_notes, read_notes
from timm_tresnet.weights.labels import is_multi_label, read_thresholds

NOTES = (MULTI_LABEL, THRESHOLDS + "[0.5]", NAMED_BY + "a file of labels", ASSUMED + "mean")


def test_notes_may_be_one_text_or_none():
    assert read_notes({"notes": "one"}) == ("one",)
    assert read_notes({"notes": None}) == read_notes({}) == ()
    assert read_notes({"notes": list(NOTES)}) == NOTES


def test_notes_are_dropped_by_their_beginnings():
    assert drop_notes({"notes": NOTES}, THRESHOLDS, NAMED_BY) == (NOTES[0], NOTES[3])
    assert drop_notes({"notes": MULTI_LABEL}, MULTI_LABEL) is None


def test_new_classifier_is_not_that_of_a_tagger():
    model = timm.create_model("test_tresnet.mosaic_cifar10", pretrained=True)
    assert is_multi_label(model.pretrained_cfg)
    assert read_thresholds(model.pretrained_cfg, 10)
    model.pretrained_cfg = {**model.pretrained_cfg, "notes": (*model.pretrained_cfg["notes"], NOTES[3])}
    model.reset_classifier(10)
    assert not is_multi_label(model.pretrained_cfg)
    assert read_thresholds(model.pretrained_cfg, 10) is None
    assert model.pretrained_cfg["notes"] == (NOTES[3],)  # how images are prepared stays as it was
    assert model.default_cfg is model.pretrained_cfg

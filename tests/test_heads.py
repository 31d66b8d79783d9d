import logging

import pytest
import timm
import torch
from packaging.version import Version

from timm_tresnet import TResNet
from timm_tresnet.models.heads import HEAD_ARGUMENTS, HEADS, choose_head
from timm_tresnet.models.layers import BottleneckHead, LinearHead, MLDecoderHead, Query2LabelHead

LAYERS = (1, 1, 1, 1)
TRANSFORMERS = ("ml_decoder", "query2label")  # which need no pooling


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"head": "linear"}, LinearHead),
        ({"head": "linear", "head_features": 8}, BottleneckHead),  # as configs had it before heads had names
        ({"head": "bottleneck"}, BottleneckHead),
        ({"head": "ml_decoder", "num_groups": 2, "decoder_embedding": 16, "label_embedding": None}, MLDecoderHead),
        ({"head": "query2label", "head_features": 8, "decoder_embedding": 4}, Query2LabelHead),
    ],
    ids=["linear", "head_features", "bottleneck", "ml_decoder", "query2label"],
)
def test_heads_have_names(options, kind):
    assert type(choose_head(**options)(6, num_classes=3, pool_type="avg")) is kind


def test_options_reach_the_head():
    assert choose_head("bottleneck")(6, num_classes=3).hidden_features == 512
    assert choose_head("bottleneck", head_features=8)(6, num_classes=3).hidden_features == 8
    head = choose_head("ml_decoder", num_groups=2, decoder_embedding=16)(6, num_classes=3)
    assert (head.num_groups, head.decoder_embedding, head.label_embedding) == (2, 16, None)
    assert choose_head("ml_decoder", label_embedding=5)(6, num_classes=3).label_embedding == 5
    of_ml_decoder = {"num_groups", "decoder_embedding", "label_embedding", "learn_queries"}
    assert HEAD_ARGUMENTS == {"head", "head_features"} | of_ml_decoder
    assert choose_head("ml_decoder", learn_queries=False)(6, num_classes=3).learn_queries is False
    assert choose_head("linear", learn_queries=False).func is LinearHead  # asks for nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"head": "attention"},
            "TResNet needs head to be one of 'linear', 'bottleneck', 'ml_decoder', 'query2label', got 'attention'",
        ),
        ({"head": "linear", "num_groups": 5}, "needs head='ml_decoder' for num_groups=5, got head='linear'"),
        (
            {"head": "ml_decoder", "head_features": 5},
            "needs head='bottleneck' or 'query2label' for head_features=5, got",
        ),
        ({"head": "query2label", "decoder_embedding": 6}, "needs decoder_embedding in multiples of 4, .* got 6"),
        ({"head": "bottleneck", "head_features": 0}, "needs head_features to be at least 1 or None, got 0"),
        ({"head": "ml_decoder", "num_groups": -1}, "needs num_groups to be at least 1 or None, got -1"),
        ({"head": "ml_decoder", "decoder_embedding": 7.5}, "needs decoder_embedding to be at least 1 or None, got 7.5"),
        ({"head": "ml_decoder", "num_groups": True}, "needs num_groups to be at least 1 or None, got True"),
        (
            {"head": ["linear"]},
            r"needs head to be one of 'linear', 'bottleneck', 'ml_decoder', 'query2label', got \['l",
        ),
        (
            {"head": "ml_decoder", "num_groups": 3, "label_embedding": 5},
            "needs num_groups or label_embedding, not both, got 3 and 5",
        ),
        (
            {"head": "ml_decoder", "learn_queries": True, "label_embedding": 5},
            "needs learn_queries or label_embedding, not both, got True and 5",
        ),
        (
            {"head": "linear", "learn_queries": True},
            "needs head='ml_decoder' for learn_queries=True, got head='linear'",
        ),
        ({"head": "ml_decoder", "learn_queries": 3}, "needs learn_queries to be True or False, got 3"),
    ],
    ids=[
        "name",
        "group",
        "bottleneck",
        "query2label",
        "zero",
        "negative",
        "fraction",
        "bool",
        "list",
        "groups_and_labels",
        "learnt_labels",
        "learnt_linear",
        "no_flag",
    ],
)
def test_options_that_fit_no_head_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TResNet(layers=LAYERS, **options)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_works_with_and_without_classes_and_pooling(head):
    model = TResNet(layers=LAYERS, width_factor=0.125, num_classes=7, head=head).eval()
    x = torch.rand(2, 3, 64, 96)
    features = model.forward_features(x)
    with torch.no_grad():
        for num_classes, pool, shape in (
            (0, None, (2, model.head_hidden_size)),
            (0, "", (2, 256, 2, 3)),
            (5, None, (2, 5) if head in TRANSFORMERS else (2, 5, 2, 3)),
            (5, "avg", (2, 5)),
            (3, "", (2, 3) if head in TRANSFORMERS else (2, 3, 2, 3)),
        ):
            model.reset_classifier(num_classes, pool)
            assert model(x).shape == shape
            assert model.forward_head(features, pre_logits=True).shape[1] == model.head_hidden_size
            if num_classes:
                classifier = model.get_classifier()
                assert classifier.bias.shape == (num_classes,)
                assert classifier.weight.requires_grad
            else:
                torch.testing.assert_close(model(x), model.forward_head(features, pre_logits=True))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((3, "foo"), "needs global_pool to be a pooling of timm, .*got 'foo'"),
        ((3, 1), "needs global_pool to be a pooling of timm, .*got 1"),
        ((-1,), "needs num_classes to be an integer of at least 0, got -1"),
        ((2.5,), "needs num_classes to be an integer of at least 0, got 2.5"),
        ((True,), "needs num_classes to be an integer of at least 0, got True"),
    ],
    ids=["pooling", "no_text", "negative", "fraction", "bool"],
)
def test_a_classifier_that_cannot_be_changes_nothing(head, given, message):
    model = TResNet(layers=LAYERS, width_factor=0.125, num_classes=7, head=head).eval()
    x = torch.rand(1, 3, 64, 64)
    expected = model(x)
    with pytest.raises(ValueError, match=message):
        model.reset_classifier(*given)
    assert model.num_classes == 7
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=message):
        TResNet(layers=LAYERS, head=head, num_classes=given[0], global_pool=(*given, "avg")[1])


@pytest.mark.parametrize("head", ["linear", "bottleneck"])
def test_without_pooling_each_pixel_has_the_logits_of_its_own_features(head):
    model = TResNet(layers=LAYERS, width_factor=0.125, num_classes=5, head=head).eval()
    features = torch.rand(2, 256, 3, 2)
    pooled = model.forward_head(features[:, :, 1:2, 1:2])
    model.head.global_pool = type(model.head.global_pool)(pool_type="")
    torch.testing.assert_close(model.forward_head(features)[:, :, 1, 1], pooled)


BODY = {"layers": LAYERS, "width_factor": 0.125, "num_classes": 5}


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"head": "linear"}, LinearHead),
        ({"head": "bottleneck"}, BottleneckHead),
        ({"label_embedding": 6}, MLDecoderHead),
        ({"num_groups": 3}, MLDecoderHead),
    ],
    ids=["linear", "bottleneck", "labels", "groups"],
)
def test_options_of_a_tag_do_not_prevent_another_head(options, kind):
    model = timm.create_model("tresnet_m.ml_decoder_openimages", **options, **BODY)
    assert type(model.head) is kind
    assert getattr(model.head, "label_embedding", None) == options.get("label_embedding")
    with pytest.raises(ValueError, match="needs head='ml_decoder' for num_groups=3, got head='linear'"):
        timm.create_model("tresnet_m.ml_decoder_openimages", head="linear", num_groups=3, **BODY)


SAVED = {
    "linear": {"head": "linear"},
    "bottleneck": {"head": "bottleneck", "head_features": 24},
    "groups": {"head": "ml_decoder", "decoder_embedding": 16, "num_groups": 3},
    "labels": {"head": "ml_decoder", "decoder_embedding": 16, "label_embedding": 6},
}
CHOSEN = {
    **SAVED,
    "wider": {"head": "bottleneck", "head_features": 32},
    "wider_decoder": {"head": "ml_decoder", "decoder_embedding": 32},
    "other_groups": {"head": "ml_decoder", "num_groups": 2},
}


@pytest.mark.skipif(
    Version(timm.__version__) < Version("1.0.31"), reason="timm before 1.0.31 hides from networks what weights they get"
)
@pytest.mark.parametrize(
    "num_classes", [5, pytest.param(4, marks=pytest.mark.thorough)], ids=["same_classes", "other_classes"]
)
@pytest.mark.parametrize(
    "saved", [pytest.param(name, marks=[] if name in ("linear", "groups") else pytest.mark.thorough) for name in SAVED]
)
def test_another_head_is_new_and_the_body_is_that_of_the_weights(saved, num_classes, tmp_path, caplog):
    source = timm.create_model("test_tresnet", num_classes=5, **SAVED[saved])
    timm.models.save_for_hf(source, tmp_path / "a", safe_serialization=True, model_args=SAVED[saved])
    x = torch.rand(1, 3, 64, 64)
    features = source.eval().forward_features(x)
    for name, options in CHOSEN.items():
        if (saved, name) == ("labels", "other_groups") or (saved, name) == ("labels", "groups"):
            continue  # asks for groups and labels, which is refused
        caplog.clear()
        with caplog.at_level(logging.INFO, "timm_tresnet"):
            model = timm.create_model(
                f"local-dir:{tmp_path / 'a'}", pretrained=True, num_classes=num_classes, **options
            )
        torch.testing.assert_close(model.eval().forward_features(x), features, rtol=0, atol=0)
        assert model(x).shape == (1, num_classes)
        assert ("The head differs from the checkpoint's head" in caplog.text) == (name != saved)
        # What timm then writes down can be loaded again, though it still names the options of the first head.
        timm.models.save_for_hf(model, tmp_path / name, safe_serialization=True)
        again = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_other_groups_keep_the_decoder_of_the_weights(tmp_path):
    source = timm.create_model("test_tresnet", num_classes=5, **SAVED["groups"])
    timm.models.save_for_hf(source, tmp_path, safe_serialization=True, model_args=SAVED["groups"])
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_groups=2)
    torch.testing.assert_close(model.head.decoder.state_dict(), source.head.decoder.state_dict(), rtol=0, atol=0)
    assert model.head.queries.vectors.shape == (2, 16)


def test_misfitting_head_is_an_error_unless_another_one_was_chosen(tmp_path):
    source = timm.create_model("test_tresnet", num_classes=5, **SAVED["bottleneck"])
    timm.models.save_for_hf(source, tmp_path, safe_serialization=True, model_args={"head": "linear"})
    with pytest.raises(RuntimeError, match="head.embedding.weight"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, head="linear")

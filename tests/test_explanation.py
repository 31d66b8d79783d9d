import dataclasses
import re

import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms import functional as vision

from timm_tresnet.utils.images import SAMPLES, read_image
from timm_tresnet.weights.labels import make_notes

pytest.importorskip("captum", reason="needs pip install '.[demo]'")
from timm_tresnet.demo.explanation import explain_image  # noqa: E402


def grad_cam(model, layer, x, index):
    """Equations 1 and 2 of arXiv:1610.02391, by autograd."""
    maps = []
    hook = layer.register_forward_hook(lambda module, inputs, output: maps.append(output))
    logit = model(x)[0, index]
    hook.remove()
    (gradient,) = torch.autograd.grad(logit, maps)
    return (gradient.mean((2, 3), keepdim=True) * maps[0]).sum(1).relu()[0].detach()


def test_labels_are_the_most_probable_ones_of_the_network(embedded):
    photographs = sorted(SAMPLES.glob("*.jpg"))
    assert photographs
    for path in photographs:
        image = read_image(path)
        explanation = explain_image(embedded, image, count=4)
        transform = timm.data.create_transform(**timm.data.resolve_data_config(model=embedded))
        with torch.no_grad():
            values, indices = embedded(transform(image)[None]).softmax(-1)[0].topk(4)
        names = [embedded.pretrained_cfg["label_names"][index] for index in indices]
        assert list(explanation.probabilities) == names
        assert names[0] == path.stem
        assert list(explanation.probabilities.values()) == pytest.approx(values.tolist(), abs=1e-6)
        assert explanation.classify_ms > 0
        assert explanation.explain_ms > 0


def test_colours_are_where_grad_cam_is_large_and_leave_the_rest_of_the_photograph(embedded):
    image = read_image(SAMPLES / "cat.jpg")
    explanation = explain_image(embedded, image)
    config = timm.data.resolve_data_config(model=embedded)
    x = timm.data.create_transform(**config)(image)[None]
    heat = grad_cam(embedded, embedded.body.layer3, x, 3)
    assert explanation.cells == heat.shape == (4, 4)
    shown = timm.data.create_transform(**{**config, "input_size": (3, 320, 320)})(image)
    coloured = torch.tensor(list(explanation.heat_map.tobytes())).view(320, 320, 3).permute(2, 0, 1) / 255
    change = (coloured - shown).abs().mean(0)
    cells = change.unflatten(1, (4, 80)).unflatten(0, (4, 80)).mean((1, 3))
    assert torch.corrcoef(torch.stack([cells.flatten(), heat.flatten()]))[0, 1] > 0.9
    assert change.min() < 1 / 255


@pytest.mark.parametrize(("pixels", "cells"), [(32, (4, 4)), (64, (4, 4)), (96, (6, 6)), (128, (4, 4)), (224, (7, 7))])
def test_map_is_of_the_last_stage_that_has_enough_cells(pixels, cells):
    model = timm.create_model("test_tresnet", pretrained_cfg_overlay={"input_size": (3, pixels, pixels)}).eval()
    explanation = explain_image(model, Image.new("RGB", (300, 200), "green"))
    assert explanation.cells == cells
    assert min(explanation.heat_map.size) >= 320


def test_tags_are_sigmoids_and_a_map_without_evidence_is_the_photograph():
    model = timm.create_model("test_tresnet", num_classes=3, pretrained_cfg_overlay={"notes": ("multi-label",)}).eval()
    torch.nn.init.zeros_(model.head.fc.weight)
    model.head.fc.bias.data = torch.tensor([1.0, 3.0, 2.0])
    image = Image.new("RGB", (64, 64), (10, 20, 30))
    explanation = explain_image(model, image)
    assert list(explanation.probabilities) == ["class 1", "class 2", "class 0"]
    expected = torch.tensor([3.0, 2.0, 1.0]).sigmoid().tolist()
    assert list(explanation.probabilities.values()) == pytest.approx(expected)
    assert explanation.heat_map.getextrema() == ((10, 10), (20, 20), (30, 30))


def test_a_photograph_whose_ratio_is_kept_is_seen_and_shown_whole(embedded):
    image = read_image(SAMPLES / "cat.jpg").resize((300, 200))
    explanation = explain_image(embedded, image, count=10, keep_ratio=True)
    config = timm.data.resolve_data_config(model=embedded)
    x = vision.normalize(
        vision.to_tensor(image.resize((96, 64), Image.Resampling.BILINEAR)), config["mean"], config["std"]
    )
    with torch.no_grad():
        expected = embedded(x[None]).softmax(-1)[0]
    assert list(explanation.probabilities.values()) == pytest.approx(
        expected.sort(descending=True).values.tolist(), abs=1e-5
    )
    assert explanation.cells == (4, 6)
    assert explanation.heat_map.size == (480, 320)
    odd = explain_image(embedded, image.resize((203, 150)), keep_ratio=True)  # 64 x 86.6, of which 84 are seen
    assert odd.heat_map.size == (420, 320)
    with pytest.raises(ValueError, match="one side is over 8 times the other"):
        explain_image(embedded, image.resize((300, 30)), keep_ratio=True)


def make_tagger(biases, thresholds=None):
    names = tuple(f"<b>{index}" for index in range(len(biases)))
    notes = make_notes(True, thresholds)
    overlay = {"notes": notes, "label_names": names, "num_classes": len(biases)}
    model = timm.create_model("test_tresnet", num_classes=len(biases), pretrained_cfg_overlay=overlay).eval()
    torch.nn.init.zeros_(model.head.fc.weight)
    model.head.fc.bias.data = torch.tensor(biases)
    return model


IMAGE = Image.new("RGB", (64, 64), (10, 20, 30))


def test_all_tags_that_reach_their_thresholds_come_first_and_some_that_do_not():
    biases = [*(-3.0 + index / 10 for index in range(20)), *(1.0 + index / 10 for index in range(9)), 4.0]
    explanation = explain_image(make_tagger(biases, [0.5] * 29 + [0.99]), IMAGE, count=5)
    found = [f"<b>{index}" for index in range(28, 19, -1)]
    assert list(explanation.tags) == found
    assert list(explanation.probabilities) == [*found, "<b>29", *(f"<b>{index}" for index in range(19, 15, -1))]
    assert explanation.thresholds["<b>29"] == 0.99
    one = explain_image(make_tagger(biases, 0.75), IMAGE, count=2)
    assert list(one.tags) == ["<b>29", *(f"<b>{index}" for index in range(28, 20, -1))]


def test_tags_are_chips_and_classes_are_bars(embedded):
    page = pytest.importorskip("timm_tresnet.demo.page", reason="needs pip install '.[demo]'")
    drawn = page._draw_labels(explain_image(make_tagger([0.0, 2.0, -2.0]), IMAGE))
    above, below = drawn.split("Below their thresholds:")
    chips = [re.sub("<[^<]*>", "", chip) for chip in above.split("</span>")[:-1]]
    assert chips == ["&lt;b&gt;1 88%", "&lt;b&gt;0 50%"]  # escaped
    assert re.sub("<[^<]*>", "", below) == "&lt;b&gt;2 12%"
    none = page._draw_labels(explain_image(make_tagger([-1.0, -2.0]), IMAGE))
    assert "No tag reaches its threshold. The most probable tags:" in none
    assert none.index("&lt;b&gt;0") < none.index("&lt;b&gt;1")
    every = page._draw_labels(explain_image(make_tagger([1.0, 2.0]), IMAGE))
    assert "threshold" not in every
    bars = page._draw_labels(explain_image(embedded, read_image(SAMPLES / "cat.jpg")))
    assert "<span>cat</span><span>97%</span>" in bars
    assert "threshold" not in bars


def test_explaining_leaves_the_network_as_it_was(embedded):
    before = {name: tensor.clone() for name, tensor in embedded.state_dict().items()}
    image = read_image(SAMPLES / "horse.jpg")
    first, second = (dataclasses.replace(explain_image(embedded, image), classify_ms=0, explain_ms=0) for _ in "ab")
    assert first == second
    assert all(torch.equal(before[name], tensor) for name, tensor in embedded.state_dict().items())
    assert all(parameter.grad is None for parameter in embedded.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in embedded.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 0}, "needs a network with classes for RGB images, got 0 classes and 3 channels"),
        ({"in_chans": 4}, "got 10 classes and 4 channels"),
    ],
    ids=["backbone", "channels"],
)
def test_networks_that_cannot_be_explained_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        explain_image(
            timm.create_model("test_tresnet", **{"num_classes": 10, **change}).eval(), Image.new("RGB", (9, 9))
        )


def test_logits_that_are_not_finite_are_refused():
    model = timm.create_model("test_tresnet").eval()
    model.head.fc.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="logits for this photograph are not finite"):
        explain_image(model, Image.new("RGB", (64, 64)))

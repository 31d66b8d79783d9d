import json
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from timm_tresnet import cli
from timm_tresnet.commands import classify
from timm_tresnet.images import SAMPLES

CIFAR10 = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos" / "naïve folder"
    folder.mkdir(parents=True)
    shutil.copy(SAMPLES / "cat.jpg", folder / "ä cat.jpg")
    Image.open(SAMPLES / "rocket.jpg").convert("L").save(folder / "grey.png")
    Image.new("RGBA", (20, 30), (250, 0, 0, 99)).save(folder / "transparent.png")
    (folder / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


def test_classify_without_arguments_shows_the_samples_and_how_to_go_on(capsys):
    assert cli.main(["classify"]) == 0
    output = capsys.readouterr().out
    assert output.count(".jpg") == len(list(SAMPLES.glob("*.jpg"))) >= 3
    assert "--model tresnet_m.miil_in21k_ft_in1k" in output


def test_classify_reads_files_and_folders_in_any_mode(photos, capsys):
    assert cli.main(["classify", "--json", "--top-k", "4", str(photos), str(SAMPLES / "coffee.jpg")]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [Path(result["image"]).name for result in results] == [
        "grey.png",
        "transparent.png",
        "ä cat.jpg",
        "coffee.jpg",
    ]
    for result in results:
        probabilities = [entry["probability"] for entry in result["predictions"]]
        assert len(probabilities) == 4
        assert probabilities == sorted(probabilities, reverse=True)
        assert {entry["label"] for entry in result["predictions"]} <= CIFAR10


def test_classify_uses_the_preprocessing_of_the_weights(capsys):
    cli.main(["classify", "--json", str(SAMPLES / "cat.jpg")])
    (result,) = json.loads(capsys.readouterr().out)
    model = timm.create_model("test_tresnet", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    with torch.no_grad():
        probabilities = model(transform(Image.open(SAMPLES / "cat.jpg"))[None]).softmax(-1)[0]
    for entry in result["predictions"]:
        assert entry["probability"] == pytest.approx(probabilities[entry["index"]].item(), abs=1e-6)
    assert result["predictions"][0]["label"] == "cat"


def test_classify_turns_images_as_their_camera_was_held(tmp_path, capsys):
    image = Image.open(SAMPLES / "cat.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn clockwise to view
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "upright.png")
    cli.main(["classify", "--json", str(tmp_path)])
    turned, upright = json.loads(capsys.readouterr().out)
    assert turned["predictions"] == upright["predictions"]


def test_unreadable_images_are_reported_and_skipped(photos, capsys):
    broken = photos / "broken.jpg"
    broken.write_bytes((SAMPLES / "cat.jpg").read_bytes()[:2000])
    (photos / "empty.png").touch()
    assert cli.main(["classify", str(photos), str(photos / "missing.jpg")]) == 1
    captured = capsys.readouterr()
    for name in ("broken.jpg", "empty.png", "missing.jpg"):
        assert f"{name}:" in captured.err
        assert name not in captured.out
    assert captured.out.count("%") == 9  # three images, three classes each


def test_nothing_to_classify_is_a_mistake_that_is_named(tmp_path, capsys):
    assert cli.main(["classify", str(tmp_path)]) == 2
    assert f"no images in {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tresnet_q", "Unknown model"),
        ("tresnet_s", "No pretrained weights exist"),
        ("local-dir:nowhere", "nowhere"),
        ("test_tresnet.nonsense", "Invalid pretrained tag"),
    ],
)
def test_models_that_cannot_be_loaded_are_named(model, message, capsys):
    assert cli.main(["classify", "--model", model]) == 2
    error = capsys.readouterr().err
    assert f"cannot load the model {model}" in error
    assert message in error


def test_corrupted_weights_are_an_error_without_a_traceback(tmp_path, capsys):
    timm.models.save_for_hf(timm.create_model("test_tresnet"), tmp_path, safe_serialization=True)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    assert cli.main(["classify", "--model", f"local-dir:{tmp_path}"]) == 2
    assert "cannot load the model" in capsys.readouterr().err


def test_many_images_show_progress_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["classify", *[str(SAMPLES / "cat.jpg")] * 40]) == 0
    assert "32/40 images" in capsys.readouterr().err
    assert cli.main(["classify", str(SAMPLES / "cat.jpg")]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("top_k", ["0", "many"])
def test_top_k_must_be_a_positive_number(top_k, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["classify", "--top-k", top_k])
    assert "--top-k" in capsys.readouterr().err


@pytest.fixture
def tagger(tmp_path):
    """A folder with a model whose images have any number of five labels; its logits do not depend on the image."""
    model = timm.create_model("test_tresnet", num_classes=5, pretrained_cfg_overlay={"notes": ("multi-label",)})
    torch.nn.init.zeros_(model.head.fc.weight)
    model.head.fc.bias.data = torch.tensor([3.0, -3.0, 0.5, -0.5, 6.0])
    labels = {"label_names": ["sky", "sea", "boat", "bird", "sand"]}
    timm.models.save_for_hf(model, tmp_path / "tagger", safe_serialization=True, model_config=labels)
    return f"local-dir:{tmp_path / 'tagger'}"


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ([], ["sand", "sky", "boat"]),
        (["--threshold", "0.9"], ["sand", "sky"]),
        (["--threshold", "0", "--top-k", "1"], ["sand", "sky", "boat", "bird", "sea"]),
        (["--threshold", "1"], []),
    ],
    ids=["default", "high", "all", "none"],
)
def test_classify_prints_every_label_above_the_threshold(options, labels, tagger, capsys):
    assert cli.main(["classify", "--json", "--model", tagger, *options, str(SAMPLES / "cat.jpg")]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert [entry["label"] for entry in result["predictions"]] == labels
    for entry in result["predictions"]:
        logit = {"sky": 3.0, "sea": -3.0, "boat": 0.5, "bird": -0.5, "sand": 6.0}[entry["label"]]
        assert entry["probability"] == pytest.approx(torch.tensor(logit).sigmoid().item())
    assert cli.main(["classify", "--model", tagger, *options, *[str(SAMPLES / "cat.jpg")] * 2]) == 0
    assert capsys.readouterr().out.count("%") == 2 * len(labels)


def test_images_with_different_numbers_of_labels_make_a_table(capsys):
    classify._print_predictions(
        [
            {"image": "a.jpg", "predictions": []},
            {"image": "b.jpg", "predictions": [{"label": "cat", "index": 1, "probability": 0.75}]},
        ]
    )
    assert capsys.readouterr().out == "a.jpg\nb.jpg  cat 75.0%\n"


@pytest.mark.parametrize("threshold", ["1.5", "-1", "half"])
def test_threshold_must_be_a_probability(threshold, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["classify", f"--threshold={threshold}"])
    assert "--threshold" in capsys.readouterr().err


def test_a_backbone_classifies_nothing(tmp_path, capsys):
    model = timm.create_model("test_tresnet", num_classes=0)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert cli.main(["classify", "--model", f"local-dir:{tmp_path}"]) == 2
    assert "is a backbone without classes" in capsys.readouterr().err

import csv
import io
import json
import os
import re
import shutil
import signal
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from killing import run_killed
from packaging.version import Version
from PIL import Image

from timm_tresnet.cli import main as cli
from timm_tresnet.cli.commands import classify
from timm_tresnet.cli.results import Results, print_predictions
from timm_tresnet.utils.images import SAMPLES
from timm_tresnet.weights.labels import make_notes

CIFAR10 = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos" / "naïve folder"
    folder.mkdir(parents=True)
    shutil.copy(SAMPLES / "cat.jpg", folder / "ä cat.jpg")
    Image.open(SAMPLES / "horse.jpg").convert("L").save(folder / "grey.png")
    Image.new("RGBA", (20, 30), (250, 0, 0, 99)).save(folder / "transparent.png")
    (folder / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


@pytest.fixture
def one_thread():
    """As in tests' other processes: a fork has lost the other threads, and their number changes the last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_classify_without_arguments_says_what_it_shows_the_samples_and_how_to_go_on(capsys):
    assert cli.main(["classify"]) == 0
    first, _, *table = capsys.readouterr().out.splitlines()
    count = len(list(SAMPLES.glob("*.jpg")))
    assert first.startswith(
        f"The {count} photographs in the package, by test_tresnet, which knows 10 classes: airplane, "
    )
    assert [".jpg" in line for line in table[: count + 1]] == [True] * count + [False]
    assert "--model tresnet_m.miil_in21k_ft_in1k" in table[-1]


def test_embedded_model_recognises_its_samples(capsys):
    assert cli.main(["classify", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert len(results) >= 4
    for result in results:
        assert result["predictions"][0]["label"] == Path(result["image"]).stem
        assert result["predictions"][0]["probability"] > 0.8


def test_terminal_shows_aligned_bars_as_long_as_the_probabilities(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(["classify", "--top-k", "2"]) == 0
    _, _, *lines = capsys.readouterr().out.splitlines()
    rows = [re.fullmatch(r"(\S*) +([\d.]+)%  ([█▏▎▍▌▋▊▉]+) +(\w+)", line) for line in lines[: lines.index("")]]
    assert [row[1] for row in rows] == [name for path in sorted(SAMPLES.glob("*.jpg")) for name in (path.name, "")]
    assert len({(row.end(2), row.start(3), row.start(4)) for row in rows}) == 1
    for row in rows:
        length = row[3].count("█") + (row[3][-1] != "█") * " ▏▎▍▌▋▊▉".find(row[3][-1]) / 8
        assert length == pytest.approx(20 * float(row[2]) / 100, abs=1 / 7)


def test_terminal_shows_files_as_they_were_named_and_says_where_nothing_is_probable(tagger, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    photo = str(SAMPLES / "cat.jpg")
    assert cli.main(["classify", "--model", tagger, "--threshold", "1", photo]) == 0
    assert re.fullmatch(rf"{photo} +nothing probable enough\n", capsys.readouterr().out)


def test_another_model_shows_the_samples_too_and_json_nothing_else(tagger, capsys):
    assert cli.main(["classify", "--model", tagger]) == 0
    output = capsys.readouterr().out
    assert f"by {tagger}, which knows 5 classes: sky, sea, boat, bird, sand." in output
    assert output.count("sand 99.8%") == len(list(SAMPLES.glob("*.jpg")))
    assert cli.main(["classify", "--model", tagger, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(list(SAMPLES.glob("*.jpg")))


def test_classify_reads_files_and_folders_in_any_mode(photos, capsys):
    assert cli.main(["classify", "--json", "--top-k", "4", str(photos), str(SAMPLES / "deer.jpg")]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [Path(result["image"]).name for result in results] == [
        "grey.png",
        "transparent.png",
        "ä cat.jpg",
        "deer.jpg",
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


def test_whatever_else_is_in_the_folder_the_good_images_are_classified(photos, capfd):
    strange = os.fsdecode(b"strange\xff\x1b.jpg")
    shutil.copy(SAMPLES / "cat.jpg", photos / strange)
    bad = {"pipe.jpg": os.mkfifo, "loop.jpg": lambda path: path.symlink_to(path), "noise.gif": Path.touch}
    bad |= {"pixmap.png": lambda path: Image.new("L", (9, 9)).save(path, "PPM")}
    bad |= {"bad\udcff.bmp": lambda path: path.write_bytes(bytes(100))}
    for name, make in bad.items():
        make(photos / name)
    (photos / "sub").symlink_to(photos)
    assert cli.main(["classify", "--json", str(photos)]) == 1
    output, error = capfd.readouterr()
    results = json.loads(output)
    done = {Path(result["image"]).name for result in results if "predictions" in result}
    assert done == {"ä cat.jpg", "grey.png", "transparent.png", "strange\\xff\\x1b.jpg"}
    assert {Path(result["image"]).name for result in results if "error" in result} == {
        name.replace("\udcff", "\\xff") for name in bad
    }
    assert len(error.splitlines()) == len(bad)
    assert cli.main(["classify", str(photos)]) == 1
    output, error = capfd.readouterr()
    assert output.count("%") == 3 * len(done)
    assert "\x1b" not in output
    assert len(error.splitlines()) == len(bad)


def test_a_file_that_vanishes_meanwhile_is_reported(photos, monkeypatch, capsys):
    found = [*classify.find_images([photos]), photos / "gone.jpg"]
    monkeypatch.setattr(classify, "find_images", lambda paths: found)
    assert cli.main(["classify", str(photos)]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("%") == 9
    assert "gone.jpg: there is no " in captured.err


def test_names_are_printed_to_a_terminal_that_cannot_show_them(photos, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert cli.main(["classify", str(photos)]) == 0
    terminal.flush()
    printed = terminal.buffer.getvalue().decode("ascii")
    assert printed.count("%") == 9
    assert "\\xe4 cat.jpg" in printed


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error_that_names_the_image(value, tmp_path, capsys):
    model = timm.create_model("test_tresnet", num_classes=5)
    model.head.fc.bias.data[2] = value
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert cli.main(["classify", "--model", f"local-dir:{tmp_path}", str(SAMPLES / "cat.jpg")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    names, skipped = captured.err.splitlines()
    kept = Version(timm.__version__) < Version("1.0.31")  # names of the ten classes that the network had
    fault = "the weights' config has 10 names for 5 classes; " if kept else ""
    assert names == f"timm-tresnet: class names: {fault}no names are known, classes are numbered"
    assert skipped == f"timm-tresnet: skipped {SAMPLES / 'cat.jpg'}: the network's logits for this image are not finite"


def test_networks_for_grey_images_classify_measure_and_export(tmp_path, capsys):
    """As validate.py does: images in Pillow's mode L."""
    overlay = {"mean": (0.1, 0.2, 0.6), "std": (0.2, 0.3, 0.4)}  # whose averages are taken, as by timm's loaders
    model = timm.create_model("test_tresnet", pretrained=True, in_chans=1, pretrained_cfg_overlay=overlay).eval()
    name, folder = f"local-dir:{tmp_path / 'grey'}", tmp_path / "images"
    names = {"label_names": [f"label {index}" for index in range(10)]}
    arguments = {"model_args": {"in_chans": 1}, "model_config": names}
    timm.models.save_for_hf(model, tmp_path / "grey", safe_serialization=True, **arguments)
    for index, path in enumerate(sorted(SAMPLES.glob("*.jpg"))):
        (folder / f"label {index}").mkdir(parents=True)
        shutil.copy(path, folder / f"label {index}")
    data = timm.data.create_dataset("", root=str(folder), input_img_mode="L")
    config = timm.data.resolve_data_config({"in_chans": 1}, model=model)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # timm leaves files open
        loader = timm.data.create_loader(
            data, (1, 64, 64), 8, num_workers=0, persistent_workers=False, device=torch.device("cpu"),
            **{name: value for name, value in config.items() if name != "input_size"},
        )  # fmt: skip
        expected = torch.cat([model(images) for images, _ in loader]).softmax(-1)
    artifact = str(tmp_path / "grey.pt")
    assert cli.main(["export", name, "--format", "torchscript", "--output", artifact]) == 0
    for how in (["--model", name], ["--engine", "torch", artifact, "--trust"]):
        capsys.readouterr()
        assert cli.main(["classify", *how, "--json", "--top-k", "1", "--as-stored", str(folder)]) == 0
        answers = [each["predictions"][0] for each in json.loads(capsys.readouterr().out)]
        assert [answer["index"] for answer in answers] == expected.argmax(-1).tolist()
        assert [answer["probability"] for answer in answers] == pytest.approx(expected.amax(-1).tolist(), abs=1e-4)
    assert cli.main(["validate", "--model", name, "--json", str(tmp_path / "scores.json"), str(folder)]) == 0
    right = sum(index == answer for index, answer in enumerate(expected.argmax(-1).tolist()))
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert scores["top-1"] == pytest.approx(100 * right / len(expected), abs=1e-3)


def test_network_for_other_images_than_rgb_is_refused(tmp_path, capsys):
    model = timm.create_model("test_tresnet", in_chans=4)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True, model_args={"in_chans": 4})
    assert cli.main(["classify", "--model", f"local-dir:{tmp_path}"]) == 2
    assert "takes 4 channels, images are read in 1 or 3" in capsys.readouterr().err


def test_nothing_to_classify_is_a_mistake_that_is_named(tmp_path, capsys):
    assert cli.main(["classify", str(tmp_path)]) == 2
    assert f"no images in {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tresnet_q", "there is no model tresnet_q; did you mean"),
        ("tresnet_s", "No pretrained weights exist"),
        ("local-dir:nowhere", "nowhere"),
        ("test_tresnet.nonsense", "has no weights 'nonsense'"),
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
    """A folder with a multi-label model of five labels; its logits do not depend on the image."""
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


def test_classify_takes_a_threshold_of_its_own_for_each_label_and_artifacts_too(tmp_path, capsys):
    notes = make_notes(True, [0.9, 0.2, 0.6])
    model = timm.create_model("test_tresnet", num_classes=3, pretrained_cfg_overlay={"notes": notes})
    model.head.fc.weight.data.zero_()
    model.head.fc.bias.data = torch.tensor([2.0, -1.0, 0.5])  # 0.88, 0.27, 0.62
    labels = {"label_names": ["sky", "sea", "boat"]}
    timm.models.save_for_hf(model, tmp_path / "tagger", safe_serialization=True, model_config=labels)
    tagger, artifact = f"local-dir:{tmp_path / 'tagger'}", str(tmp_path / "tagger.pt")
    assert cli.main(["export", tagger, "--format", "torchscript", "--output", artifact]) == 0
    capsys.readouterr()
    for source in (["--model", tagger], ["--engine", "torch", artifact, "--trust"]):
        for options, expected in (([], ["boat", "sea"]), (["--threshold", "0.8"], ["sky"])):
            assert cli.main(["classify", "--json", *source, *options, str(SAMPLES / "cat.jpg")]) == 0
            (result,) = json.loads(capsys.readouterr().out)
            assert [entry["label"] for entry in result["predictions"]] == expected
    assert json.loads(Path(f"{artifact}.json").read_text())["label_thresholds"] == [0.9, 0.2, 0.6]


def test_the_mosaic_in_the_package_is_tagged_by_the_network_beside_it(capsys):
    assert cli.main(["classify", "--model", "test_tresnet.mosaic_cifar10"]) == 0
    output = capsys.readouterr().out
    assert output.count(".jpg") == 1
    assert all(f"{name} " in output for name in ("cat", "horse", "airplane", "deer"))
    assert "which knows 10 classes: airplane, " in output


def test_images_with_different_numbers_of_labels_make_a_table(capsys):
    print_predictions(
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


def test_photographs_are_turned_unless_they_are_asked_for_as_stored(tmp_path, capsys):
    from PIL import Image

    orientation = Image.Exif()
    orientation[0x112] = 6
    with Image.open(SAMPLES / "horse.jpg") as image:
        image.save(tmp_path / "marked.png", exif=orientation)
        image.save(tmp_path / "plain.png")
        image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "turned.png")
    answers = {}
    for name, *words in (("marked",), ("marked", "--as-stored"), ("plain",), ("turned",)):
        assert cli.main(["classify", str(tmp_path / f"{name}.png"), "--json", *words]) == 0
        answers[name, *words] = json.loads(capsys.readouterr().out)[0]["predictions"]
    assert answers["marked",] == answers["turned",] != answers["plain",]
    assert answers["marked", "--as-stored"] == answers["plain",]


@pytest.fixture
def collection(tmp_path):
    """A folder of 11 images in subfolders; two are unreadable."""
    folder = tmp_path / "collection"
    for index in range(11):
        (folder / str(index % 3)).mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (40, 48, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / str(index % 3) / f"{index}.png")
    (folder / "1" / "4.png").write_bytes(b"damaged")
    (folder / "2" / "loop.png").symlink_to("loop.png")
    os.link(folder / "0" / "0.png", folder / "0" / "again\x1b.png")
    return folder


def classify_collection(folder, output, *words, status=1):
    options = ["--batch-size", "3", "-j", "0", "--device", "cpu", "--output", str(output)]
    assert cli.main(["classify", str(folder), *options, *words]) == status
    return output


def test_output_has_what_json_prints_and_a_summary_is_printed(collection, tmp_path, capfd):
    assert cli.main(["classify", str(collection), "--json"]) == 1
    expected = json.loads(capfd.readouterr().out)
    path = classify_collection(collection, tmp_path / "tags.jsonl")
    printed, error = capfd.readouterr()
    assert printed == f"{path}: 13 images, 2 with errors\n"
    assert error == ""
    results = [json.loads(line) for line in path.read_text().splitlines()]
    assert [result["image"] for result in results] == [result["image"] for result in expected]
    assert f"{collection}/0/again\\x1b.png" in {result["image"] for result in results}
    for result, usual in zip(results, expected, strict=True):
        assert result.get("error") == usual.get("error")
        found, wanted = (
            {entry["label"]: entry["probability"] for entry in each.get("predictions", [])} for each in (result, usual)
        )
        assert found == pytest.approx(wanted, abs=1e-6)
    note = json.loads((tmp_path / "tags.jsonl.json").read_text())
    assert note["command"].startswith(f"timm-tresnet classify {collection} --batch-size 3")
    with classify_collection(collection, tmp_path / "tags.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, result in zip(rows, results, strict=True):
        assert row["labels"] == ";".join(entry["label"] for entry in result.get("predictions", []))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("killed_at", [2, 4])
def test_a_killed_run_is_gone_on_with_to_the_last_byte(suffix, killed_at, collection, one_thread, tmp_path, capfd):
    expected = classify_collection(collection, tmp_path / f"expected{suffix}").read_bytes()
    write, path = os.write, tmp_path / f"tags{suffix}"

    def be_killed():
        count = 0

        def write_and_die(descriptor, content):
            nonlocal count
            count += 1
            if count == killed_at:
                write(descriptor, content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return write(descriptor, content)

        os.write = write_and_die
        classify_collection(collection, path)

    assert run_killed(be_killed, 10**9)
    assert 0 < len(path.read_bytes()) < len(expected)
    capfd.readouterr()
    assert classify_collection(collection, path, "--resume").read_bytes() == expected
    assert re.search(r": 13 images, \d+ of them new, 2 with errors\n", capfd.readouterr().out)
    assert classify_collection(collection, path, "--resume").read_bytes() == expected
    assert ": 13 images, 0 of them new, 2 with errors\n" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top-k", "4"], "top_k 3, now 4"),
        (["--as-stored"], "as_stored false, now true"),
        (["--fast-jpeg"], "fast_jpeg false, now true"),
        (["--keep-ratio"], "keep_ratio false, now true"),
        (["--amp", "bfloat16"], 'amp null, now "bfloat16"'),
        (["--model", "test_tresnet.mosaic_cifar10"], "weights_sha256"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_other_weights_and_options_do_not_go_on_with_an_output(words, message, collection, tmp_path, capsys):
    path = classify_collection(collection, tmp_path / "tags.jsonl")
    before = path.read_bytes()
    classify_collection(collection, path, "--resume", *words, status=2)
    assert message in capsys.readouterr().err
    assert path.read_bytes() == before


def test_an_output_that_exists_is_not_overwritten(collection, tmp_path, capsys):
    path = classify_collection(collection, tmp_path / "tags.jsonl")
    classify_collection(collection, path, status=2)
    assert "tags.jsonl already exists; continue it with --resume, or name a new file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume"], "--resume needs --output"),
        (["--prefix", "a"], "need --sidecar"),
        (["--output", "tags.json"], "needs to end in one of .jsonl, .csv, .parquet"),
        (["--output", "tags.jsonl", "--json"], "--json is about what is printed"),
        (["--engine", "onnx", "x.onnx", "--amp", "bfloat16"], "are about models, not about --engine"),
        (["--device", "cuda"], "this machine has no cuda; --device "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_that_do_not_go_together_are_named(words, message, collection, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["classify", str(collection), *words]) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["collection"]


def test_output_needs_images_and_other_processes_need_an_output(tmp_path, monkeypatch, capsys):
    assert cli.main(["classify", "--output", str(tmp_path / "tags.jsonl")]) == 2
    assert "--output and --sidecar need IMAGE" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["classify", str(SAMPLES)]) == 2
    assert "several processes need --output or --sidecar" in capsys.readouterr().err


def test_sidecars_are_written_beside_images_and_existing_ones_stay(tagger, collection, capfd):
    (collection / "0" / "3.txt").write_text("precious")
    words = ["classify", str(collection), "--model", tagger, "--sidecar", "-j", "0", "--device", "cpu"]
    assert cli.main([*words, "--prefix", "mine"]) == 1
    printed, error = capfd.readouterr()
    assert printed == "10 text files written beside images\n"
    assert [line.partition(": ")[2].partition(":")[0] for line in error.splitlines()] == [
        f"skipped {collection}/1/4.png",
        f"skipped {collection}/2/loop.png",
    ]
    texts = {path.name: path.read_text() for path in collection.rglob("*.txt")}
    assert len(texts) == 11
    assert texts.pop("3.txt") == "precious"
    assert set(texts.values()) == {"mine, sand, sky, boat\n"}
    assert cli.main([*words, "--overwrite-sidecars"]) == 1
    assert "11 text files written beside images\n" in capfd.readouterr().out
    assert {path.read_text() for path in collection.rglob("*.txt")} == {"sand, sky, boat\n"}


def test_sidecars_stand_beside_an_output_and_are_written_before_its_lines(tagger, collection, tmp_path, capfd):
    path = tmp_path / "tags.jsonl"
    (collection / "1" / "7.txt").write_text("precious")
    classify_collection(collection, path, "--model", tagger, "--sidecar")
    assert capfd.readouterr().out == (
        f"{path}: 13 images, 2 with errors\n10 text files written beside images, 1 were there already\n"
    )
    assert len(list(collection.rglob("*.txt"))) == 11


@pytest.mark.parametrize("words", [["--output", "tags.jsonl"], ["--sidecar"], []], ids=["output", "sidecar", "printed"])
def test_ctrl_c_keeps_finished_results_and_says_how_to_resume(words, collection, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    counted = []

    def interrupt(*arguments):
        counted.append(arguments)
        if len(counted) == 3:
            raise KeyboardInterrupt
        return keep(*arguments)

    keep = Results.add
    monkeypatch.setattr(Results, "add", interrupt)
    command = ["classify", "collection", "--batch-size", "3", "-j", "0", "--device", "cpu", *words]
    if not words:
        assert cli.main(command) == 130
        assert capsys.readouterr() == ("", "timm-tresnet: interrupted\n")
        return
    assert cli.main(command) == 130
    assert "interrupted; the same command goes on, with --resume if it has --output" in capsys.readouterr().err
    monkeypatch.setattr(Results, "add", keep)
    assert cli.main([*command, *(["--resume"] if "--output" in words else [])]) == 1
    if "--output" in words:
        assert len((tmp_path / "tags.jsonl").read_text().splitlines()) == 13
    else:
        assert len(list(collection.rglob("*.txt"))) == 11


def run_process(folder):
    """One of two processes that share files."""
    torch.set_num_threads(1)
    words = ["--batch-size", "3", "-j", "0", "--device", "cpu"]
    images = [str(SAMPLES), str(SAMPLES / "gone.jpg")]
    words += ["--output", str(Path(folder) / "tags.jsonl")]
    assert cli.main(["classify", *images, *words]) == 1
    assert cli.main(["classify", *images, str(SAMPLES / "cat.jpg"), *words, "--resume"]) == 1
    words[-1] = str(Path(folder) / "few.csv")
    assert cli.main(["classify", str(SAMPLES / "cat.jpg"), *words]) == 0


def test_two_processes_share_the_files_and_leave_one_output(run_two_processes, one_thread, tmp_path):
    folder = run_two_processes("test_commands_classify")
    alone = tmp_path / "alone.jsonl"
    images, words = [str(SAMPLES), str(SAMPLES / "gone.jpg")], ["--batch-size", "3", "--device", "cpu", "-j", "0"]
    assert cli.main(["classify", *images, *words, "--output", str(alone)]) == 1
    assert cli.main(["classify", *images, str(SAMPLES / "cat.jpg"), *words, "--output", str(alone), "--resume"]) == 1
    assert (folder / "tags.jsonl").read_bytes() == alone.read_bytes()
    assert len((folder / "few.csv").read_text().splitlines()) == 2
    assert {path.name for path in folder.iterdir()} >= {"tags.jsonl", "tags.jsonl.json", "few.csv", "few.csv.json"}
    assert not list(folder.glob("*-of-*"))


def test_the_bar_shows_speed_and_the_rest_of_a_resumed_run(collection, tmp_path, monkeypatch, capsys):
    path = classify_collection(collection, tmp_path / "tags.jsonl")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:7]))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    capsys.readouterr()
    classify_collection(collection, path, "--resume")
    error = capsys.readouterr().err
    assert "6/6 images, " in error
    assert " images/s, 00:00 left" in error


def test_a_sidecar_that_cannot_be_written_ends_the_command_before_its_line(collection, tmp_path, capsys):
    (collection / "1" / ".1.txt.partial").mkdir()
    path = classify_collection(collection, tmp_path / "tags.jsonl", "--sidecar", status=2)
    assert ".1.txt.partial" in capsys.readouterr().err
    assert len(path.read_text().splitlines()) == 3  # a batch
    (collection / "1" / ".1.txt.partial").rmdir()
    classify_collection(collection, path, "--sidecar", "--resume")
    assert len(path.read_text().splitlines()) == 13
    assert len(list(collection.rglob("*.txt"))) == 11


def test_fast_jpeg_says_what_it_changes(capsys):
    assert cli.main(["classify", "--fast-jpeg", str(SAMPLES / "cat.jpg")]) == 0
    assert "--fast-jpeg: large JPEG files are decoded at a half to an eighth of their size" in capsys.readouterr().err

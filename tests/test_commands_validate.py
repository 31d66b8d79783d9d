import copy
import csv
import importlib.util
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
import reference
import timm
import torch
from exporting import ENGINES, SUFFIXES, few_formats
from PIL import Image
from tagged import LABELS, SMALL, write_images
from timm.models import save_for_hf
from torchvision.transforms import functional as vision

from timm_tresnet import ExportedModel, export_model
from timm_tresnet.cli import main as cli
from timm_tresnet.tagging import validation
from timm_tresnet.tagging.annotations import read_annotations
from timm_tresnet.utils.images import SAMPLES, read_image
from timm_tresnet.weights.catalogue import load_catalogue
from timm_tresnet.weights.labels import label_lookup, make_notes

THRESHOLDS = [0.4, 0.5, 0.6]
DOCS = Path(__file__).parents[1] / "docs" / "taggers.md"


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    """A folder with a tagger of the labels of `tagged`, in another order, and a network made of it."""
    torch.manual_seed(0)
    network = timm.create_model("test_tresnet", num_classes=3, **SMALL)
    for module in network.modules():  # else outputs hardly depend on the image
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    torch.nn.init.normal_(network.head.fc.weight, std=2)
    network.pretrained_cfg |= {"notes": make_notes(True, THRESHOLDS), "input_size": (3, 32, 32)}
    folder = tmp_path_factory.mktemp("tagger")
    save_for_hf(
        network, folder, model_config={"label_names": list(LABELS[::-1])}, model_args=SMALL, safe_serialization=True
    )
    return f"local-dir:{folder}", timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", 40)


def run(*words, status=0):
    assert cli.main(["validate", *map(str, words), "-j", "0", "--device", "cpu"]) == status


def run_directly(network, annotations):
    """Probabilities and targets, image by image."""
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=network))
    names = list(map(label_lookup(network), range(network.num_classes)))
    examples = read_annotations(annotations).examples
    with torch.inference_mode():
        rows = [network(transform(read_image(example.path))[None])[0] for example in examples]
    targets = torch.tensor([[int(name in example.labels) for name in names] for example in examples])
    return torch.stack(rows).sigmoid(), targets


def test_figures_of_a_tagger_are_those_of_scikit_learn(tagger, images, tmp_path, capsys):
    metrics = pytest.importorskip("sklearn.metrics", reason="install scikit-learn to compare with it")
    run("--model", tagger[0], images, "--batch-size", "7", "--json", tmp_path / "x.json", "--csv", tmp_path / "x.csv")
    found = json.loads((tmp_path / "x.json").read_text())
    probabilities, targets = run_directly(tagger[1], images)
    values = metrics.average_precision_score(targets.numpy(), probabilities.numpy(), average=None)
    assert found["scores"]["mAP"] == pytest.approx(100 * values.mean(), abs=1e-6)
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["label"] for row in rows] == list(LABELS[::-1])
    assert [float(row["average_precision"]) for row in rows] == pytest.approx(values, abs=1e-6)
    assert [int(row["images"]) for row in rows] == targets.sum(0).tolist()
    top = probabilities.argsort(descending=True)[:, :3] >= 0
    for way, chosen in (
        ("probability >= 0.5", probabilities >= 0.5),
        ("own thresholds", probabilities >= torch.tensor(THRESHOLDS)),
        ("top 3", top),
    ):
        for letter, average in (("C", "macro"), ("O", "micro")):
            precision, recall, *_ = metrics.precision_recall_fscore_support(
                targets.numpy(), chosen.numpy(), average=average, zero_division=0
            )
            expected = [100 * precision, 100 * recall, 200 * precision * recall / max(precision + recall, 1e-12)]
            assert [found["decisions"][way][letter + name] for name in ("P", "R", "F1")] == pytest.approx(expected)
    printed = capsys.readouterr().out
    assert f"40 images of {images}, 3 of 3 labels measured\nmAP {found['scores']['mAP']:.2f}, weighted mAP" in printed


def test_batches_workers_and_order_change_nothing(tagger, images, tmp_path):
    run("--model", tagger[0], images, "--json", tmp_path / "1.json")
    run("--model", tagger[0], images, "--json", tmp_path / "2.json", "--batch-size", "3", "-j", "2")
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "12")
    for part in ("scores", "decisions"):
        assert json.dumps(first[part]) == json.dumps(second[part])


@few_formats
def test_an_artifact_has_the_figures_of_its_network(format, tagger, images, tmp_path):
    artifact = tmp_path / f"tagger{SUFFIXES[format]}"
    export_model(tagger[1], artifact, format, image_size=(32, 32))
    trust = ["--trust"] if ENGINES[format] == "torch" else []
    run("--engine", ENGINES[format], artifact, *trust, images, "--json", tmp_path / "artifact.json")
    run("--model", tagger[0], images, "--json", tmp_path / "model.json")
    found, expected = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("artifact", "model"))
    assert found["model"] == str(artifact)
    assert found["scores"] == pytest.approx(expected["scores"])
    assert found["decisions"] == expected["decisions"]


def test_an_artifact_knows_the_identifiers_of_its_classes(tagger, tmp_path):
    network = copy.deepcopy(tagger[1])
    names = {"n1": "cat", "n2": "dog", "n3": "dog"}
    network.pretrained_cfg = network.pretrained_cfg | {"label_names": list(names), "label_descriptions": names}
    artifact = tmp_path / "a$b_{$.pt"  # which is no formula in the picture
    export_model(network, artifact, "torchscript")
    exported = ExportedModel(artifact, "torch", trust=True)
    assert list(map(label_lookup(exported), range(3))) == list(names.values())
    write_images(tmp_path / "images", 12)
    labels = tmp_path / "images" / "labels.csv"
    text = labels.read_text()
    for index, label in enumerate(LABELS):
        text = text.replace(label, f"n{index + 1}")
    labels.write_text(text)
    plot = ["--plot", tmp_path / "x.svg"] if importlib.util.find_spec("matplotlib") else []
    run("--engine", "torch", artifact, "--trust", labels, "--json", tmp_path / "x.json", *plot)
    assert json.loads((tmp_path / "x.json").read_text())["measured_labels"] == 3


def test_half_precision_is_close(tagger, images, tmp_path):
    run("--model", tagger[0], images, "--amp", "bfloat16", "--json", tmp_path / "x.json")
    found = json.loads((tmp_path / "x.json").read_text())["scores"]["mAP"]
    probabilities, targets = run_directly(tagger[1], images)
    assert found == pytest.approx(validation.score_ranking(probabilities, targets)["mAP"], abs=5)


def test_unknown_and_missing_labels_are_named_and_counted(tagger, images, tmp_path, capsys):
    lines = ["file,labels", "0/0.png,bottom", "1/0.png,zebra;yak", "2/0.png,RIGHT; TOP", "0/1.png,"]
    lines[3] = '2/0.png,"[""RIGHT; TOP""]"'
    path = images.with_name("x.csv")
    path.write_text("\n".join(lines))
    run("--model", tagger[0], path, "--json", tmp_path / "x.json")
    said = capsys.readouterr().err
    assert "left out 1 images without labels" in said
    assert "2 of 4 labels of" in said
    assert "unknown to the network and left out: yak, zebra" in said
    assert "1 of the network's 3 labels are not in" in said
    found = json.loads((tmp_path / "x.json").read_text())
    assert (found["images"], found["measured_labels"], found["unknown_labels"]) == (3, 2, ["yak", "zebra"])
    run("--model", tagger[0], _write(path, "file,labels\n0/0.png,yak\n"), status=2)
    assert "none of the labels yak is among the network's 3 labels, " in capsys.readouterr().err


def _write(path, text):
    path.write_text(text)
    return path


def test_images_that_cannot_be_read_are_named_and_left_out(tagger, images, tmp_path, capsys):
    (images.parent / "0" / "1.png").write_bytes(b"damaged")
    run("--model", tagger[0], images, "--json", tmp_path / "x.json", status=1)
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["images"] == 39
    assert [Path(name).name for name in found["unreadable"]] == ["1.png"]
    assert "1.png, which cannot be read" in capsys.readouterr().err


def test_labels_that_nobody_checked_count_only_where_they_are_said_to(tagger, images, tmp_path):
    lines = ["file,label,confidence"]
    probabilities, targets = run_directly(tagger[1], images)
    known = torch.rand(targets.shape) < 0.6
    names = list(LABELS[::-1])
    examples = read_annotations(images).examples
    for index, example in enumerate(examples):
        for label in known[index].nonzero().flatten().tolist():
            name = example.path.relative_to(images.parent)
            cell = json.dumps([names[label]]).replace('"', '""')
            lines.append(f'{name},"{cell}",{targets[index, label]}')
    path = _write(images.with_name("x.csv"), "\n".join(lines))
    for word, expected in (("ignore", torch.where(known, targets, -1)), ("negative", targets * known)):
        run("--model", tagger[0], path, "--unknown", word, "--json", tmp_path / f"{word}.json")
        found = json.loads((tmp_path / f"{word}.json").read_text())
        rows = known.any(1) if word == "ignore" else (targets * known).any(1) | known.any(1)
        wanted = validation.score_ranking(probabilities[rows], expected[rows])
        assert found["scores"] == pytest.approx(wanted)


def test_a_picture_has_a_curve_for_each_label_and_one_for_all(tagger, images, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra plots, is not installed")
    run("--model", tagger[0], images, "--plot", tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text().count('<g id="line2d_') > 4
    run("--model", tagger[0], images, "--plot", tmp_path / "x.docx", status=2)
    assert "--plot needs a file that ends with one of " in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--keep-ratio"]], ids=["squashed", "keep_ratio"])
def test_a_file_of_ml_danbooru_is_measured_as_scikit_learn_measures_its_code(words, tmp_path, capsys):
    """From its checkpoint and class.json to figures, with random weights, on images of several shapes."""
    metrics = pytest.importorskip("sklearn.metrics", reason="install scikit-learn to compare with it")
    names = ["1girl", "long_hair", "saber_(fate)", "o_o", "no_humans", "sky", "1boy"]
    tensors = reference.official_state_dict(
        (1, 1, 1, 1), planes=16, bottlenecks=(True,) * 4, num_classes=len(names), head="ml_decoder", num_groups=3,
        decoder_embedding=64, frelu=True, counters=True,
    )  # fmt: skip
    torch.save(
        {"model": {}, "ema": {f"module.{name}": tensor for name, tensor in tensors.items()}}, tmp_path / "a.ckpt"
    )
    (tmp_path / "class.json").write_text(json.dumps({str(index): name for index, name in enumerate(names)}))
    rows, logits = ["file,labels"], []
    for index, size in enumerate([(70, 50), (48, 48), (50, 70), (131, 64)] * 6):
        pixels = torch.rand(3, 1, 1) + torch.rand(3, size[1], size[0]) / 4
        image = vision.to_pil_image((pixels * 200).byte())
        image.save(tmp_path / f"{index}.png")
        labels = [name for name, drawn in zip(names[:-1], torch.rand(len(names) - 1), strict=True) if drawn < 0.4]
        rows.append(f"{index}.png,{';'.join(labels)}")
        x = vision.to_tensor(vision.resize(image, 64 if words else (64, 64)))
        logits.append(reference.official_forward(tensors, x[None, :, : x.shape[1] // 4 * 4, : x.shape[2] // 4 * 4])[0])
    (tmp_path / "x.csv").write_text("\n".join(rows))
    made = ["convert", str(tmp_path / "a.ckpt"), "--output", str(tmp_path / "danbooru"), "--custom", "--multi-label"]
    made += [
        "--threshold",
        "0.7",
        "--labels",
        str(tmp_path / "class.json"),
        "--input-size",
        "64",
        "--crop-mode",
        "squash",
    ]
    made += ["--crop-pct", "1", "--interpolation", "bilinear", "--mean", "0", "0", "0", "--std", "1", "1", "1"]
    assert cli.main(made) == 0
    options = ["--json", tmp_path / "x.json", "--csv", tmp_path / "rows.csv", "--batch-size", "5", "--keep-empty"]
    run("--model", f"local-dir:{tmp_path / 'danbooru'}", tmp_path / "x.csv", *options, *words)
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["images"] == 24
    probabilities = torch.stack(logits).sigmoid()[:, :-1]  # the last tag is on no image
    targets = torch.tensor([[int(name in row.partition(",")[2].split(";")) for name in names[:-1]] for row in rows[1:]])
    values = metrics.average_precision_score(targets.numpy(), probabilities.numpy(), average=None)
    per_label = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert [row["label"] for row in per_label] == names[:-1]
    assert [float(row["average_precision"]) for row in per_label] == pytest.approx(values, abs=1e-6)
    assert {row["threshold"] for row in per_label} == {"0.7"}
    assert found["scores"]["mAP"] == pytest.approx(100 * values.mean(), abs=1e-6)
    precision, recall, *_ = metrics.precision_recall_fscore_support(
        targets.numpy(), (probabilities >= 0.7).numpy(), average="micro"
    )
    own = found["decisions"]["own thresholds"]
    assert 0.1 < recall < 0.9
    assert [own["OP"], own["OR"]] == pytest.approx([100 * precision, 100 * recall])
    assert ("--keep-ratio: short sides become 64 pixels" in capsys.readouterr().err) == bool(words)


@pytest.fixture
def folders(crops, tmp_path):
    """Crops of photographs in a folder for each class, named as the network names it."""
    for path in crops.glob("*.png"):
        folder = tmp_path / "folders" / re.match(r"[a-z]+", path.stem)[0]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    return tmp_path / "folders"


def test_accuracy_in_folders_is_the_networks(folders, embedded, tmp_path, capsys):
    run("--model", "test_tresnet", folders, "--json", tmp_path / "x.json")
    names = embedded.pretrained_cfg["label_names"]
    right = {1: 0, 5: 0}
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=embedded))
    paths = sorted(folders.rglob("*.png"))
    for path in paths:
        with torch.inference_mode():
            order = embedded(transform(Image.open(path).convert("RGB"))[None])[0].argsort(descending=True).tolist()
        for count in right:
            right[count] += names.index(path.parent.name) in order[:count]
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["images"] == len(paths)
    assert found["scores"] == {f"top-{count}": 100 * hits / len(paths) for count, hits in right.items()}
    assert "6 of the network's 10 labels are not in" in capsys.readouterr().err


@pytest.mark.skipif(
    not os.environ.get("TIMM_SCRIPTS"), reason="TIMM_SCRIPTS does not name a folder with timm's scripts"
)
def test_accuracy_is_that_of_timms_validate_py_to_the_image(folders, tmp_path):
    for name in ("automobile", "bird", "dog", "frog", "ship", "truck"):  # timm counts folders
        (folders / name).mkdir()
        shutil.copy(SAMPLES / "cat.jpg", folders / name)
    path = Path(os.environ["TIMM_SCRIPTS"]) / "validate.py"
    script = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("validate_script", path))
    spec.loader.exec_module(script)
    words = [str(folders), "--model", "test_tresnet", "--pretrained", "--device", "cpu", "-j", "0", "-b", "8"]
    with warnings.catch_warnings(action="ignore"):  # theirs
        theirs = script.validate(script.parser.parse_args(words))
    run("--model", "test_tresnet", folders, "--json", tmp_path / "x.json")
    ours = json.loads((tmp_path / "x.json").read_text())["scores"]
    assert ours == pytest.approx({"top-1": theirs["top1"], "top-5": theirs["top5"]}, abs=1e-4)  # it rounds


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "resnet50"], "it is not a TResNet"),
        ([], "needs either --model or --engine"),
        (["--model", "test_tresnet", "--engine", "torch", "x.pt"], "needs either --model or --engine"),
        (["--engine", "torch", "x.pt", "--amp", "bfloat16"], "--compile are about models, not about --engine"),
        (["--engine", "onnx", "x.onnx"], "cannot load x.onnx: "),
        (["--engine", "x.onnx", "onnx"], "--engine needs one of torch, onnx, openvino and a file, got x.onnx onnx"),
        (
            ["--model", "test_tresnet", "--csv", "x.csv"],
            "--csv and --plot are about taggers; test_tresnet gives an image",
        ),
    ],
    ids=["foreign", "neither", "both", "model_options", "no_artifact", "swapped", "csv"],
)
def test_mistakes_are_said_in_a_sentence(words, message, images, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*words, images, status=2)
    assert message in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["validate", "--model", "test_tresnet", "x.csv", "--device", "cuda"]) == 2
    assert "this machine has no cuda; --device " in capsys.readouterr().err


def test_the_page_has_a_command_for_every_public_tagger():
    page = DOCS.read_text(encoding="utf-8")
    for name, public in load_catalogue().items():
        if public.multi_label and public.metric:
            (file,) = public.files
            assert file in page, f"docs/taggers.md has no command for {name}"
            assert f"{public.metric.value:g}" in page

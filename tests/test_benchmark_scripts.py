"""Scripts of benchmarks/ that compare networks, and the pictures of their results; on the tiny model."""

import importlib
import json
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
import torch
from PIL import Image

FOLDER = Path(__file__).parents[1] / "benchmarks"
QUICK = ["--batch-size", "2", "--rounds", "2"]
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib, of the extra plots, is not installed"
)


@pytest.fixture(autouse=True)
def _scripts_folder(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)  # as for a script


def run(script, folder, *words):
    """Results of a script, read back through the schema."""
    path = folder / f"{script}.json"
    assert importlib.import_module(script).main([*words, "--json", str(path)]) == 0
    return importlib.import_module("schema").load_results(path)


def test_regions_end_where_a_row_says():
    training_memory = importlib.import_module("training_memory")

    def list_ends(ends):
        body = training_memory.make_regions(ends, "tresnet_m").body
        return [stored for module, _, stored in body._list_steps()[-3:]]

    assert list_ends("body") == [False, False, False]
    assert list_ends("stages") == [False, False, True]
    assert list_ends("pairs") == [True, False, True]
    assert list_ends("blocks") == [True, True, True]


@pytest.mark.thorough  # runs networks of full size
def test_paper_tables_have_a_row_for_each_network(tmp_path):
    words = ["--models", "test_tresnet", "built-in:tresnet_m", "--image-size", "64", *QUICK]
    rows = {row["row"]: row for row in run("paper_tables", tmp_path, *words)["rows"]}
    assert list(rows) == ["resnet50", "test_tresnet", "built-in:tresnet_m"]
    assert all(row["top1"] is row["top1_source"] is None for row in rows.values())  # nobody published them at 64 px


def test_paper_tables_name_the_source_of_each_accuracy():
    paper_tables = importlib.import_module("paper_tables")
    row = paper_tables.annotate({"row": "efficientnet_b1", "image_size": 240})
    assert row == {"top1": 79.2, "top1_source": "arXiv:2003.13630"}
    for name, (_, top1, source) in paper_tables.PUBLISHED.items():
        assert (top1 is None) == (source is None) == (name == "test_tresnet")


@pytest.mark.thorough
def test_ablation_changes_one_ingredient_a_row(tmp_path):
    rows = run("ablation", tmp_path, "--model", "test_tresnet", "--image-size", "64", *QUICK)["rows"]
    full = rows[0]
    assert full["train_ratios"] == full["inference_ratios"] == [1, 1]
    kept = {row["row"]: row["kept_mb"] for row in rows}
    assert kept["expansions recomputed too"] < full["kept_mb"] < kept["activations stored"]
    params = {row["row"]: row["params_m"] for row in rows}
    same = {"as published", "activations stored", "expansions recomputed too", "no anti-aliasing"}
    same |= {"ReLU for LeakyReLU", "SiLU for LeakyReLU"}
    assert {name for name in params if params[name] == full["params_m"]} == same


def test_launches_are_timed_in_turns_for_every_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # which would stay for other tests
    rows = run("launches", tmp_path, "--steps", "2")["rows"]
    assert [row["row"] for row in rows] == ["built-in", "none", "activations", "expansions", "checkpointing"]
    assert rows[0]["step_ratio"] == 1
    for row in rows:
        assert row["step_ms"] >= row["forward_ms"] + row["backward_ms"] > row["forward_ms"] > 0


@pytest.mark.parametrize("layout", [[], ["--channels-last"]], ids=["contiguous", "channels_last"])
def test_parts_that_move_fewer_bytes_compute_the_same(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # which would stay for other tests
    words = ["--eager-only", "--batch-size", "3", "--channels", "5", "--image-size", "13", "--rounds", "2", *layout]
    rows = run("fewer_bytes", tmp_path, *words)["rows"]
    assert [(row["row"], row["mode"]) for row in rows] == [("blur", "eager"), ("mean", "eager")]
    for row in rows:
        assert row["apart"] < 1e-5
        assert [after / before for before, after in zip(row["ms"], row["other_ms"], strict=True)] == row["ratios"]
    script = importlib.import_module("fewer_bytes")
    own, other = script.make_parts(5)["mean"]
    for part in (own, other):
        part(torch.randn(3, 5, 13, 13, generator=torch.Generator().manual_seed(1)))
    for name, value in own.bn.named_buffers():
        torch.testing.assert_close(other.bn.get_buffer(name), value)


@pytest.mark.thorough
def test_resolution_compares_networks_at_each_size(tmp_path):
    rows = run("resolution", tmp_path, "--model", "test_tresnet", "--image-sizes", "64", "128", *QUICK)["rows"]
    names = ["resnet50", "built-in:test_tresnet", "test_tresnet"]
    assert [(row["image_size"], row["row"]) for row in rows] == [(size, name) for size in (64, 128) for name in names]
    assert all(row["train_ratios"] == [1, 1] for row in rows if row["row"] == "resnet50")
    small, large = rows[2], rows[5]
    assert large["kept_mb"] / small["kept_mb"] == pytest.approx((128 / 64) ** 2, rel=0.15)  # but for statistics


@pytest.mark.parametrize("script", ["paper_tables", "ablation", "resolution"])
def test_results_are_never_overwritten(script, tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text("precious")
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(script).main(["--json", str(path)])
    assert "never overwritten" in capsys.readouterr().err
    assert path.read_text() == "precious"


# ---- accuracy


@pytest.fixture
def photos(tmp_path):
    """CIFAR-10's folders with a few images of plain colours."""
    for split, count in (("train", 30), ("test", 4)):
        for index in range(10):
            folder = tmp_path / "data" / split / f"class{index}"
            folder.mkdir(parents=True)
            for number in range(count):
                color = (25 * index, 255 - 25 * index, 8 * number)
                Image.new("RGB", (32, 32), color).save(folder / f"{number:04}.png")
    return tmp_path / "data"


@pytest.mark.skipif(not os.environ.get("TIMM_SCRIPTS"), reason="TIMM_SCRIPTS does not name timm's scripts")
def test_accuracies_are_those_of_the_last_epoch_for_every_seed(photos, tmp_path, capsys):
    words = ["--data", str(photos), "--rows", "as published", "no squeeze-and-excitation", "--seeds", "2"]
    words += ["--epochs", "2", "--images-per-class", "26"]
    rows = run("ablation_accuracy", tmp_path, *words)["rows"]
    assert [(row["seed"], row["row"]) for row in rows] == [
        (seed, name) for seed in (0, 1) for name in ("as published", "no squeeze-and-excitation")
    ]
    assert all(0 <= row["top1"] <= 100 for row in rows)
    assert "| as published | " in capsys.readouterr().out


def test_commands_change_one_ingredient(tmp_path):
    script = importlib.import_module("ablation_accuracy")
    (tmp_path / "train.py").touch()
    settings = script._parse(["--scripts", str(tmp_path), "--data", "."])
    assert settings.rows == list(script.ACCURACY_VARIATIONS)
    assert "activations stored" not in settings.rows
    plain, changed = (
        script.make_command(tmp_path, tmp_path, kwargs, 1, settings) for kwargs in ({}, {"stem": "conv7x7"})
    )
    assert changed == [*plain, "--model-kwargs", "stem=conv7x7"]


def test_images_are_the_first_of_each_class(photos, tmp_path):
    script = importlib.import_module("ablation_accuracy")
    script.select_images(photos, 3, tmp_path / "chosen")
    chosen = sorted(path.relative_to(tmp_path / "chosen") for path in (tmp_path / "chosen").rglob("*.png"))
    assert len(chosen) == 10 * (3 + 4)
    assert str(chosen[0]) == "train/class0/0000.png"
    with pytest.raises(ValueError, match=r"class0 needs 31 images \(--images-per-class\), got 30"):
        script.select_images(photos, 31, tmp_path / "more")
    with pytest.raises(ValueError, match="--data needs train/CLASS/ folders"):
        script.select_images(tmp_path / "nowhere", 3, tmp_path / "none")


def test_a_training_that_fails_is_reported(photos, tmp_path, capsys):
    script = importlib.import_module("ablation_accuracy")
    (tmp_path / "train.py").write_text("raise SystemExit('out of luck')")
    words = ["--scripts", str(tmp_path), "--data", str(photos), "--images-per-class", "3"]
    assert script.main([*words, "--json", str(tmp_path / "results.json")]) == 1
    assert "out of luck" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def test_missing_scripts_are_explained(monkeypatch, capsys):
    monkeypatch.delenv("TIMM_SCRIPTS", raising=False)
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("ablation_accuracy").main(["--data", "."])
    assert "--scripts needs a folder with timm's train.py" in capsys.readouterr().err


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="packages of the extra export are not installed",
)
def test_int8_accuracy_counts_every_test_image(photos, tmp_path, capsys):
    model = timm.create_model("test_tresnet", pretrained=True).eval()
    names = model.pretrained_cfg["label_names"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    right = 0
    for index, name in enumerate(names):
        for split in ("train", "test"):
            (photos / split / f"class{index}").rename(photos / split / name)
        images = [transform(Image.open(path)) for path in (photos / "test" / name).iterdir()]
        right += int((model(torch.stack(images)).argmax(-1) == index).sum())
    rows = run("int8_accuracy", tmp_path, "--data", str(photos), "--engines", "onnx")["rows"]
    assert [row["row"] for row in rows] == ["float32", "onnx, int8"]
    assert rows[0] == {"row": "float32", "top1": 100 * right / 40, "agreement": 100, "images": 40}
    assert rows[1]["calibration_images"] == 150  # the other half is held out
    assert rows[1]["agreement"] > 80  # of plain colours, which are hard to tell apart
    (photos / "test" / "cat").rename(photos / "test" / "tiger")
    assert importlib.import_module("int8_accuracy").main(["--data", str(photos)]) == 1
    assert "has them for airplane, automobile, bird, deer, dog, frog, horse, ship, tiger" in capsys.readouterr().err


def test_tagging_trains_each_head_and_resumes(tmp_path, capsys):
    pytest.importorskip("lightning.pytorch", reason="install the extra tagging")
    pytest.importorskip("lightning", reason="install the extra tagging")
    for name, count in (("train", 8), ("val", 8), ("test", 8)):
        (tmp_path / name).mkdir()
        rows = ["file,labels"]
        for index in range(count):
            Image.new("RGB", (64, 64), (30 * index, 200 * (index % 2), 90)).save(tmp_path / name / f"{index}.png")
            rows.append(f"{name}/{index}.png,{'cat;dog' if index % 2 else 'dog' if index % 3 else 'cat'}")
        (tmp_path / f"{name}.csv").write_text("\n".join(rows))
    work = tmp_path / "work"
    words = [
        "--data",
        str(tmp_path),
        "--work",
        str(work),
        "--seeds",
        "1",
        "--losses",
        "asl",
        "--decoder-embedding",
        "8",
    ]
    rows = run("tagging", tmp_path, *words)["rows"]
    assert [row["row"] for row in rows] == ["ml_decoder, asl", "linear, asl"]
    assert all(0 < row["mAP"] <= 100 for row in rows)
    (tmp_path / "tagging.json").unlink()
    assert run("tagging", tmp_path, *words)["rows"] == rows  # read, not trained again
    assert capsys.readouterr().err.count("epoch 1/1") == 2


# ---- files of results, and pictures of them


COMMITTED = sorted((FOLDER / "results").glob("*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=[path.stem for path in COMMITTED])
def test_committed_results_are_whole(path):
    schema = importlib.import_module("schema")
    assert schema.load_results(path)["rows"]


def find_results(script):
    schema = importlib.import_module("schema")
    return [path for path in COMMITTED if schema.script_of(json.loads(path.read_text())) == script]


@pytest.mark.parametrize("script", ["paper_tables", "ablation", "resolution", "training_memory"])
def test_a_missing_field_is_named(script, tmp_path):
    results = json.loads(find_results(script)[0].read_text())
    del results["rows"][1]["kept_mb"]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"results\.json: row 1 lacks kept_mb;"):
        importlib.import_module("schema").load_results(path)
    del results["hardware"]
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"results\.json: the results lacks hardware;"):
        importlib.import_module("schema").load_results(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "got list"), ('{"command": "ls"}', "lacks date, hardware")],
    ids=["truncated", "list", "foreign"],
)
def test_files_that_are_no_results_are_refused(text, message, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        importlib.import_module("schema").load_results(path)


def test_results_of_an_unknown_script_are_refused(tmp_path):
    path = tmp_path / "results.json"
    results = dict.fromkeys(["date", "hardware", "versions", "settings"], {})
    path.write_text(json.dumps({**results, "command": "python other.py", "rows": []}))
    with pytest.raises(ValueError, match="its command is 'python other.py'"):
        importlib.import_module("schema").load_results(path)


@needs_matplotlib
@pytest.mark.parametrize(
    "script",
    [
        "training_memory",
        *(
            pytest.param(script, marks=pytest.mark.thorough)
            for script in ("paper_tables", "ablation", "resolution", "transfer")
        ),
    ],
)
def test_pictures_are_drawn_from_committed_results(script, tmp_path, capsys):
    plots = importlib.import_module("plots")
    files = [path for path in find_results(script) if "compiled" not in path.stem]
    plots.main([*map(str, files), "--output", str(tmp_path)])
    pictures = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert pictures
    assert sorted(pictures) == sorted(tmp_path.iterdir())
    again = tmp_path / "again"
    plots.main([*map(str, files), "--output", str(again)])
    for picture in pictures:
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")
        assert (again / picture.name).read_bytes() == picture.read_bytes()
        assert picture.stat().st_size < 300_000


@needs_matplotlib
def test_training_memory_has_a_picture_for_each_model(tmp_path):
    files = []
    for model, batch_size in (("tresnet_m", 8), ("tresnet_l", 8), ("tresnet_m", 16)):
        results = json.loads(find_results("training_memory")[0].read_text())
        results["settings"] |= {"model": model, "batch_size": batch_size}
        files.append(tmp_path / f"{model}_{batch_size}.json")
        files[-1].write_text(json.dumps(results))
    figures = importlib.import_module("plots").draw(files)
    assert list(figures) == ["tresnet_m_8", "tresnet_l_8"]
    line = figures["tresnet_m_8"].axes[0].lines[0]
    assert list(line.get_xdata()) == [8, 16]
    assert line.get_ydata()[1] == pytest.approx(2 * line.get_ydata()[0])


@needs_matplotlib
def test_picture_of_the_readme_is_drawn_for_light_and_dark_pages(tmp_path, capsys):
    plots = importlib.import_module("plots")
    committed = ElementTree.parse(FOLDER / "results" / "readme_memory.svg").getroot()
    (description,) = (element.text for element in committed.iter("{http://purl.org/dc/elements/1.1/}description"))
    files = [str(FOLDER / "results" / name) for name in json.loads(description)["files"]]
    plots.main([*files, "--readme", "memory", "--output", str(tmp_path)])
    light, dark = (Path(line).read_text() for line in capsys.readouterr().out.splitlines())
    assert plots._DARK["figure.facecolor"] in dark
    assert plots._DARK["figure.facecolor"] not in light
    for picture in (light, dark):
        assert (
            ElementTree.fromstring(picture).find(".//{http://purl.org/dc/elements/1.1/}description").text == description
        )
    with pytest.raises(SystemExit, match="launches.* needs rows of training_memory; .*resnet50 are missing"):
        plots.main([str(find_results("launches")[0]), "--readme", "memory", "--output", str(tmp_path)])


@needs_matplotlib
def test_pictures_need_complete_rounds(tmp_path):
    results = json.loads(find_results("resolution")[0].read_text())
    results["rows"][0]["train_images_per_s"] = []
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    with pytest.raises(SystemExit, match="has no complete round in train_images_per_s"):
        importlib.import_module("plots").main([str(path), "--output", str(tmp_path)])
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]


def test_collections_are_compared_file_by_file(tmp_path):
    script = importlib.import_module("collection")
    expected = {"a.jpg": (1, 0.5), "b.jpg": (2, 0.75)}
    assert script.compare(expected, {"a.jpg": (1, 0.625), "b.jpg": (3, 0.75)}) == (0.5, 0.125)
    with pytest.raises(RuntimeError, match="2 files were classified by one command, 1 by the other"):
        script.compare(expected, {"a.jpg": (1, 0.5)})
    (tmp_path / "x.csv").write_text("filename,index_0,prob_0\nfolder/a.jpg,1,0.5\n")
    row = {"image": "other/a.jpg", "predictions": [{"label": "x", "index": 1, "probability": 0.5}]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    assert script.read_results(script.TIMM, tmp_path / "x") == script.read_results(script.CLASSIFY, tmp_path / "x")


def test_commands_are_timed_in_forks_and_a_failing_one_says_why(tmp_path):
    script = importlib.import_module("collection")
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text("import sys; assert sys.argv[1:] == ['word']; sum(range(10**6))")
    bad.write_text("raise ValueError('no such thing')")
    seconds, cpu_s = script.time_command([str(good), "word"], tmp_path / "printed")
    assert min(seconds, cpu_s) > 0
    with pytest.raises(RuntimeError, match="no such thing"):
        script.time_command([str(bad)], tmp_path / "printed")


def test_small_files_are_of_all_of_a_data_set(tmp_path):
    script = importlib.import_module("collection")
    for index in range(10):
        (tmp_path / "test" / str(index)).mkdir(parents=True)
        (tmp_path / "test" / str(index) / "0.jpg").touch()
    (tmp_path / "small").mkdir()
    script.link_small(tmp_path, tmp_path / "small", 5)
    linked = sorted(path.resolve().parent.name for path in (tmp_path / "small").iterdir())
    assert linked == ["0", "2", "4", "6", "8"]
    with pytest.raises(ValueError, match="needs 11 images, got 10"):
        script.link_small(tmp_path, tmp_path / "small", 11)


@pytest.mark.thorough
@pytest.mark.skipif(
    not os.environ.get("TIMM_SCRIPTS"), reason="TIMM_SCRIPTS does not name a folder with timm's inference.py"
)
def test_classify_says_what_timms_inference_py_says(tmp_path):
    for index in range(6):
        pixels = torch.randint(0, 256, (40, 48, 3), dtype=torch.uint8)
        (tmp_path / "test").mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(tmp_path / "test" / f"{index}.jpg")
    words = ["--scripts", os.environ["TIMM_SCRIPTS"], "--data", str(tmp_path), "--small", "6", "--photographs", "0"]
    rows = run("collection", tmp_path, *words, "--rounds", "1")["rows"]
    assert [row["agreement"] for row in rows] == [1, 1]

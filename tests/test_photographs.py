"""docs/photographs.md: every command of it runs, with timm's own scripts, and all ways to an answer agree."""

import csv
import importlib.util
import io
import json
import logging
import os
import re
import runpy
import shutil
import sys
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from PIL import Image
from publishing import direct_client
from snippets import ROOT, make_stand_ins, read_snippets, run_python, split_commands

from timm_tresnet.cli import main as cli
from timm_tresnet.cli.commands import train_tagger

PAGE = ROOT / "docs" / "photographs.md"
SCRIPTS = os.environ.get("TIMM_SCRIPTS")
CLASSES = {"Daisy": (250, 250, 210), "aster10": (120, 90, 200), "aster9": (90, 60, 120), "rose": (200, 30, 60),
           "tulip": (220, 160, 30)}  # fmt: skip
QUICK = {  # what a test adds to a command, since the last one wins
    "train.py": "--epochs 2 --warmup-epochs 0 --batch-size 5 --lr 1e-3 --workers 0 --device cpu --img-size 64",
    "validate.py": "--batch-size 5 --workers 0 --device cpu --img-size 64",
    "train-tagger": "--epochs 1 --workers 0 --device cpu --batch-size 2 --image-size 64 --held-out 0.5",
}
EXTRAS = {"train-tagger": ("lightning", "torchmetrics"), "onnx": ("onnx", "onnxscript", "onnxruntime")}

needs_scripts = pytest.mark.skipif(not SCRIPTS, reason="TIMM_SCRIPTS does not name a folder with timm's train.py, ...")


@contextmanager
def as_a_program(words):
    """Restore what a script changes: arguments, module path, logging."""
    argv, path, root = sys.argv, sys.path[:], logging.getLogger()
    handlers, level = root.handlers[:], root.level
    sys.argv = words
    try:
        with warnings.catch_warnings(action="ignore"):  # theirs
            yield
    finally:
        sys.argv, sys.path[:] = argv, path
        root.handlers[:] = handlers
        root.setLevel(level)


def run_script(*words):
    """One of timm's scripts, in this process; returns its --result."""
    printed = io.StringIO()
    with as_a_program([str(Path(SCRIPTS) / words[0]), *words[1:]]), redirect_stdout(printed):
        runpy.run_path(sys.argv[0], run_name="__main__")
    return json.loads(printed.getvalue().partition("--result\n")[2])


def run_command(words):
    """Run a shortened command of the page; return its output or, for a script, its result."""
    quick = next((extra for name, extra in QUICK.items() if name in words[:2]), "").split()
    if words[0] == "python":
        return run_script(*words[1:], *quick)
    assert words[0] == "timm-tresnet", f"nobody knows how to run {words}"
    printed = io.StringIO()
    with as_a_program(words), redirect_stdout(printed), redirect_stderr(io.StringIO()):
        assert cli.main([*words[1:], *quick]) == 0, f"{words}: {printed.getvalue()}"
    return printed.getvalue()


def draw(folder, count, generator):
    """Noisy photographs, in a folder for each class; not all are easy."""
    for name, colour in CLASSES.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            noise = torch.randn(72, 96, 3, generator=generator) * 90 + torch.tensor(colour)
            Image.fromarray(noise.clamp(0, 255).byte().numpy()).save(folder / name / f"{index}.png")


def count_right(printed):
    """Return the percentage of images whose first label is their folder's name, from a table of `classify`."""
    rows = [re.match(r"(\S+)\s+(\S+) [\d.]+%", line) for line in printed.splitlines()]
    right = [Path(row[1]).parent.name == row[2] for row in rows]
    return 100 * sum(right) / len(right)


@needs_scripts
@pytest.mark.parametrize("part", ["## One label", "## Several labels"])
def test_every_command_of_the_page_runs_and_all_answers_agree(part, hub, monkeypatch, tmp_path):
    direct_client(monkeypatch, hub, tmp_path / "cache")
    folder = tmp_path / "user"
    folder.mkdir()
    text = PAGE.read_text(encoding="utf-8")
    train = train_tagger.run
    make_stand_ins("tresnet_m.miil_in1k", folder, hub, monkeypatch)
    monkeypatch.setattr(train_tagger, "run", train)  # for which the other pages have a stand-in
    generator = torch.Generator().manual_seed(0)
    draw(folder / "flowers" / "train", 8, generator)
    draw(folder / "flowers" / "validation", 4, generator)
    (folder / "names.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "labels"])
        rows.writerows([[f"photos/{index}.png", "sea;sand" if index % 2 else "tree"] for index in range(6)])

    results, ran = {}, 0
    begin, end = text.index(part), text.find("\n## ", text.index(part))
    for example in read_snippets(PAGE):
        if not begin <= example.region.start < (end if end > 0 else len(text)):
            continue
        if example.region.evaluator is run_python:
            example.evaluate()
            assert example.namespace["answer"] in CLASSES
            continue
        for words in split_commands(example.parsed):
            needed = [package for name, packages in EXTRAS.items() if name in words for package in packages]
            missing = [package for package in needed if importlib.util.find_spec(package) is None]
            if missing:
                pytest.skip(f"{' '.join(words)} needs {', '.join(missing)}; what is before it ran")
            results[" ".join(words[:4])] = results[" ".join(words)] = run_command(words)
            ran += 1
    assert ran == {"## One label": 9, "## Several labels": 4}[part]
    if part == "## One label":
        top1 = results["python validate.py --data-dir flowers"]["top1"]
        assert 20 < top1 < 100  # neither guessed nor easy
        tables = [printed for line, printed in results.items() if line.endswith("flowers/validation")]
        assert [count_right(printed) for printed in tables] == [top1, top1]


RUNS = {
    "plain": ["--img-size", "48", "--mean", ".5", ".4", ".3", "--std", ".3", ".3", ".2", "--crop-pct", ".8",
              "--interpolation", "bicubic", "--model-kwargs", "negative_slope=0.05"],
    "average": ["--model-ema", "--model-ema-decay", "0.7", "--input-size", "3", "64", "48"],
}  # fmt: skip


@needs_scripts
@pytest.mark.parametrize(("run", "flags"), RUNS.items(), ids=RUNS)
def test_top1_is_that_of_validate_py(run, flags, tmp_path):
    generator = torch.Generator().manual_seed(1)
    draw(tmp_path / "train", 8, generator)
    draw(tmp_path / "validation", 8, generator)
    usual = ["--data-dir", str(tmp_path), "--model", "test_tresnet", "--num-classes", "5"]
    usual += ["--batch-size", "8", "--workers", "0", "--device", "cpu"]
    trained = ["--pretrained", "--epochs", "2", "--warmup-epochs", "0", "--opt", "adam", "--lr", "1e-3"]
    run_script("train.py", *usual, *trained, "--output", str(tmp_path), "--experiment", run, *flags)
    shown = [flag for flag in flags if not flag.startswith("--model-ema") and flag != "0.7"]
    checked = ["--checkpoint", str(tmp_path / run / "model_best.pth.tar"), *shown]
    top1 = run_script("validate.py", *usual, *checked, *(["--use-ema"] if run == "average" else []))["top1"]
    folder, photographs = str(tmp_path / "converted"), str(tmp_path / "validation")
    run_command(["timm-tresnet", "convert", str(tmp_path / run), "--output", folder])
    model, engine = ["--model", f"local-dir:{folder}"], ["--engine", "onnx", f"{folder}.onnx"]
    if all(map(importlib.util.find_spec, EXTRAS["onnx"])):
        run_command(["timm-tresnet", "export", f"local-dir:{folder}", "--format", "onnx", "--output", engine[-1]])
    else:
        engine = model
    answers = [run_command(["timm-tresnet", "classify", *how, photographs]) for how in (model, engine)]
    assert 20 < top1 < 100
    assert [count_right(printed) for printed in answers] == [top1, top1]

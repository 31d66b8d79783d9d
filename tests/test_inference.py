import importlib.util
import json

import pytest
import torch
from scripts import load_script
from torch import nn


@pytest.fixture
def inference():
    return load_script("benchmarks/inference.py")


def test_flops_are_two_for_each_multiply_add(inference):
    assert inference.count_flops(nn.Conv2d(3, 8, 3, padding=1, bias=False), 10) == 2 * 3 * 8 * 9 * 100
    run, flops = inference.make_peak(torch.float32, 8, 10, batch=2, device="cpu")
    assert flops == 2 * 8 * 8 * 9 * 100 * 2
    assert run(None).shape == (2, 8, 10, 10)


def test_int8_peak_is_a_convolution_of_the_same_work(inference):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    run, flops = inference.make_int8_peak(8, 10, batch=2)
    assert flops == 2 * 8 * 8 * 9 * 100 * 2
    (output,) = run(None)
    assert output.shape == (2, 8, 10, 10)
    assert output.std() > 1


def test_results_compare_every_row_with_the_builtin_network(inference, tmp_path, capsys):
    results = tmp_path / "new" / "results.json"
    rows = ["resnet50", "built-in", "built-in, NCHW", "eager", "folded"]
    arguments = ["--model", "test_tresnet", "--image-size", "64", "--batch-sizes", "2", "1", "--rounds", "2"]
    inference.main([*arguments, "--rows", *rows, "--json", str(results)])
    written = json.loads(results.read_text())
    assert set(written) == {"command", "date", "hardware", "versions", "settings", "rows"}
    assert [(row["batch_size"], row["row"]) for row in written["rows"]] == [(b, row) for b in (2, 1) for row in rows]
    for row in written["rows"]:
        assert len(row["images_per_s"]) == len(row["ratios"]) == 2
        assert row["share_of_peak"] > 0
    assert written["rows"][1]["ratios"] == [1, 1]
    table = capsys.readouterr().out
    assert all(f"| {row} | 2 |" in table for row in rows)
    assert [path.name for path in results.parent.iterdir()] == ["results.json"]


def test_every_row_computes_the_network(inference, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, **kwargs: network)
    for row in ("built-in, NCHW", "folded", "compiled", "compiled, bfloat16"):
        settings = inference.parse(["--model", "test_tresnet", "--image-size", "64"])
        with torch.inference_mode():
            logits = inference.make_row(row, settings)(torch.rand(2, 3, 64, 64))
        assert logits.shape == (2, 1000)
        assert logits.dtype == (torch.bfloat16 if "bfloat16" in row else torch.float32)
        assert logits.isfinite().all()


def test_packages_that_are_missing_leave_their_rows_out(inference, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rows = ["built-in", "onnx"]
    inference.main(
        ["--model", "test_tresnet", "--image-size", "64", "--batch-sizes", "1", "--rounds", "1", "--rows", *rows]
    )
    captured = capsys.readouterr()
    assert "left out onnx: onnxscript, onnxruntime not installed" in captured.err
    assert "| onnx |" not in captured.out


@pytest.mark.parametrize("arguments", [["--dtype", "float16"], ["--batch-sizes", "largest"]])
def test_options_for_cuda_are_refused_on_the_cpu(inference, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        inference.main(arguments)
    assert "need --device cuda" in capsys.readouterr().err


def test_results_are_never_overwritten(inference, tmp_path, capsys):
    results = tmp_path / "results.json"
    results.write_text("precious")
    with pytest.raises(SystemExit, match="2"):
        inference.main(["--json", str(results)])
    assert "never overwritten" in capsys.readouterr().err
    assert results.read_text() == "precious"


def test_profile_adds_up_to_a_run(inference, capsys):
    arguments = ["--model", "test_tresnet", "--image-size", "64", "--batch-sizes", "2", "--rows", "folded", "onnx"]
    inference.main([*arguments, "--profile"])
    heading, _, first, *others = [
        line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")
    ]
    assert heading[1].strip() == "folded, batch 2"
    times = [float(line[2]) for line in (first, *others)]
    assert times == sorted(times, reverse=True)
    assert len(times) == 10
    assert sum(times) <= float(heading[2].split()[-1]) + 0.1
    with pytest.raises(SystemExit, match="2"):
        inference.main([*arguments, "--profile", "--json", "results.json"])
    assert "leave out --json" in capsys.readouterr().err

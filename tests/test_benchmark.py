import json

import pytest
import timm
import torch
from torch import nn

from timm_tresnet import benchmark, cli

FIELDS = {"row", "image_size", "params_m", "gmacs", "activations_m", "kept_mb", "largest_batch", "largest_batch_how"}
FIELDS |= {"train_images_per_s", "train_ratios", "inference_images_per_s", "inference_ratios"}
TINY = ["test_tresnet", "built-in:test_tresnet", "--image-size", "64", "--batch-size", "2", "--rounds", "2"]


def make_settings(**values):
    defaults = {"batch_size": 2, "rounds": 2, "memory_gb": 16, "device": "cpu", "max_batch": None, "amp": None}
    defaults |= {"channels_last": False, "compile": False, "json": None}
    return benchmark.argparse.Namespace(**{**defaults, **values})


def make_candidates(*names, image_size=64):
    return [
        benchmark.Candidate(name, lambda name=name: benchmark.make_network(name), names[0], image_size)
        for name in names
    ]


def test_sizes_are_those_that_timm_publishes():
    # results/model_metadata and benchmark tables of timm: 25.56 M parameters, 4.11 GMACs, 11.11 M activations
    size = benchmark.measure_size(benchmark.make_network("resnet50"), 224)
    assert size["params_m"] == pytest.approx(25.56, abs=0.005)
    assert size["gmacs"] == pytest.approx(4.11, rel=0.01)  # timm's table leaves pooling out, PyTorch counts the same
    assert size["activations_m"] == pytest.approx(11.11, abs=0.005)


def test_size_counts_convolutions_and_linear_layers_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(800, 5))
    size = benchmark.measure_size(network, 10)
    assert size == {
        "params_m": (3 * 8 * 9 + 800 * 5 + 5) / 1e6,
        "gmacs": (3 * 8 * 9 * 100 + 800 * 5) / 1e9,
        "activations_m": (8 * 100 + 5) / 1e6,
    }
    assert next(network.parameters()).device.type == "cpu"  # a copy was measured


def test_networks_are_ours_timms_own_or_any_of_timm():
    assert type(benchmark.make_network("test_tresnet")).__module__.startswith("timm_tresnet.")
    builtin = benchmark.make_network("built-in:test_tresnet")
    assert type(builtin) is timm.models.tresnet.TResNet
    sizes = {
        sum(p.numel() for p in benchmark.make_network(n).parameters())
        for n in ("test_tresnet", "built-in:test_tresnet")
    }
    assert len(sizes) == 1
    assert benchmark.make_network("resnet18", drop_rate=0.1).num_classes == 1000


@pytest.mark.parametrize(
    ("name", "message"), [("tresnet_n", "knows no model 'tresnet_n'"), ("built-in:resnet50", "got 'resnet50'")]
)
def test_unknown_networks_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        benchmark.make_network(name)


def test_rows_hold_every_round_and_ratios_to_the_reference():
    rows, complete = benchmark.compare(make_candidates("built-in:test_tresnet", "test_tresnet"), make_settings())
    assert complete
    assert all(set(row) == FIELDS for row in rows)
    builtin, ours = rows
    for quantity in ("train", "inference"):
        assert builtin[f"{quantity}_ratios"] == [1, 1]
        for speed, other, ratio in zip(
            ours[f"{quantity}_images_per_s"],
            builtin[f"{quantity}_images_per_s"],
            ours[f"{quantity}_ratios"],
            strict=True,
        ):
            assert ratio == pytest.approx(speed / other)
    assert ours["kept_mb"] < 0.6 * builtin["kept_mb"]
    assert ours["largest_batch"] > 1.6 * builtin["largest_batch"]
    assert ours["largest_batch_how"] == "computed for 16 GB from kept bytes"
    assert (ours["params_m"], ours["gmacs"]) == (builtin["params_m"], builtin["gmacs"])


def test_reference_is_of_the_same_image_size_where_there_is_one():
    names = [("a", 64), ("b", 64), ("a", 96), ("b", 96), ("b", 128)]
    candidates = [benchmark.Candidate(name, nn.Identity, "a", size) for name, size in names]
    assert [benchmark._find_reference(candidate, candidates) for candidate in candidates] == [0, 0, 2, 2, 0]


def test_measuring_leaves_the_weights_as_they_were():
    network = benchmark.make_network("test_tresnet")
    before = [parameter.detach().clone() for parameter in network.parameters()]
    benchmark.compare([benchmark.Candidate("ours", lambda: network, "ours", 64)], make_settings())
    for parameter, value in zip(network.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


@pytest.mark.parametrize(("calls", "kept", "rounds"), [(1, 1, 0), (4, 2, 0), (9, 2, 2)], ids=str)
def test_what_is_complete_survives_an_interrupt(monkeypatch, calls, kept, rounds):
    train = benchmark._Bench.train
    count = 0

    def interrupted(self, candidate, size, repeats=1):
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        return train(self, candidate, size, repeats)

    monkeypatch.setattr(benchmark._Bench, "train", interrupted)  # called twice for memory, then twice a round
    rows, complete = benchmark.compare(
        make_candidates("built-in:test_tresnet", "test_tresnet"), make_settings(rounds=9)
    )
    assert not complete
    assert [row["kept_mb"] is not None for row in rows] == [index < kept for index in range(2)]
    assert [len(row["train_ratios"]) for row in rows] == [rounds, rounds]
    assert benchmark.format_table(rows).count("\n") >= 3


@pytest.mark.parametrize(("fitting", "cap", "largest"), [(5, 20, 5), (20, 8, 8), (0, 4, 0)], ids=str)
@pytest.mark.parametrize("guess", [None, 0, 1, 6, 100])
def test_largest_batch_is_found_by_bisection(fitting, cap, largest, guess):
    def step(size):
        if size > fitting:
            raise torch.cuda.OutOfMemoryError("this batch does not fit")

    assert benchmark.find_largest_batch(step, cap, guess=guess) == largest


def test_a_good_guess_makes_the_search_for_the_largest_batch_short():
    sizes = []

    def step(size):
        sizes.append(size)
        if size > 1000:
            raise torch.cuda.OutOfMemoryError("this batch does not fit")

    for guess in (950, 1060):
        sizes.clear()
        assert 990 <= benchmark.find_largest_batch(step, 8192, guess=guess) <= 1000
        assert len(sizes) <= 6


def test_largest_batch_is_computed_beside_weights_gradients_and_momentum():
    assert benchmark.compute_largest_batch(params_m=100, kept_mb=80, memory_gb=2) == (2000 - 3 * 400) // 80
    assert benchmark.compute_largest_batch(params_m=100, kept_mb=80, memory_gb=1) == 0


def test_command_prints_and_writes_what_it_measured(tmp_path, capsys):
    results = tmp_path / "results.json"
    assert cli.main(["benchmark", *TINY, "--json", str(results)]) == 0
    written = json.loads(results.read_text())
    assert set(written) == {"command", "date", "hardware", "versions", "settings", "rows"}
    assert written["command"] == f"timm-tresnet benchmark {' '.join(TINY)} --json {results}"
    assert written["settings"]["models"] == TINY[:2]
    assert "words" not in written["settings"]
    output = capsys.readouterr().out
    assert "| built-in:test_tresnet | 64 |" in output
    assert "Largest batch: computed for 16 GB from kept bytes." in output


def test_interrupted_command_keeps_what_is_done(tmp_path, capsys, monkeypatch):
    def interrupted(self, candidate, size, repeats=1):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark._Bench, "infer", interrupted)
    results = tmp_path / "results.json"
    assert cli.main(["benchmark", *TINY, "--json", str(results)]) == 130
    assert "interrupted" in capsys.readouterr().err
    rows = json.loads(results.read_text())["rows"]
    assert [row["train_ratios"] for row in rows] == [[], []]
    assert all(row["kept_mb"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no_such_model"], "knows no model 'no_such_model'"),
        (["--amp", "float16"], "need --device cuda"),
    ],
    ids=["model", "float16_on_the_cpu"],
)
def test_mistakes_are_named(words, message, capsys):
    assert cli.main(["benchmark", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "--rounds: needs a number from 1 on, got 0"),
        (["--json", "."], "--json: . exists already"),
    ],
    ids=["rounds", "existing_file"],
)
def test_arguments_that_cannot_be_are_refused(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["benchmark", *words])
    assert message in capsys.readouterr().err


def test_progress_is_drawn_on_request_only(capsys):
    for visible in (True, False):
        progress = benchmark.Progress(2, visible)
        progress.advance("one")
        progress.advance("two")
        progress.end()
    drawn = capsys.readouterr().err
    assert drawn.count("\r") == 2
    assert "] 1/2 two" in drawn


def test_amp_channels_last_and_compile_reach_the_network(monkeypatch):
    seen = []

    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 1000, 4, stride=4)

        def forward(self, x):
            y = self.conv(x)
            seen.append((y.dtype, x.is_contiguous(memory_format=torch.channels_last), self.training))
            return y.mean((2, 3))

    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network, **kwargs: compiled.append(network) or network)
    settings = make_settings(amp="bfloat16", channels_last=True, compile=True)
    benchmark.compare([benchmark.Candidate("one", Watching, "one", 32)], settings)
    assert len(compiled) == 1
    on_cpu = seen[1:]  # the first is for the size
    assert {(dtype, last) for dtype, last, _ in on_cpu} == {(torch.bfloat16, True)}
    assert {training for _, _, training in on_cpu} == {True, False}

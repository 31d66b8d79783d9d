import argparse
import sys

import pytest
import torch
from torch import nn

from timm_tresnet.bench import comparison as benchmark
from timm_tresnet.bench.measuring import make_network

FIELDS = {"row", "image_size", "params_m", "gmacs", "activations_m", "kept_mb", "largest_batch", "largest_batch_how"}
FIELDS |= {"train_images_per_s", "train_ratios", "inference_images_per_s", "inference_ratios"}


def make_settings(**values):
    defaults = {"batch_size": 2, "rounds": 2, "memory_gb": 16, "device": "cpu", "max_batch": None, "amp": None}
    defaults |= {"channels_last": False, "compile": False, "json": None}
    return argparse.Namespace(**{**defaults, **values})


def make_candidates(*names, image_size=64):
    return [benchmark.Candidate(name, lambda name=name: make_network(name), names[0], image_size) for name in names]


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
    network = make_network("test_tresnet")
    before = [parameter.detach().clone() for parameter in network.parameters()]
    benchmark.compare([benchmark.Candidate("ours", lambda: network, "ours", 64)], make_settings())
    for parameter, value in zip(network.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


@pytest.mark.parametrize(
    ("calls", "kept", "rounds"),
    [(9, 2, 2), *(pytest.param(*case, marks=pytest.mark.thorough) for case in ((1, 1, 0), (4, 2, 0)))],
    ids=str,
)
def test_finished_measurements_survive_an_interrupt(monkeypatch, calls, kept, rounds):
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


def test_progress_is_drawn_on_terminals_only(monkeypatch, capsys):
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        benchmark.compare(make_candidates("test_tresnet"), make_settings(rounds=1))
        drawn = capsys.readouterr().err
        for step in ("0/6 size of test_tresnet", "1/6 memory of test_tresnet, 64 px", "5/6 round 1: inference, test_t"):
            assert (f"] {step}" in drawn) == terminal
        assert bool(drawn) == terminal


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

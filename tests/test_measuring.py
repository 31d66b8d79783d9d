import pytest
import timm
import torch
from torch import nn

from timm_tresnet.bench import measuring


def test_sizes_are_those_that_timm_publishes():
    # results/model_metadata and benchmark tables of timm: 25.56 M parameters, 4.11 GMACs, 11.11 M activations
    size = measuring.measure_size(measuring.make_network("resnet50"), 224)
    assert size["params_m"] == pytest.approx(25.56, abs=0.005)
    assert size["gmacs"] == pytest.approx(4.11, rel=0.01)  # timm's table leaves pooling out, PyTorch counts the same
    assert size["activations_m"] == pytest.approx(11.11, abs=0.005)


def test_size_counts_convolutions_and_linear_layers_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(800, 5))
    size = measuring.measure_size(network, 10)
    assert size == {
        "params_m": (3 * 8 * 9 + 800 * 5 + 5) / 1e6,
        "gmacs": (3 * 8 * 9 * 100 + 800 * 5) / 1e9,
        "activations_m": (8 * 100 + 5) / 1e6,
    }
    assert next(network.parameters()).device.type == "cpu"  # a copy was measured


def test_networks_are_ours_timms_own_or_any_of_timm():
    assert type(measuring.make_network("test_tresnet")).__module__.startswith("timm_tresnet.")
    builtin = measuring.make_network("built-in:test_tresnet")
    assert type(builtin) is timm.models.tresnet.TResNet
    sizes = {
        sum(p.numel() for p in measuring.make_network(n).parameters())
        for n in ("test_tresnet", "built-in:test_tresnet")
    }
    assert len(sizes) == 1
    assert measuring.make_network("resnet18", drop_rate=0.1).num_classes == 1000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tresnet_n", "knows no model 'tresnet_n'"),
        ("built-in:resnet50", "got 'resnet50'"),
        ("built-in:tresnet_d", "got 'tresnet_d'"),
    ],
)
def test_unknown_networks_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        measuring.make_network(name)


@pytest.mark.parametrize(("fitting", "cap", "largest"), [(5, 20, 5), (20, 8, 8), (0, 4, 0)], ids=str)
@pytest.mark.parametrize("guess", [None, 0, 1, 6, 100])
def test_largest_batch_is_found_by_bisection(fitting, cap, largest, guess, monkeypatch):
    monkeypatch.setattr(measuring.gc, "collect", lambda: None)  # slow where much is imported

    def step(size):
        if size > fitting:
            raise torch.cuda.OutOfMemoryError("this batch does not fit")

    assert measuring.find_largest_batch(step, cap, guess=guess) == largest


def test_a_good_guess_makes_the_search_for_the_largest_batch_short(monkeypatch):
    monkeypatch.setattr(measuring.gc, "collect", lambda: None)  # slow where much is imported
    sizes = []

    def step(size):
        sizes.append(size)
        if size > 1000:
            raise torch.cuda.OutOfMemoryError("this batch does not fit")

    for guess in (950, 1060):
        sizes.clear()
        assert 990 <= measuring.find_largest_batch(step, 8192, guess=guess) <= 1000
        assert len(sizes) <= 6


def test_largest_batch_is_computed_beside_weights_gradients_and_momentum():
    assert measuring.compute_largest_batch(params_m=100, kept_mb=80, memory_gb=2) == (2000 - 3 * 400) // 80
    assert measuring.compute_largest_batch(params_m=100, kept_mb=80, memory_gb=1) == 0


def test_measuring_logs_nothing_and_leaves_the_environment_as_it_is(run_child):
    code = (
        "import os; before = dict(os.environ); import torch; from timm_tresnet.bench import comparison, measuring\n"
        "network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 1000))\n"
        "print(measuring.measure_kept(network, *measuring.make_batch(2, 32, 'cpu')), dict(os.environ) == before)"
    )
    kept, same = run_child(code).split()  # and no word on standard error
    assert int(kept) > 2 * 3072 * 4
    assert same == "True"

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "training_memory.py"


@pytest.fixture(scope="module")
def training_memory():
    spec = importlib.util.spec_from_file_location("training_memory", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kept_bytes_of_a_network_counted_by_hand(training_memory):
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return self.conv(x.view(x.shape)).sigmoid().mean((2, 3))  # a view must not count the images twice

    batch = (torch.randn(4, 3, 10, 10), torch.zeros(4, dtype=torch.long))
    image, sigmoid = 4 * 3 * 100 * 4, 4 * 8 * 100 * 4
    log_probabilities, scalars = 4 * 8 * 4, 100  # of the loss; total weight and the loss itself
    kept = training_memory.measure_kept(Toy(), batch)
    assert image + sigmoid + log_probabilities <= kept <= image + sigmoid + log_probabilities + scalars


def test_results_compare_every_setting_with_the_builtin_network(training_memory, tmp_path, capsys):
    results = tmp_path / "new" / "results.json"
    rows = [training_memory.BUILTIN, "none", "activations", "expansions", "checkpointing"]
    arguments = ["--image-size", "64", "--batch-size", "2", "--time-batch-size", "2", "--rounds", "1"]
    training_memory.main([*arguments, "--rows", *rows, "--json", str(results)])
    written = json.loads(results.read_text())
    assert set(written) == {"command", "date", "hardware", "versions", "settings", "rows"}
    assert written["settings"]["image_size"] == 64
    kept = {row["row"]: row["kept_mb"] for row in written["rows"]}
    assert list(kept) == rows
    assert kept["none"] == pytest.approx(kept[training_memory.BUILTIN], rel=1e-3)
    assert kept["none"] > kept["activations"] > kept["expansions"] > kept["checkpointing"]
    for row in written["rows"]:
        assert row["peak_mb"] is None or row["peak_mb"] > 0
        assert len(row["step_ratios"]) == 1
    table = capsys.readouterr().out
    assert all(f"| {row} |" in table for row in rows)
    assert [path.name for path in results.parent.iterdir()] == ["results.json"]


def test_results_are_never_overwritten(training_memory, tmp_path, capsys):
    results = tmp_path / "results.json"
    results.write_text("precious")
    with pytest.raises(SystemExit, match="2"):
        training_memory.main(["--json", str(results)])
    assert "never overwritten" in capsys.readouterr().err
    assert results.read_text() == "precious"

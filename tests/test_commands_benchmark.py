import json

import pytest

from timm_tresnet.bench import comparison as benchmark
from timm_tresnet.cli import main as cli

TINY = ["test_tresnet", "built-in:test_tresnet", "--image-size", "64", "--batch-size", "2", "--rounds", "2"]


def test_command_prints_and_writes_its_measurements(tmp_path, capsys):
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


def test_interrupted_command_keeps_finished_measurements(tmp_path, capsys, monkeypatch):
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

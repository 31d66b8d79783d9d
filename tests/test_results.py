import argparse
import json

import pytest

from timm_tresnet.bench.results import format_spread, start_results, write_results


def test_results_begin_with_what_makes_them_and_where(capsys):
    settings = argparse.Namespace(rounds=5, data="/home/me", json="results.json")
    results = start_results("python x.py", "cpu", settings, unrecorded=["data"], packages=["pytest", "no_such_package"])
    assert list(results) == ["command", "date", "hardware", "versions", "settings", "rows"]
    assert results["settings"] == {"rounds": 5}
    assert results["versions"]["pytest"] == pytest.__version__
    assert "no_such_package" not in results["versions"]
    assert f"{results['date']}: python x.py\ncpu {results['hardware']['cpu']}, " in capsys.readouterr().out


def test_results_that_would_overwrite_others_are_left_beside_them(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_results({"rows": [1]}, path)
    assert path.read_text() == '{\n  "rows": [\n    1\n  ]\n}\n'
    with pytest.raises(FileExistsError, match="was created meanwhile and is not overwritten; the new result is in"):
        write_results({"rows": [2]}, path)
    assert json.loads(path.read_text()) == {"rows": [1]}
    (left,) = set(path.parent.iterdir()) - {path}
    assert json.loads(left.read_text()) == {"rows": [2]}


def test_a_spread_is_a_median_and_a_range():
    assert format_spread([1.0, 4.0, 1.5]) == "1.50x (1.00-4.00)"
    assert format_spread([]) == ""

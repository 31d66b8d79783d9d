import runpy
import sys

import pytest
from interpreters import OURS, WHO_BUILDS


def test_script_gets_its_own_arguments_and_what_lies_beside_it(monkeypatch, tmp_path, capsys):
    (tmp_path / "beside_a_script.py").write_text("VALUE = 3\n")
    script = tmp_path / "script.py"
    script.write_text("import sys, beside_a_script\nprint(__name__, sys.argv[1:], beside_a_script.VALUE)\n")
    monkeypatch.setattr(sys, "argv", ["timm_tresnet", str(script), "--model", "x"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_module("timm_tresnet", run_name="__main__")
    assert capsys.readouterr().out == "__main__ ['--model', 'x'] 3\n"


@pytest.mark.thorough
def test_script_runs_with_the_plugin_and_its_own_arguments(run_python, tmp_path):
    (tmp_path / "beside.py").write_text("VALUE = 3\n")
    script = tmp_path / "script.py"
    script.write_text(f"import sys, beside\nprint(__name__, sys.argv[1:], beside.VALUE)\n{WHO_BUILDS}\n")
    process = run_python("-m", "timm_tresnet", script, "--model", "x", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert process.stdout.split("\n")[:2] == ["__main__ ['--model', 'x'] 3", OURS]


@pytest.mark.thorough
def test_script_runs_in_every_process_of_torchrun(run_python, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import os\nprint(os.environ['WORLD_SIZE'])\n{WHO_BUILDS}\n")
    process = run_python(
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "localhost", "--master-port", "29511",
        "-m", "timm_tresnet", script, TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )  # fmt: skip
    assert sorted(process.stdout.split()) == ["2", "2", OURS, OURS]


def test_missing_script_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["timm_tresnet", "missing.py"])
    with pytest.raises(SystemExit, match=r"no file missing\.py"):  # which Python prints, with exit status 1
        runpy.run_module("timm_tresnet", run_name="__main__")


def test_without_a_script_the_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["timm_tresnet", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("timm_tresnet", run_name="__main__")
    assert "classify" in capsys.readouterr().out

import os
import subprocess
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def run_python(tmp_path):
    """Run a fresh interpreter and return the finished process; a failing one fails the test unless check is False."""

    def run(*arguments, check=True, **environment):
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        for name in ("TIMM_TRESNET_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD", "PYTHONWARNINGS"):
            if name not in environment:
                env.pop(name, None)
        process = subprocess.run(
            [sys.executable, *map(str, arguments)], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        if check and process.returncode:
            pytest.fail(f"exit status {process.returncode}\n{process.stdout}\n{process.stderr}")
        return process

    return run

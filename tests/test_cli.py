import os
import subprocess
import sys
from pathlib import Path

from timm_tresnet.images import SAMPLES


def test_installed_command_works_offline():
    command = Path(sys.executable).parent / "timm-tresnet"
    process = subprocess.run(
        [command, "classify", SAMPLES / "cat.jpg"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cat.jpg" in process.stdout


def test_output_that_is_cut_off_ends_the_command_quietly():
    command = Path(sys.executable).parent / "timm-tresnet"
    process = subprocess.Popen([command, "classify"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # as `head` does
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1

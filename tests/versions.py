"""Run the tests with other versions of timm and PyTorch than pip would choose.

    python tests/versions.py oldest
    python tests/versions.py newest
    python tests/versions.py timm==1.0.30 -- tests/test_tresnet.py
    python tests/versions.py pytorch-image-models/  # the folder of a clone

Makes a virtual environment with this project and what is asked for, and runs pytest in it, with what is behind "--"; by
default the tests named in TESTS. Warnings of old releases about their own code are no errors here. The rest of pip's
settings apply, so a constraints file of the machine may keep "newest" from being the newest.
"""

import argparse
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = [  # not those of exporting, whose packages have bounds of their own
    "tests/test_activated_batch_norm.py",
    "tests/test_anti_alias.py",
    "tests/test_autoload.py",
    "tests/test_blocks.py",
    "tests/test_bottleneck_head.py",
    "tests/test_checkpoint.py",
    "tests/test_cli.py",
    "tests/test_commands_classify.py",
    "tests/test_commands_convert.py",
    "tests/test_commands_list.py",
    "tests/test_conv_norm_act.py",
    "tests/test_conversion_description.py",
    "tests/test_conversion_reading.py",
    "tests/test_conversion_recognition.py",
    "tests/test_conversion_writing.py",
    "tests/test_distributed.py",
    "tests/test_hub.py",
    "tests/test_inference.py",
    "tests/test_rebuild.py",
    "tests/test_robustness.py",
    "tests/test_scripts.py",
    "tests/test_synchronized_norm.py",
    "tests/test_tresnet.py",
]
BESIDE_OLDEST = [  # the releases of their day; newer ones do not go with the oldest PyTorch and timm
    "torchvision==0.20.0",
    "numpy<2.3",
]


def make_oldest_requirements() -> list[str]:
    """The lower bounds in pyproject.toml, as exact versions."""
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return [bound.replace(">=", "==") for bound in bounds] + BESIDE_OLDEST


def main() -> int:
    """Make the environment, print its versions, run the tests; the status is pytest's."""
    parser = argparse.ArgumentParser(description="Run the tests with other versions of timm and PyTorch.")
    parser.add_argument("requirement", nargs="+", help="oldest, newest, or what pip install takes")
    words, tests = split_at_dashes(sys.argv[1:])
    asked = parser.parse_args(words).requirement
    requirements = [each for name in asked for each in (make_oldest_requirements() if name == "oldest" else [name])]
    upgrade = "newest" in requirements
    requirements = [each for each in requirements if each != "newest"]

    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        pip = [python, "-m", "pip", "install", "--quiet", *(["--upgrade"] if upgrade else [])]
        subprocess.run([*pip, "-e", f"{ROOT}[test]", *requirements], check=True)
        installed = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
        names = ("timm==", "timm @", "torch==", "torchvision==", "huggingface", "safetensors==", "numpy==")
        print(*(line for line in installed.splitlines() if line.startswith(names)), sep="\n", flush=True)
        command = [python, "-m", "pytest", "-q", "-o", "filterwarnings=default", *(tests or TESTS)]
        return subprocess.run(command, cwd=ROOT, check=False).returncode


def split_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    """What is before and behind the first "--"."""
    where = words.index("--") if "--" in words else len(words)
    return words[:where], words[where + 1 :]


if __name__ == "__main__":
    sys.exit(main())

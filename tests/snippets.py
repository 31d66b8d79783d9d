"""Run the snippets of README.md and docs/: Python unchanged, commands through their own parsers.

Nothing is downloaded: `make_stand_ins` puts what the snippets name into a folder and onto a stand-in for the Hub, with
networks that have each variant's name and kinds of blocks, but few and narrow ones.
"""

import importlib
import importlib.util
import os
import re
import shlex
import tomllib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import reference
import timm
import torch
from hub_server import HubServer
from PIL import Image
from sybil.document import Document
from sybil.evaluators.python import PythonEvaluator
from sybil.example import Example
from sybil.parsers.markdown import CodeBlockParser
from timm.models import save_for_hf

from timm_tresnet.cli import main as cli
from timm_tresnet.tresnet import default_cfgs
from timm_tresnet.utils.images import SAMPLES
from timm_tresnet.variants import ARCHITECTURES
from timm_tresnet.weights.labels import make_notes

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if re.search("^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)
]

NOT_RUN = {  # how a command begins -> why it is not run as it stands, and what is done instead
    "python3 -m venv": "makes an environment and needs the network; .ci/run does it",
    "pip install": "needs the network; the extras that it names are looked up in pyproject.toml",
    "python -m pytest": "is the suite that this is a test of; .ci/run runs this line",
    "python train.py": "is timm's, which no package contains; it parses its options where TIMM_SCRIPTS names it, and "
    "tests/test_scripts.py and tests/test_acceptance.py run it",
    "python validate.py": "likewise",
    "bash distributed_train.sh": "needs 8 GPUs; train.py parses its options",
    "torchrun": "needs several GPUs or machines; torchrun and train.py parse their options, tests/test_main.py runs it",
    "timm-tresnet demo": "serves until it is interrupted; its options are parsed, tests/test_demo_page.py runs it",
    "timm-tresnet train-tagger": "needs images, and takes hours for many; its options are parsed, "
    "tests/test_tagging_training.py runs it",
    "timm-tresnet train": "likewise; tests/test_commands_train.py runs it",
    "timm-tresnet validate": "needs annotated images; its options are parsed, tests/test_commands_validate.py runs it",
    "timm-tresnet benchmark": "takes minutes; its options are parsed, tests/test_commands_benchmark.py runs it",
}
NARROW = {  # of each variant; no two alike, so that a checkpoint can be recognised
    name: (1, 1, 1 + position, 1)
    for v2 in (False, True)
    for position, name in enumerate(name for name, row in ARCHITECTURES.items() if row.get("v2", False) == v2)
    if name != "test_tresnet"
}
_ONNX = ("onnx", "onnxscript", "onnxruntime")
_PROGRAMS = {"venv/bin/", ".venv/bin/"}  # folders of programs that stand for the program


class Missing(Exception):
    """A snippet needs a package or a folder that is not here."""


def read_snippets(page: Path) -> Iterator[Example]:
    """Snippets of a page in order, which share a namespace, in Python or for a shell."""
    languages = set(re.findall(r"^ *```(\w*)[^\n]*\n(?:.*?\n)*? *```$", page.read_text(encoding="utf-8"), re.MULTILINE))
    unknown = languages - {"python", "bash", "text"}
    assert not unknown, f"{page.name}: snippets in {unknown} are not run; say text, or give them a runner"
    parsers = [CodeBlockParser("python", run_python), CodeBlockParser("bash", run_shell)]
    return Document.parse(str(page), *parsers).examples()


def run_python(example: Example) -> None:
    """Run a snippet in its page's namespace.

    Raises:
        Missing: if it names a format whose packages are not installed.
    """
    if '"onnx"' in example.parsed:
        _need("export", _ONNX)
    PythonEvaluator()(example)


def run_shell(example: Example) -> None:
    """Run each command of a snippet.

    Raises:
        Missing: if some need what is not here; the others have been run.
    """
    missing = []
    for words in split_commands(example.parsed):
        try:
            run_command(words)
        except Missing as error:
            missing.append(str(error))
    if missing:
        raise Missing("; ".join(dict.fromkeys(missing)))


def split_commands(text: str) -> Iterator[list[str]]:
    """Words of each command, without comments, the program without the folder of an environment."""
    for line in text.replace("\\\n", " ").splitlines():
        for command in line.split(" && "):
            words = shlex.split(command, comments=True)
            if words:
                for folder in _PROGRAMS:
                    words[0] = words[0].removeprefix(folder)
                yield words


def find_reason(words: Sequence[str]) -> str | None:
    """Key in NOT_RUN of a command, None if it is run."""
    return next((key for key in NOT_RUN if words[: len(key.split())] == key.split()), None)


def run_command(words: list[str]) -> None:
    """Run a command or its substitute; an unknown command fails."""
    reason = find_reason(words)
    if words[0] == "timm-tresnet":
        if "onnx" in words:
            _need("export", _ONNX)
        status = cli.main(words[1:])
        assert status == 0, f"{shlex.join(words)}: exit status {status}"
    elif words[0] == "torchrun":
        _parse_torchrun(words[1:])
    elif words[:2] == ["bash", "distributed_train.sh"]:
        assert words[2].isdigit(), f"{shlex.join(words)}: distributed_train.sh begins with the number of processes"
        _parse_script("train.py", words[3:])
    elif words[:3] == ["python", "-m", "timm_tresnet"]:
        run_command(["python" if words[3].endswith(".py") else "timm-tresnet", *words[3:]])
    elif words[0] == "python" and words[1] in ("train.py", "validate.py"):
        _parse_script(words[1], words[2:])
    elif words[:2] == ["pip", "install"]:
        _look_up_extras(words[2:])
    else:
        assert reason, f"{shlex.join(words)}: nobody knows how to test this; run it, or say in NOT_RUN why not"


def _parse_torchrun(words: Sequence[str]) -> None:
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(words)
    script = [options.training_script, *options.training_script_args]
    run_command(["python", "-m", *script] if options.module else ["python", *script])


def _parse_script(name: str, words: Sequence[str]) -> None:
    """Have a script of timm parse options."""
    if not os.environ.get("TIMM_SCRIPTS"):
        raise Missing("TIMM_SCRIPTS does not name a folder with timm's train.py, validate.py, ...")
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), Path(os.environ["TIMM_SCRIPTS"]) / name)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings(action="ignore"):  # theirs
        spec.loader.exec_module(module)
    if hasattr(module, "config_parser"):
        config, words = module.config_parser.parse_known_args(words)
        assert not config.config or (ROOT / config.config).is_file(), f"there is no {config.config}"
    options = module.parser.parse_args(words)
    assert options.data_dir == "IMAGES", f"{name} takes {options.data_dir} for the folder of images, not IMAGES"


def _look_up_extras(words: Sequence[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for named in re.findall(r"\[(.+)\]", " ".join(words)):
        unknown = set(named.split(",")) - set(extras)
        assert not unknown, f"pyproject.toml has no extras {unknown}"


def _need(extra: str, packages: Sequence[str]) -> None:
    if any(importlib.util.find_spec(name) is None for name in packages):
        raise Missing(f"packages of the extra {extra} are not installed")


def read_commands(page: Path) -> Iterator[list[str]]:
    """Words of each command of a page."""
    for example in read_snippets(page):
        if example.region.evaluator is run_shell:
            yield from split_commands(example.parsed)


def make_stand_ins(text: str, folder: Path, hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    """Put into a folder and onto a Hub what snippets name, and go there.

    Args:
        text: of the snippets.
        folder: an empty one.
        hub: to which this process's client is directed.
        patch: undone by the caller.
    """
    for name, layers in NARROW.items():
        patch.setitem(ARCHITECTURES, name, {**ARCHITECTURES[name], "layers": layers, "width_factor": 0.25})
    for architecture, configs in default_cfgs.items():
        for tag, config in configs.cfgs.items():
            name = f"{architecture}.{tag}"
            if config.hf_hub_id == "timm/" and (name in text or tag == configs.tags[0]):
                _upload(name, f"timm/{name}", folder / "hub", hub)
    _upload("tresnet_m", "ORG/NAME", folder / "hub", hub)

    for name, classes, variant in (
        ("tresnet_m.pth", 1000, "tresnet_m"),
        ("MS_COCO_TRresNet_L_448_86.6.pth", 80, "tresnet_l"),
        ("mine.pth", 7, "tresnet_m"),
    ):
        tensors = reference.official_state_dict(NARROW[variant], planes=16, num_classes=classes)
        torch.save({"model": tensors}, folder / name)
    tagger = timm.create_model("tresnet_m", num_classes=3)
    tagger.pretrained_cfg["notes"] = make_notes(True, [0.25, 0.5, 0.75])
    save_for_hf(tagger, folder / "coco_tagger", safe_serialization=True)
    save_for_hf(timm.create_model("tresnet_m", num_classes=3), folder / "flower_classifier", safe_serialization=True)
    photographs = sorted(SAMPLES.rglob("*.jpg"))[:3]
    (folder / "photo.jpg").write_bytes(photographs[0].read_bytes())
    for name in ("folder", "photos"):
        (folder / name).mkdir()
        for index, path in enumerate(photographs * 2):
            with Image.open(path) as image:
                image.rotate(90 * index).resize((96, 96)).save(folder / name / f"{index}.png")
    patch.chdir(folder)
    for key in NOT_RUN:
        if key.startswith("timm-tresnet "):  # its options are parsed all the same
            module = importlib.import_module(f"timm_tresnet.cli.commands.{key.split()[1].replace('-', '_')}")
            patch.setattr(module, "run", lambda words, **options: 0)


def _upload(model: str, repo_id: str, folder: Path, hub: HubServer) -> None:
    save_for_hf(timm.create_model(model), folder / repo_id, safe_serialization=True)
    hub.add(repo_id, folder / repo_id)

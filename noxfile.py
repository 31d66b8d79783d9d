"""Run the tests with other versions of timm and PyTorch than pip would choose.

    nox -s oldest
    nox -s newest -- tests/test_tresnet.py
    nox -s versions -- timm==1.0.30
    nox -s versions -- pytorch-image-models/ -- tests/test_tresnet.py  # the folder of a clone

Each makes a virtual environment in .nox with this project and what is asked for, and runs pytest in it, with the
arguments given, by default on all tests but those in LEFT_OUT. Warnings of old releases about their own code are no
errors here. The rest of pip's settings apply, so a constraints file of the machine may keep "newest" from being the
newest.
"""

from pathlib import Path

import nox

LEFT_OUT = (  # beginnings of names
    "test_export",  # needs packages that have bounds of their own
    "test_commands_export",
    "test_deployment",
    "test_publish",  # of hub/, whose tools are for huggingface_hub of today
    "test_servers",
    "test_fuzz",
    "test_snippets",  # pages, which are for PyTorch of today
    "test_random_masks",
    "test_release",  # which has nothing to do with versions
    "test_figures",
    "test_docs",
)
BESIDE_OLDEST = [  # the releases of their day; newer ones do not go with the oldest PyTorch and timm
    "torchvision==0.20.0",
    "numpy<2.3",
]

nox.options.default_venv_backend = "venv"


@nox.session(default=False)
def oldest(session: nox.Session) -> None:
    """The lower bounds in pyproject.toml."""
    bounds = nox.project.load_toml("pyproject.toml")["project"]["dependencies"]
    run_tests(session, [*(bound.replace(">=", "==") for bound in bounds), *BESIDE_OLDEST], session.posargs)


@nox.session(default=False)
def newest(session: nox.Session) -> None:
    """What pip finds."""
    run_tests(session, [], session.posargs)


@nox.session(default=False)
def versions(session: nox.Session) -> None:
    """What is named before a second "--", as pip install takes it."""
    words = session.posargs
    where = words.index("--") if "--" in words else len(words)
    if not where:
        session.error("versions needs what pip install takes, such as: nox -s versions -- timm==1.0.30")
    run_tests(session, words[:where], words[where + 1 :])


def run_tests(session: nox.Session, requirements: list[str], arguments: list[str]) -> None:
    """Install, print what was installed, test."""
    session.install("-e", ".[test]", *requirements)
    session.run("python", "-m", "pip", "freeze")
    tests = [str(path) for path in sorted(Path("tests").glob("test_*.py")) if not path.name.startswith(LEFT_OUT)]
    session.run("python", "-m", "pytest", "-q", "-o", "filterwarnings=default", *(arguments or tests))

import contextlib
import functools
import gc
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from children import start_child, wait_for_all
from hub_server import HubServer

if TYPE_CHECKING:  # imported where it is used, as timm is: xdist's controller, which runs no test, needs neither
    import torch

pytest.register_assert_rewrite("comparing", "users")
if "PYTEST_XDIST_WORKER" in os.environ:  # several of them share the cores
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish() -> None:
    gc.set_threshold(10_000, 20, 20)  # its passes take a tenth of the tests' time otherwise
    _freeze()


@pytest.hookimpl(trylast=True)  # when the file's fixtures are gone
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or nextitem.path != item.path:
        _freeze()


def _freeze() -> None:
    """Let Python's collector of cycles pass over what is there by now, a million objects, in the tests to come."""
    _forget_compiled()
    gc.collect()
    gc.freeze()


def _forget_compiled() -> None:
    if "torch._dynamo" in sys.modules:
        sys.modules["torch"].compiler.reset()


@pytest.fixture(autouse=True)
def _start_afresh():
    import torch

    torch.manual_seed(0)
    _forget_compiled()  # the compiler limits how often one piece of code is compiled


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


@pytest.fixture(scope="session")
def run_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs `run_process(folder, ...)` of a test module in two processes that talk through gloo; returns the folder."""

    def run(module: str, *arguments: object) -> Path:
        folder = tmp_path_factory.mktemp("processes")
        words = ", ".join(map(repr, (str(folder), *arguments)))
        code = f"import warnings; warnings.simplefilter('default'); import {module}; {module}.run_process({words})"
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        outputs = [tmp_path_factory.mktemp("output") for _ in range(2)]
        children = [
            start_child(code, [], env | {"RANK": str(rank), "WORLD_SIZE": "2"}, folder, output)
            for rank, output in enumerate(outputs)
        ]
        assert wait_for_all(children, 600) == [0, 0], [(output / "stderr").read_text() for output in outputs]
        return folder

    return run


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def run_child(hub: HubServer, tmp_path: Path) -> Callable[..., str]:
    """Runs code or a script in a new process, since the client of the Hub reads its environment when it is imported.

    The arguments are in its sys.argv[1:], the keyword arguments in its environment. It must not fail, warn or log a
    warning. Returns what it prints.
    """
    foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "TIMM_", "TORCH_")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(foreign) and not name.lower().endswith("_proxy")
    }
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }

    def run(code: str | Path, *arguments: object, **variables: str) -> str:
        with tempfile.TemporaryDirectory() as printed:
            child = start_child(code, [*map(str, arguments)], environment | variables, tmp_path, Path(printed))
            (status,) = wait_for_all([child], 600)
            output, error = (Path(printed, name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        assert status == 0, error
        assert error == ""
        return output

    return run


@pytest.fixture
def tools(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, ModuleType]:
    """The scripts of hub/ as modules, and this process's client directed to the stand-in."""
    from publishing import direct_client, load_tools

    direct_client(monkeypatch, hub, tmp_path / "cache")
    return load_tools(monkeypatch, hub)


@pytest.fixture
def tensors() -> "dict[str, torch.Tensor]":
    """Weights of a small network under the official names."""
    import reference
    from converting import SMALL

    return reference.official_state_dict(**SMALL, counters=True)


@pytest.fixture(scope="session")
def embedded():
    """The network in the package, with its weights."""
    import timm

    return timm.create_model("test_tresnet", pretrained=True).eval()


@pytest.fixture(scope="session")
def artifact(tmp_path_factory, embedded):
    """A function that gives the embedded network in a format, exported once, which xdist's workers share."""
    from exporting import SUFFIXES

    from timm_tresnet import export_model

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    @functools.cache
    def export_once(format):
        file, folder = f"network{SUFFIXES[format]}", shared / f"artifact-{format}"
        if not folder.exists():
            made = tmp_path_factory.mktemp(format) / "made"
            export_model(embedded, made / file, format)
            with contextlib.suppress(OSError):  # another worker was quicker
                made.rename(folder)
        return folder / file

    return export_once


@pytest.fixture
def crops(tmp_path):
    """Crops of the package's photographs, the size of its network's images."""
    import torch
    from PIL import Image

    from timm_tresnet.utils.images import SAMPLES

    folder = tmp_path / "crops"
    folder.mkdir()
    for path in SAMPLES.glob("*.jpg"):
        with Image.open(path) as image:
            for index in range(16):
                left, top = (int(torch.randint(0, side - 64, ())) for side in image.size)
                image.crop((left, top, left + 64, top + 64)).save(folder / f"{path.stem}{index}.png")
    return folder

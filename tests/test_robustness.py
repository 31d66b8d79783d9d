"""Whatever happens to the installed package, `import torch` and `import timm` work.

Each test has an environment of its own: an interpreter whose site-packages holds this package, installed from a wheel
made here, and finds all else where the running one has it.
"""

import base64
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from interpreters import BUILTIN, OURS, STRICTLY, WHO_BUILDS

ROOT = Path(__file__).parent.parent


def make_wheel(folder, version="0.1.0", extra=()):
    """Make the wheel of `pip wheel .` without a build backend, with the additional modules in extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    files = {
        f"timm_tresnet/{path.relative_to(ROOT / 'timm_tresnet').as_posix()}": path.read_bytes()
        for path in sorted((ROOT / "timm_tresnet").rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    files |= {f"timm_tresnet/{name}.py": b"" for name in extra}
    entry_points = {"console_scripts": project["scripts"], **project["entry-points"]}
    metadata = {
        "METADATA": f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "entry_points.txt": "".join(
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
            for group, entries in entry_points.items()
        ),
    }
    info = f"timm_tresnet-{version}.dist-info"
    files |= {f"{info}/{name}": text.encode() for name, text in metadata.items()}
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(body).digest()).rstrip(b'=').decode()},{len(body)}\n"
        for name, body in files.items()
    )
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    wheel = folder / f"timm_tresnet-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return wheel


@pytest.fixture(scope="session")
def dependencies(tmp_path_factory):
    """Links to everything that is installed here except this package."""
    folder = tmp_path_factory.mktemp("dependencies")
    for entry in sys.path:
        if os.path.basename(entry) in ("site-packages", "dist-packages"):
            for path in Path(entry).iterdir():
                link = folder / path.name
                if "timm_tresnet" not in path.name and not link.is_symlink():
                    link.symlink_to(path)
    return folder


class Environment:
    """A virtual environment in a folder; `package` is where this package is, once installed."""

    def __init__(self, folder, dependencies):
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")
        self.package = self.site / "timm_tresnet"
        (self.site / "dependencies.pth").write_text(f"{dependencies}\n")

    def install(self, wheel):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.site)
        return self

    def pip(self, *arguments):
        if importlib.util.find_spec("pip") is None:  # an import of it lets PyTorch's compiler warn of distutils later
            pytest.skip("pip is not installed in this environment")
        subprocess.run(
            [sys.executable, "-m", "pip", "--isolated", "--python", self.python, *arguments],
            check=True,
            capture_output=True,
        )

    def run(self, *arguments, **variables):
        """Standard output, as words; a failure or anything on standard error fails the test."""
        process = self.run_loudly(*arguments, **variables)
        assert process.stderr == ""
        return process.stdout.split()

    def run_loudly(self, *arguments, **variables):
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TIMM_", "TORCH_"))}
        env |= {"OMP_NUM_THREADS": "1", **{name: str(value) for name, value in variables.items()}}
        process = subprocess.run(
            [self.python, *STRICTLY, *map(str, arguments)],
            env=env,
            cwd=self.site.parent,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        return process


@pytest.fixture
def environment(tmp_path, dependencies):
    return Environment(tmp_path / "environment", dependencies)


@pytest.mark.thorough
def test_new_version_replaces_the_old_one_and_uninstalling_gives_timm_its_own_back(environment, tmp_path):
    who = f"import timm_tresnet; print(timm_tresnet.__version__); {WHO_BUILDS}"
    environment.pip("install", "--no-deps", make_wheel(tmp_path, "0.0.1", extra=["removed_later"]))
    assert (environment.package / "removed_later.py").exists()
    environment.pip("install", "--no-deps", make_wheel(tmp_path, "0.1.0"))
    assert not (environment.package / "removed_later.py").exists()
    assert environment.run("-c", who) == ["0.1.0", OURS]
    (environment.package / "notes.txt").write_text("the user's own file, which pip leaves")
    environment.pip("uninstall", "--yes", "timm-tresnet")
    assert environment.package.exists()
    assert environment.run("-c", f"{WHO_BUILDS}; print(len(timm.list_pretrained('tresnet*')))") == [BUILTIN, "10"]


@pytest.mark.thorough
def test_first_of_two_versions_on_the_path_wins_whatever_metadata_is_left_over(environment, tmp_path):
    environment.install(make_wheel(tmp_path, "0.0.1", extra=["removed_later"]))
    environment.install(make_wheel(tmp_path, "0.1.0"))  # unpacked over it, metadata of both
    first = tmp_path / "first"
    with zipfile.ZipFile(make_wheel(tmp_path, "0.2.0")) as archive:
        archive.extractall(first)
    code = f"import timm_tresnet; print(timm_tresnet.__file__); {WHO_BUILDS}"
    assert environment.run("-c", code, PYTHONPATH=first) == [f"{first}/timm_tresnet/__init__.py", OURS]
    assert environment.run("-c", code) == [f"{environment.package}/__init__.py", OURS]


@pytest.mark.thorough
def test_read_only_target_folder_of_any_name_works_optimised_and_stays_as_it_is(environment, tmp_path):
    target = tmp_path / "größe 模型"
    environment.pip("install", "--no-deps", "--target", target, make_wheel(tmp_path))
    before = sorted(target.rglob("*"))
    for path in [target, *before]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        code = (
            "import timm, torch; model = timm.create_model('test_tresnet', pretrained=True)\n"
            "model(torch.rand(2, 3, 64, 64)).sum().backward(); print(type(model).__module__)\n"
            "from timm_tresnet.cli.main import main; main(['classify'])"
        )
        words = environment.run(
            "-OO", "-c", code, PYTHONPATH=target, PYTHONDONTWRITEBYTECODE=1, LC_ALL="C", PYTHONIOENCODING="utf-8"
        )
    finally:
        for path in [target, *before]:
            path.chmod(0o755)
    assert words[0] == OURS
    assert "cat" in words
    assert sorted(target.rglob("*")) == before


@pytest.mark.thorough
def test_zip_application_builds_ours_and_names_the_file_that_embedded_weights_need(environment, tmp_path):
    application = shutil.copy(make_wheel(tmp_path), tmp_path / "application.pyz")
    code = f"""
import torch
{WHO_BUILDS}
try:
    timm.create_model("test_tresnet", pretrained=True)
except FileNotFoundError:
    print("no file")
"""
    with zipfile.ZipFile(application, "a") as archive:
        archive.writestr("__main__.py", code)
    process = environment.run_loudly(application)
    assert process.stdout.split() == [OURS, "no", "file"]
    assert f"{application}/timm_tresnet/weights/test_tresnet.r64_cifar10.safetensors" in process.stderr  # timm's log


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("module", "text"),
    [("autoload", "def broken(:\n"), ("models/layers/anti_alias", None)],
    ids=["hook_with_a_syntax_error", "missing_layer"],
)
def test_fault_in_any_module_is_one_warning_and_timm_keeps_its_own(environment, tmp_path, module, text):
    environment.install(make_wheel(tmp_path))
    path = environment.package / f"{module}.py"
    path.unlink()
    if text is not None:
        path.write_text(text)
    process = environment.run_loudly("-c", f"import torch; {WHO_BUILDS}")
    assert process.stdout.split() == [BUILTIN]
    (line,) = process.stderr.splitlines()
    assert "timm keeps its own" in line
    assert path.stem in line  # what is broken


@pytest.mark.thorough
def test_missing_dependency_is_one_warning_and_timm_keeps_its_own(environment, tmp_path):
    environment.install(make_wheel(tmp_path))
    process = environment.run_loudly("-c", f"import sys; sys.modules['huggingface_hub'] = None; {WHO_BUILDS}")
    assert process.stdout.split() == [BUILTIN]
    (line,) = process.stderr.splitlines()
    assert "timm keeps its own" in line
    assert "huggingface_hub" in line


@pytest.mark.thorough
def test_workers_build_and_run_ours_however_they_start(environment, tmp_path):
    environment.install(make_wheel(tmp_path))
    script = tmp_path / "script.py"
    script.write_text(
        """
import multiprocessing
import timm
import torch

def work(model):
    assert type(model) is type(timm.create_model("test_tresnet", device="meta"))
    loss = model(torch.ones(2, 3, 64, 64)).square().sum()
    loss.backward()
    return type(model).__module__, loss.item()

if __name__ == "__main__":
    model = timm.create_model("test_tresnet", pretrained=True).train()
    for method in multiprocessing.get_all_start_methods():
        with multiprocessing.get_context(method).Pool(1) as pool:
            module, loss = pool.apply(work, (model,))
        print(method, module, loss == work(model)[1])
"""
    )
    words = environment.run(script)
    assert sorted(words[::3]) == ["fork", "forkserver", "spawn"]
    assert words[1::3] == [OURS] * 3
    assert words[2::3] == ["True"] * 3

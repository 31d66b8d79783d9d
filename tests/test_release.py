"""The sdist, the wheel, and the files that publish them."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STEM = f"timm_tresnet-{PROJECT['version']}"

missing = [name for name in ("build", "hatchling", "twine") if importlib.util.find_spec(name) is None]
needs_tools = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} of the extra test: not installed")


def run(*command, folder, **environment):
    """Output of a command that must not fail."""
    finished = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment or None, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, folder=folder)
    assert sorted(path.name for path in folder.iterdir()) == [f"{STEM}-py3-none-any.whl", f"{STEM}.tar.gz"]
    return folder


@pytest.fixture(scope="session")
def unpacked(built):
    with tarfile.open(built / f"{STEM}.tar.gz") as archive:
        archive.extractall(built / "unpacked", filter="data")
    return built / "unpacked" / STEM


@needs_tools
def test_metadata_are_what_pypi_takes(built):
    output = run(sys.executable, "-m", "twine", "check", "--strict", *built.glob("timm_tresnet*"), folder=built)
    assert output.count("PASSED") == 2


@needs_tools
def test_wheel_holds_the_package_with_its_data_and_nothing_else(built):
    with zipfile.ZipFile(built / f"{STEM}-py3-none-any.whl") as wheel:
        names = {name for name in wheel.namelist() if not name.startswith(f"{STEM}.dist-info/")}
        entry_points = wheel.read(f"{STEM}.dist-info/entry_points.txt").decode()
    files = [path for path in (ROOT / "timm_tresnet").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    recipes = {f"timm_tresnet/recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    assert names == {path.relative_to(ROOT).as_posix() for path in files} | recipes
    assert {Path(name).suffix for name in names} >= {".py", ".toml", ".jpg", ".safetensors", ".yaml"}
    assert "timm_tresnet = timm_tresnet:_autoload" in entry_points
    assert "timm-tresnet = timm_tresnet.cli.main:main" in entry_points


@pytest.mark.thorough
@needs_tools
def test_wheel_works_where_it_is_installed_alone(built, run_python, tmp_path):
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", target]
    run(*install, built / f"{STEM}-py3-none-any.whl", folder=tmp_path)
    code = (
        "import json, timm, timm_tresnet; from importlib.metadata import distribution\n"
        "files = [timm_tresnet.__file__, str(distribution('timm-tresnet').locate_file('.'))]\n"
        "model = timm.create_model('test_tresnet', pretrained=True)\n"
        "print(json.dumps([files, timm_tresnet.__version__, type(model).__module__]))\n"
        "from timm_tresnet.cli.main import main; main(['classify']); main(['recipe', 'transfer', '--show'])"
    )
    first, _, printed = run_python("-c", code, PYTHONPATH=str(target)).stdout.partition("\n")
    files, version, module = json.loads(first)
    assert all(Path(file).is_relative_to(target) for file in files)
    assert version == PROJECT["version"]
    assert module == "timm_tresnet.models.network"
    recipe = (ROOT / "recipes" / "transfer.yaml").read_text()
    assert printed.endswith(recipe)
    assert "cat" in printed.removesuffix(recipe)


@needs_tools
@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="this is no clone")
def test_sdist_holds_what_the_repository_holds(unpacked):
    tracked = run("git", "ls-files", folder=ROOT).splitlines()
    there = {path for path in tracked if (ROOT / path).exists()}
    held = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert there - held == set(), "name their folder in pyproject.toml, under tool.hatch.build.targets.sdist"


@needs_tools
@pytest.mark.thorough
def test_tests_run_from_the_sdist(unpacked, run_python):
    command = ["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", f"--rootdir={unpacked}"]
    files = [unpacked / "tests" / name for name in ("test_space_to_depth.py", "test_catalogue.py", "test_schema.py")]
    assert " passed" in run_python(*command, *files, PYTHONPATH=str(unpacked)).stdout
    collected = run_python(*command, "--collect-only", unpacked / "tests", PYTHONPATH=str(unpacked)).stdout
    assert "tests/test_release.py::test_metadata_are_what_pypi_takes" in collected


def test_changelog_has_the_version_below_what_is_unreleased():
    heads = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    if heads[0] == ("Unreleased", ""):
        del heads[0]
    assert heads[0][0] == PROJECT["version"]
    assert all(date for _, date in heads)


def test_workflows_run_ci_and_publish_without_a_secret():
    read = {path.stem: path.read_text() for path in (ROOT / ".github" / "workflows").iterdir()}
    ci, release = (yaml.safe_load(read[name])["jobs"] for name in ("ci", "release"))
    assert {"run": "bash .ci/run default lint types docs"} in ci["run"]["steps"]
    assert {"run": "bash .ci/run"} in ci["rest"]["steps"]
    assert [row["session"] for row in ci["versions"]["strategy"]["matrix"]["include"]] == ["oldest", "newest"]
    assert release["check"]["uses"] == "./.github/workflows/ci.yml"
    publish = release["publish"]
    assert set(publish["needs"]) == {"check", "build", "try"}
    assert publish["permissions"] == {"id-token": "write"}
    assert "secrets" not in read["release"]


def test_actions_are_pinned_by_commit_with_their_version():
    for path in (ROOT / ".github" / "workflows").iterdir():
        for used in re.findall(r"uses: (.+)", path.read_text()):
            assert used.startswith("./") or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+", used), used


def test_what_is_published_is_built_with_packages_of_pypi_alone():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    for part in (workflow, workflow["jobs"]["build"], workflow["jobs"]["publish"]):
        assert "index" not in str(part.get("env", "")).lower()
    assert "index" not in str(workflow["jobs"]["build"]["steps"])


def test_conda_recipe_needs_what_the_project_needs():
    recipe = yaml.safe_load((ROOT / "conda" / "recipe.yaml").read_text())
    named = {"torch": "pytorch", "huggingface-hub": "huggingface_hub"}  # on PyPI -> on conda-forge
    needed = [f"python {PROJECT['requires-python']}"]
    for requirement in PROJECT["dependencies"]:
        name, bound = re.match(r"([\w-]+)(>=.+)", requirement).groups()
        needed.append(f"{named.get(name, name)} {bound}")
    assert recipe["requirements"]["run"] == needed
    assert recipe["context"]["version"] == PROJECT["version"]
    assert recipe["about"]["summary"] == PROJECT["description"]
    scripts = [f"{name} = {function}" for name, function in PROJECT["scripts"].items()]
    assert recipe["build"]["python"]["entry_points"] == scripts

"""Breaks the package in small ways, one at a time, and counts how many of these mutants the tests notice.

    python tests/mutation.py --mutants 75 --seed 0
    python tests/mutation.py --mutants 20 recompute

Draws mutants that mutmut makes of the files of each group in GROUPS. Tests run in a copy of this tree, in processes
forked from one that has imported PyTorch and timm: once all tests of the group, to see which lines each executes, then
for each mutant those that execute its line, until one fails. Verdicts are added to a file; a mutant that is in it is
not tried again, so that an interrupted run goes on.
"""

import argparse
import difflib
import fnmatch
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import coverage
import pytest
from mutmut.mutation.file_mutation import create_mutations

ROOT = Path(__file__).resolve().parent.parent
GROUPS = {  # what is mutated, and the tests that concern it
    "conversion": (["conversion/*.py"], ["catalogue", "conversion_*", "hub_convert", "commands_convert"]),
    "tagging": (
        ["tagging/annotations.py", "tagging/folders.py", "tagging/forms.py", "tagging/scores.py"],
        ["tagging_annotations", "tagging_folders", "tagging_scores"],
    ),
    "weights": (
        ["utils/schema.py", "weights/*.py"],
        ["catalogue", "checkpoint", "config", "heads", "labels", "loading", "schema", "weights_*"],
    ),
    "recompute": (
        ["recompute/*.py"],
        [
            "compiled",
            "eligibility",
            "expla*",
            "frelu",
            "policy",
            "program",
            "recompute",
            "recompute_[abcu]*",
            "saved",
            "sharded",
            "stage",
        ],
    ),
}
_TESTS_LIMIT_S = 60  # of tests for one mutant, by the time that they take without it
_HANGING_S = 90  # further seconds after which a mutant counts as one that hangs


@dataclass(frozen=True)
class Mutant:
    """A changed file, and the line where the change begins."""

    path: str
    code: str
    line: int
    diff: str


@dataclass(frozen=True)
class Baseline:
    """Results of the tests without a mutant: CPU seconds of each test, and the tests of each line."""

    seconds: dict[str, float]
    tests: dict[str, dict[int, list[str]]]

    def choose_tests(self, mutant: Mutant) -> list[str]:
        """Those that execute the line, or the nearest above it, or where only an import does, the file.

        The tests of the file itself come first, and fast ones before slow ones.
        """
        lines = self.tests.get(mutant.path, {})
        line = max((number for number in lines if number <= mutant.line), default=0)
        own = f"_{Path(mutant.path).stem}.py"  # of conversion/run.py, tests/test_conversion_run.py
        chosen, total = [], 0.0
        for test in sorted(
            lines.get(line) or set().union(*lines.values()),
            key=lambda test: (not test.partition("::")[0].endswith(own), self.seconds[test]),
        ):
            if total < _TESTS_LIMIT_S:
                chosen.append(test)
                total += self.seconds[test]
        return chosen


class Watcher:
    """A plugin of pytest that notes which lines each test executes, and how long it takes."""

    def __init__(self, folder: Path) -> None:
        self.coverage = coverage.Coverage(data_file=None, include=[f"{folder}/timm_tresnet/*"], config_file=False)
        self.coverage.start()
        self.seconds: dict[str, float] = {}
        self.begin = time.perf_counter(), sum(os.times()[:4])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        begin = time.perf_counter()
        self.coverage.switch_context(item.nodeid)
        result = yield
        self.coverage.switch_context("")
        self.seconds[item.nodeid] = time.perf_counter() - begin
        return result

    def write(self, path: Path, folder: Path) -> None:
        self.coverage.stop()
        wall_s, cpu_s = time.perf_counter() - self.begin[0], sum(os.times()[:4]) - self.begin[1]
        seconds = {
            test: each * min(1, cpu_s / wall_s) for test, each in self.seconds.items()
        }  # others use the machine too
        data = self.coverage.get_data()
        tests = {
            str(Path(file).relative_to(folder)): {
                line: [context for context in contexts if context]
                for line, contexts in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
        }
        path.write_text(json.dumps({"seconds": seconds, "tests": tests}), encoding="utf-8")


def draw_mutants(group: str, count: int, seed: int) -> list[Mutant]:
    """Mutants of a group's files, in an order that depends on the seed alone."""
    paths = {path for pattern in GROUPS[group][0] for path in (ROOT / "timm_tresnet").glob(pattern)}
    every = []
    for path in sorted(paths):
        module, mutations, *_ = create_mutations(str(path), path.read_text(encoding="utf-8"))
        every += [(path, module, mutation) for mutation in mutations]
    drawn = random.Random(seed).sample(every, min(count, len(every)))
    return [_make_mutant(*each) for each in drawn]


def _make_mutant(path, module, mutation) -> Mutant:
    code = module.deep_replace(mutation.original_node, mutation.mutated_node).code
    before, after = module.code.splitlines(), code.splitlines()
    same = [old == new for old, new in zip(before, after, strict=False)]
    line = (same.index(False) if False in same else len(same)) + 1
    diff = [line for line in difflib.unified_diff(before, after, lineterm="", n=0) if not line.startswith("@@")]
    return Mutant(path.relative_to(ROOT).as_posix(), code, line, "\n".join(diff[2:]))


def copy_tree(folder: Path) -> None:
    """Copy the files that git tracks."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def import_what_tests_need() -> None:
    """Import slow third-party packages before processes are forked."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    for name in ("torch", "torchvision", "timm", "torch._dynamo", "huggingface_hub", "PIL.Image", "safetensors.torch"):
        importlib.import_module(name)
    del os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"]


def fork(action: Callable[[], int], limit_s: float) -> int | None:
    """Exit status of an action in a process of its own; None if it takes too long, all that it started with it."""
    pid = os.fork()
    if not pid:
        status = 3
        try:
            os.setsid()
            with open("output.txt", "w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            status = int(action())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + limit_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done or time.monotonic() > end:
            break
        time.sleep(0.05)
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    if not done:
        os.waitpid(pid, 0)
        return None
    return os.waitstatus_to_exitcode(status)


def run_tests(folder: Path, tests: Sequence[str], *plugins: object) -> int:
    """Run tests in the copy, until one fails."""
    with tempfile.TemporaryDirectory() as base:
        arguments = ["-n0", "-qx", "-p", "no:cacheprovider", "--rootdir", str(folder), "--basetemp", f"{base}/tests"]
        return pytest.main([*arguments, "-o", "filterwarnings=default", *tests], plugins=[*plugins])


def enter(folder: Path) -> None:
    """Import from the copy, here and in processes that tests start."""
    os.chdir(folder)
    sys.path[:] = [
        str(folder),
        *(entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "tests")),
    ]
    os.environ["PYTHONPATH"] = str(folder)


def watch_tests(folder: Path, group: str) -> Baseline:
    """Run all tests of a group; they must pass."""
    names = GROUPS[group][1]
    files = [
        f"tests/{path.name}"
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if any(fnmatch.fnmatch(path.stem.removeprefix("test_"), name) for name in names)
    ]
    report = folder / "baseline.json"

    def watch() -> int:
        watcher = Watcher(folder)
        status = run_tests(folder, files, watcher)
        watcher.write(report, folder)
        return status

    status = fork(watch, 3600)
    if status != 0:
        print((folder / "output.txt").read_text(encoding="utf-8"))
        raise SystemExit(f"mutation.py: the tests end with status {status} without a mutant")
    found = json.loads(report.read_text(encoding="utf-8"))
    tests = {path: {int(line): names for line, names in lines.items()} for path, lines in found["tests"].items()}
    return Baseline(found["seconds"], tests)


def try_mutant(folder: Path, mutant: Mutant, baseline: Baseline) -> str:
    """Verdict: killed, hangs or survived."""
    tests = baseline.choose_tests(mutant)
    if not tests:
        return "survived"
    path = folder / mutant.path
    original, age = path.read_text(encoding="utf-8"), path.stat().st_mtime_ns
    path.write_text(mutant.code, encoding="utf-8")
    try:
        expected_s = sum(map(baseline.seconds.__getitem__, tests))
        status = fork(lambda: run_tests(folder, tests), 3 * expected_s + _HANGING_S)
    finally:
        path.write_text(original, encoding="utf-8")
        os.utime(path, ns=(age, age))  # so that Python compiles it again
    return "hangs" if status is None else "killed" if status else "survived"


class Verdicts:
    """Verdicts by mutant, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._found = {(seen["path"], seen["line"], seen["diff"]): seen["verdict"] for seen in map(json.loads, lines)}

    def __getitem__(self, mutant: Mutant) -> str | None:
        return self._found.get((mutant.path, mutant.line, mutant.diff))

    def __setitem__(self, mutant: Mutant, verdict: str) -> None:
        self._found[mutant.path, mutant.line, mutant.diff] = verdict
        seen = {"path": mutant.path, "line": mutant.line, "diff": mutant.diff, "verdict": verdict}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(seen) + "\n")


def try_group(folder: Path, group: str, drawn: Sequence[Mutant], verdicts: Verdicts) -> None:
    """Try those of a group's mutants that have no verdict."""
    new = [mutant for mutant in drawn if verdicts[mutant] is None]
    if new:
        baseline = watch_tests(folder, group)
        print(f"{group}: {len(baseline.seconds)} tests pass in {sum(baseline.seconds.values()):.0f} s", flush=True)
        for mutant in new:
            verdicts[mutant] = try_mutant(folder, mutant, baseline)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: arguments without the script's name; None for those of the process.

    Returns:
        Exit status 0.
    """
    parser = argparse.ArgumentParser(description="Count the mutants of the package that the tests notice.")
    parser.add_argument("groups", nargs="*", help=f"which of {', '.join(GROUPS)}, by default all", metavar="group")
    parser.add_argument("--mutants", type=int, default=75, help="how many to draw in each group (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verdicts", type=Path, default=Path("mutants.jsonl"), help="default: %(default)s")
    arguments = parser.parse_args(argv)
    groups = arguments.groups or list(GROUPS)
    if unknown := set(groups) - set(GROUPS):
        parser.error(f"no group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    verdicts = Verdicts(arguments.verdicts.resolve())
    os.chdir(ROOT)  # where mutmut finds its settings
    drawn = {group: draw_mutants(group, arguments.mutants, arguments.seed) for group in groups}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy_tree(folder)
        enter(folder)
        import_what_tests_need()
        for group, mutants in drawn.items():
            try_group(folder, group, mutants, verdicts)
    rows = []
    for group, mutants in drawn.items():
        survivors = [mutant for mutant in mutants if verdicts[mutant] == "survived"]
        rows.append((group, len(mutants), len(mutants) - len(survivors), len(survivors)))
        for mutant in survivors:
            print(f"\n{mutant.path}:{mutant.line}\n{mutant.diff}")
    rows.append(("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    print("\n| group | mutants | killed | not |\n|---|---|---|---|")
    for row in rows:
        print("| {} | {} | {} | {} |".format(*row))
    return 0


if __name__ == "__main__":
    sys.exit(main())

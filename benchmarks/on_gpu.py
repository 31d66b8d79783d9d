"""First measurements on a GPU in a few minutes: tests, training eager and compiled, memory, inference, profiles.

    python benchmarks/on_gpu.py --minutes 8 --json benchmarks/results/on_gpu_NAME.json

Rows run in the order of their value, and each is written as soon as it is measured. The same command resumes where it
stopped. A row that fails is recorded with the reason; `--retry` runs it again. A row that would not finish in time,
estimated from finished rows, is left for the next run.

- tests: outcomes of `tests/test_gpu.py`.
- training: kept, peak and step time as in `training_memory.py`, channels-last, by precision and batch: eager, compiled,
  and compiled with CUDA graphs. Ratios are to timm's built-in, which takes turns with the row's network.
- largest batch: in 16 GB, eager.
- inference: as in `inference.py`, compiled by `optimize_for_inference`; max-autotune in a process with a time limit.
- profile: the kernels of a compiled step.

`--device cpu --tiny` rehearses everything with a tiny network; rows that need CUDA are recorded as left out.
"""

import argparse
import contextlib
import functools
import gc
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import inference
import torch
import training_memory
from command_line import format_command
from schema import load_results
from torch import nn
from training_memory import BUILTIN, COMPILED, GRAPHS

from timm_tresnet.bench.results import start_results
from timm_tresnet.cli.options import at_least
from timm_tresnet.utils.files import atomic_write

TESTS = Path(__file__).parents[1] / "tests" / "test_gpu.py"
INFERENCE = Path(__file__).with_name("inference.py")
NETWORKS = (BUILTIN, "activations", "resnet50", "expansions", "checkpointing")  # the reference first
STEPS = ("tests", "training", "graphs", "largest batch", "inference", "profile")
_GUESSES_S = {  # kind of row -> estimated seconds before the first one has run
    "tests": 60,  # with less time, starting is not worth it
    "eager": 15,
    "compiled": 60,
    "graphs": 60,
    "largest batch": 30,
    "inference": 60,
    "max-autotune": 60,
    "profile": 15,
}
_LIMITS_S = {"tests": 150, "max-autotune": 180}  # time limits of rows in processes of their own
_OUTCOME = re.compile(r"^(\S*::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)  # output of pytest -v


class LeftOut(Exception):
    """A row cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Group:
    """Training rows that are compared with each other; their networks are in memory together.

    Args:
        mode: "eager", "compiled" or "graphs".
        amp: dtype of autocast.
        batch_size: images in a batch.
    """

    mode: str
    amp: str
    batch_size: int

    def __str__(self) -> str:
        return f"{self.mode}, {self.amp}, batch {self.batch_size}"

    def find_row(self, network: str) -> str:
        """Return the name of a network's row in `training_memory.py`."""
        prefix = {"eager": "", "compiled": COMPILED, "graphs": GRAPHS}[self.mode]
        return "-".join(filter(None, [prefix, "" if prefix and network == BUILTIN else network]))


@dataclass
class Job:
    """One row.

    Args:
        name: name in the results.
        step: one of STEPS.
        kind: kind of row; rows of a kind take about the same time.
        measure: measures and returns the row's fields; its argument is the remaining time in seconds.
    """

    name: str
    step: str
    kind: str
    measure: Callable[[float], dict[str, Any]]


@dataclass
class Bench:
    """State that rows share: the options, the present group's networks, and the built-in's memory."""

    settings: argparse.Namespace
    group: Group | None = None
    networks: dict[str, nn.Module] = field(default_factory=dict)
    builtin: dict[str, int | None] = field(default_factory=dict)
    builtin_failed: bool = False

    def enter(self, group: Group | None) -> None:
        """Switch to a group; free another group's networks and compiled code."""
        if group != self.group:
            self.networks.clear()
            self.builtin.clear()
            self.builtin_failed = False
            torch.compiler.reset()
            self.group = group
        gc.collect()
        torch.cuda.empty_cache()

    def parse_training(self, group: Group, *words: str) -> argparse.Namespace:
        """Return options of `training_memory.py` for a group."""
        common = ["--device", self.settings.device, "--model", self.settings.model, "--channels-last"]
        sizes = ["--image-size", str(self.settings.image_size), "--batch-size", str(group.batch_size)]
        sizes += ["--time-batch-size", str(group.batch_size), "--rounds", str(self.settings.rounds)]
        parsed = training_memory.parse([*common, *sizes, *words])
        # A float16 step takes minutes on a CPU, so rehearsals use float32.
        parsed.amp = None if self.settings.device == "cpu" and group.amp == "float16" else group.amp
        return parsed

    def prepare(self, network: str, group: Group, settings: argparse.Namespace) -> dict[str, int | None]:
        """Make a group's network, compile it and measure its memory."""
        row = group.find_row(network)
        self.networks[network] = training_memory.make_row(row, settings)
        return training_memory.measure_network(row, self.networks[network], settings)

    def measure_training(self, network: str, group: Group, left_s: float) -> dict[str, Any]:
        """Measure kept, peak and times of a network, with ratios to the built-in."""
        if group.mode == "graphs" and self.settings.device == "cpu":
            raise LeftOut("CUDA graphs need --device cuda")
        self.enter(group)
        settings = self.parse_training(group, *self._no_search())
        if not self.builtin and not self.builtin_failed:
            self.builtin_failed = (
                True  # until it succeeds; after a failure, rows have no ratios and do not try it again
            )
            self.builtin.update(self.prepare(BUILTIN, group, settings))
            self.builtin_failed = False
        memory = {BUILTIN: self.builtin} if self.builtin else {}
        if network not in memory:
            memory[network] = self.prepare(network, group, settings)
        step_ms = training_memory.measure_times({name: self.networks[name] for name in memory}, settings)
        measured = training_memory.summarize(memory, step_ms, group.batch_size)[-1]
        return {"group": str(group), **measured}

    def _no_search(self) -> list[str]:
        return ["--max-batch", "0"] if self.settings.device == "cuda" else []

    def measure_largest_batch(self, network: str, group: Group, left_s: float) -> dict[str, Any]:
        """Measure the largest batch in 16 GB on a GPU; on the CPU, where all fit, a small limit."""
        self.enter(None)
        settings = self.parse_training(group, *(["--memory-gb", "16"] if self.settings.device == "cuda" else []))
        if self.settings.device == "cpu":
            settings.max_batch = 3
        plain = training_memory.make_row(network, settings)
        memory = training_memory.measure_network(network, plain, settings)
        return {"largest_batch": training_memory.measure_largest_batch(plain, settings, memory["peak"])}

    def profile(self, network: str, group: Group, left_s: float) -> dict[str, Any]:
        """Profile a training step."""
        self.enter(group)
        settings = self.parse_training(group, *self._no_search())
        if network not in self.networks:
            self.networks[network] = training_memory.make_row(group.find_row(network), settings)
        return {"table": training_memory.profile_network(group.find_row(network), self.networks[network], settings)}

    def find_inference_words(self, *rows: str) -> list[str]:
        words = ["--device", self.settings.device, "--model", self.settings.model]
        words += ["--image-size", str(self.settings.image_size), "--rounds", str(self.settings.rounds)]
        return [*words, "--batch-sizes", str(self.settings.inference_batch_size), "--rows", *rows]

    def measure_inference(self, row: str, left_s: float) -> dict[str, Any]:
        """Measure images a second of a row of `inference.py`, with ratios to the built-in."""
        self.enter(None)
        settings = inference.parse(self.find_inference_words(*dict.fromkeys([BUILTIN, row])))
        settings.batch = self.settings.inference_batch_size
        measured = inference.measure(settings)[-1]
        torch.compiler.reset()
        return {**measured, "engine": inference.ROWS[row][1]}

    def measure_autotuned(self, row: str, left_s: float) -> dict[str, Any]:
        """Measure a row of `inference.py` with max-autotune, in a process with a time limit."""
        self.enter(None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "inference.json"
            words = [*self.find_inference_words(BUILTIN, row), "--mode", "max-autotune", "--json", str(path)]
            run_process([sys.executable, str(INFERENCE), *words], min(_LIMITS_S["max-autotune"], left_s))
            return {**json.loads(path.read_text())["rows"][-1], "engine": "max-autotune"}


class Unfinished(Exception):
    """A process that was not done at its time limit; output is what it had printed by then."""

    def __init__(self, limit_s: float, output: str) -> None:
        super().__init__(f"not done after {limit_s:.0f} s")
        self.output = output


def run_process(command: Sequence[str], limit_s: float, done: Sequence[int] = (0,)) -> str:
    """Run a process and return its output; at its time limit, it is killed with all of its children.

    Args:
        command: words of the command line.
        limit_s: time limit, in seconds.
        done: exit statuses that mean success.

    Raises:
        Unfinished: at the time limit.
        ChildProcessError: if the process ends with another status; the message has the last line of its output.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):  # the compiler's workers too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read()
    if status is None:
        raise Unfinished(limit_s, text)
    if status not in done:
        last = (text.strip().splitlines() or ["no output"])[-1]
        raise ChildProcessError(f"ended with status {status}: {last}")
    return text


def run_tests(left_s: float) -> dict[str, Any]:
    """Run the tests and count outcomes, including those of tests finished before the time limit."""
    command = [sys.executable, "-m", "pytest", "-o", "filterwarnings=", "-o", "addopts=", "-v", "-rN", "--tb=short"]
    reason = {}
    try:
        text = run_process([*command, str(TESTS)], min(_LIMITS_S["tests"], left_s), done=(0, 1))
    except Unfinished as error:
        text = error.output
        reason = {"unfinished": str(error)}
    outcomes: dict[str, str] = dict(_OUTCOME.findall(text))
    counts = Counter(outcomes.values())
    failed = sorted(name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR"))
    numbers = {outcome.lower(): counts[outcome] for outcome in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    return {**numbers, "failures": failed, **reason}


def list_jobs(bench: Bench) -> list[Job]:
    """List all rows in the order of their value."""
    small, large = bench.settings.batch_sizes
    jobs = [Job("tests", "tests", "tests", run_tests)]

    def train(mode: str, amp: str, batch_size: int, networks: Sequence[str] = NETWORKS) -> None:
        group = Group(mode, amp, batch_size)
        step = "graphs" if mode == "graphs" else "training"
        for network in networks:
            measure = functools.partial(bench.measure_training, network, group)
            jobs.append(Job(f"{group}: {network}", step, mode, measure))

    def profile(mode: str, amp: str, batch_size: int) -> None:
        group = Group(mode, amp, batch_size)
        for network in ("activations", BUILTIN):  # after the group's rows, which have compiled these networks
            measure = functools.partial(bench.profile, network, group)
            jobs.append(Job(f"profile of {group}: {network}", "profile", "profile", measure))

    train("eager", "float16", small, [*NETWORKS, "none"])
    train("eager", "float16", large, [*NETWORKS, "none"])
    train("compiled", "float16", large, NETWORKS[:4])
    profile("compiled", "float16", large)
    train("graphs", "float16", small, NETWORKS[:3])
    for network in NETWORKS:
        measure = functools.partial(bench.measure_largest_batch, network, Group("eager", "float16", small))
        jobs.append(Job(f"largest batch in 16 GB: {network}", "largest batch", "largest batch", measure))
    for row in (BUILTIN, COMPILED, "resnet50, compiled"):
        jobs.append(Job(f"inference: {row}", "inference", "inference", functools.partial(bench.measure_inference, row)))
    train("compiled", "bfloat16", large, NETWORKS[:4])
    train("compiled", "float16", small)
    train("eager", "bfloat16", small)
    train("eager", "bfloat16", large)
    train("graphs", "float16", large)
    measure = functools.partial(bench.measure_autotuned, COMPILED)
    jobs.append(Job("inference: compiled, max-autotune", "inference", "max-autotune", measure))
    train("compiled", "bfloat16", small)
    train("graphs", "bfloat16", small)
    train("graphs", "bfloat16", large)
    return [job for job in jobs if job.step in bench.settings.steps]


def estimate_s(kind: str, rows: Sequence[dict[str, Any]]) -> float:
    """Estimate the seconds of a row by its kind: the longest finished one, or a guess."""
    seconds = [row["seconds"] for row in rows if row["kind"] == kind and "reason" not in row]
    return max(seconds, default=_GUESSES_S[kind])


def run_jobs(
    jobs: Sequence[Job],
    results: dict[str, Any],
    save: Callable[[], None],
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Run the jobs without results while there is time; return the names of the jobs that are left.

    Args:
        jobs: all jobs, in order.
        results: the results; each job adds a row to `rows`, and `running` names the present job.
        save: called after each change of the results.
        seconds: time for all jobs.
        clock: returns the time in seconds.
    """
    end, there, left = clock() + seconds, {row["row"] for row in results["rows"]}, []
    for job in jobs:
        start = clock()
        if job.name in there:
            continue
        if start + estimate_s(job.kind, results["rows"]) > end:
            left.append(job.name)
            continue
        print(f"{end - start:.0f} s left: {job.name}", file=sys.stderr, flush=True)
        results["running"] = job.name
        save()
        row: dict[str, Any] = {"row": job.name, "step": job.step, "kind": job.kind}
        try:
            measured = job.measure(end - start)
        except KeyboardInterrupt:
            del results["running"]
            save()
            raise
        except LeftOut as error:
            measured = {"reason": str(error)}
        except (Exception, SystemExit) as error:  # whatever happens, the other rows are still useful
            measured = {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            print(f"failed: {measured['reason']}", file=sys.stderr, flush=True)
        row |= {"name": measured.pop("row", job.name), "seconds": round(clock() - start, 1), **measured}
        results["rows"].append(row)
        del results["running"]
        save()
        if "reason" in measured and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # raises if the device is lost to this process
    return left


def resume(path: Path, results: dict[str, Any], retry: bool) -> None:
    """Copy the rows of an earlier run of the same command.

    Args:
        path: file of the earlier run.
        results: the new results; settings, GPU and versions must be equal.
        retry: drop rows that failed, so that they run again.

    Raises:
        ValueError: if the file is not from this script, or was made with other settings, versions or GPU.
    """
    earlier = load_results(path)
    kept = ["settings", "versions"]
    for name, own, other in [
        *((name, results[name], earlier[name]) for name in kept),
        ("gpu", results["hardware"]["gpu"], earlier["hardware"].get("gpu")),
    ]:
        if own != other:
            raise ValueError(f"{path} was made with {name} {other}, this run has {own}; name another file")
    rows = earlier["rows"]
    if "running" in earlier:
        rows.append({"row": earlier["running"], "step": "", "kind": "", "seconds": 0.0})
        rows[-1]["reason"] = "the process ended while it ran"
    results["rows"] = [row for row in rows if not (retry and "reason" in row)]


def format_report(rows: Sequence[dict[str, Any]]) -> str:
    """Format the results as Markdown: a table for each group of training rows, then the other rows."""
    parts = []
    measured = [{**row, "row": row["name"]} for row in rows if "reason" not in row]
    for row in measured:
        if row["step"] == "tests":
            counts = ", ".join(f"{row[name]} {name}" for name in ("passed", "failed", "error", "skipped"))
            lines = [f"{TESTS.name}: {counts}", *row["failures"]]
            parts.append("\n".join([*lines, *filter(None, [row.get("unfinished")])]))
    for group in dict.fromkeys(row["group"] for row in measured if "group" in row):
        of_group = [row for row in measured if row.get("group") == group]
        parts.append(f"{group}:\n\n{training_memory.format_table(of_group)}")
    largest = [row for row in measured if row["step"] == "largest batch"]
    if largest:
        parts.append("\n".join(f"{row['row']}: {row['largest_batch']}" for row in largest))
    speeds = [{**row, "row": f"{row['row']}, {row['engine']}"} for row in measured if row["step"] == "inference"]
    if speeds:
        parts.append(inference.format_table(speeds))
    parts += [row["table"] for row in measured if row["step"] == "profile"]
    reasons = [f"- {row['row']}: {row['reason']}" for row in rows if "reason" in row]
    if reasons:
        parts.append("\n".join(["Not measured:", *reasons]))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as many rows as there is time for, and print tables of all rows in the file."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description="First measurements on a GPU in a few minutes.")
    parser.add_argument(
        "--minutes", type=at_least(0, float), default=8.0, help="time for all rows (default: %(default)g)"
    )
    parser.add_argument(
        "--json", type=Path, required=True, metavar="FILE", help="file for the results; resumed if it exists"
    )
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="default: all")
    parser.add_argument("--retry", action="store_true", help="run failed rows again")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="rehearse with a tiny network")
    settings = parser.parse_args(words)
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and PyTorch finds none; rehearse with --device cpu --tiny")
    if settings.device == "cpu" and not settings.tiny:
        parser.error("--device cpu is only a rehearsal and needs --tiny; to measure on the CPU, use training_memory.py")
    tiny = settings.tiny
    settings.model, settings.image_size = ("test_tresnet", 64) if tiny else ("tresnet_m", 224)
    settings.batch_sizes, settings.inference_batch_size = ((2, 3), 2) if tiny else ((128, 512), 256)
    settings.batch_sizes, settings.rounds = list(settings.batch_sizes), 1 if tiny else 5
    torch.manual_seed(0)
    command = format_command(__file__, words)
    results = start_results(command, settings.device, settings, unrecorded=("minutes", "retry", "steps"))
    if settings.json.exists():
        try:
            resume(settings.json, results, settings.retry)
        except ValueError as error:
            parser.error(str(error))

    def save() -> None:
        with atomic_write(settings.json) as unfinished:
            unfinished.write_text(json.dumps(results, indent=2) + "\n")

    save()
    try:
        left = run_jobs(list_jobs(Bench(settings)), results, save, 60 * settings.minutes)
    except KeyboardInterrupt:
        return 130
    finally:
        print(format_report(results["rows"]))
    if left:
        print("\n".join(["", "Left for the next run of the same command:", *(f"- {name}" for name in left)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a GPU is asked first, in a few minutes: its tests, training eager and compiled, memory, inference, profiles.

    python benchmarks/on_gpu.py --minutes 8 --json benchmarks/results/on_gpu_NAME.json

Rows run in the order of what they are worth, and each is in the file as soon as it is measured. The same command goes
on where it stopped. A row that fails is there with its reason, and is not run again without `--retry`. A row that
would not be done in time, going by those that ran, is left for the next run.

- tests: `tests/test_gpu.py`, counted.
- training: kept, peak and step time as in `training_memory.py`, channels-last, by precision and batch: eager, compiled,
  and compiled with CUDA graphs. Ratios are to timm's built-in, run in turns with the row's network.
- largest batch: in 16 GB, eager.
- inference: as in `inference.py`, compiled by `optimize_for_inference`; max-autotune in a process that is ended when
  its time is over.
- profile: the kernels of a compiled step.

`--device cpu --tiny` rehearses all of it with a tiny network; what CUDA alone has is left out, with that as the reason.
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
from timm_tresnet.utils.files import whole

TESTS = Path(__file__).parents[1] / "tests" / "test_gpu.py"
INFERENCE = Path(__file__).with_name("inference.py")
NETWORKS = (BUILTIN, "activations", "resnet50", "expansions", "checkpointing")  # the one of ratios first
STEPS = ("tests", "training", "graphs", "largest batch", "inference", "profile")
_GUESSES_S = {  # kind of a row -> seconds, as long as none has run
    "tests": 60,  # less would not be worth starting
    "eager": 15,
    "compiled": 60,
    "graphs": 60,
    "largest batch": 30,
    "inference": 60,
    "max-autotune": 60,
    "profile": 15,
}
_LIMITS_S = {"tests": 150, "max-autotune": 180}  # of rows that are processes of their own
_OUTCOME = re.compile(r"^(\S*::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)  # as pytest -v has it


class LeftOut(Exception):
    """Why a row cannot be measured here."""


@dataclass(frozen=True)
class Group:
    """Training rows that are compared with each other, whose networks are held together.

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
        """Name of a network's row in `training_memory.py`."""
        prefix = {"eager": "", "compiled": COMPILED, "graphs": GRAPHS}[self.mode]
        return "-".join(filter(None, [prefix, "" if prefix and network == BUILTIN else network]))


@dataclass
class Job:
    """One row.

    Args:
        name: as it stands in the results.
        step: one of STEPS.
        kind: of the rows that take about as long as this one.
        measure: returns the row's fields; takes the seconds that are left.
    """

    name: str
    step: str
    kind: str
    measure: Callable[[float], dict[str, Any]]


@dataclass
class Bench:
    """What rows share: the options, and a group's networks with what was measured of the built-in."""

    settings: argparse.Namespace
    group: Group | None = None
    networks: dict[str, nn.Module] = field(default_factory=dict)
    builtin: dict[str, int | None] = field(default_factory=dict)
    builtin_failed: bool = False

    def enter(self, group: Group | None) -> None:
        """Let go of another group's networks and compiled code."""
        if group != self.group:
            self.networks.clear()
            self.builtin.clear()
            self.builtin_failed = False
            torch.compiler.reset()
            self.group = group
        gc.collect()
        torch.cuda.empty_cache()

    def parse_training(self, group: Group, *words: str) -> argparse.Namespace:
        """Options of `training_memory.py` for a group."""
        common = ["--device", self.settings.device, "--model", self.settings.model, "--channels-last"]
        sizes = ["--image-size", str(self.settings.image_size), "--batch-size", str(group.batch_size)]
        sizes += ["--time-batch-size", str(group.batch_size), "--rounds", str(self.settings.rounds)]
        parsed = training_memory.parse([*common, *sizes, *words])
        # CPUs take minutes for a step in float16, so that a rehearsal's is in float32.
        parsed.amp = None if self.settings.device == "cpu" and group.amp == "float16" else group.amp
        return parsed

    def prepare(self, network: str, group: Group, settings: argparse.Namespace) -> dict[str, int | None]:
        """Have a group's network there, compiled and measured once; returns its memory."""
        row = group.find_row(network)
        self.networks[network] = training_memory.make_row(row, settings)
        return training_memory.measure_network(row, self.networks[network], settings)

    def measure_training(self, network: str, group: Group, left_s: float) -> dict[str, Any]:
        """Kept, peak and times of a network, with ratios to the built-in."""
        if group.mode == "graphs" and self.settings.device == "cpu":
            raise LeftOut("CUDA graphs need --device cuda")
        self.enter(group)
        settings = self.parse_training(group, *self._no_search())
        if not self.builtin and not self.builtin_failed:
            self.builtin_failed = True  # unless it ends; rows then have no ratios, and do not wait for it again
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
        """Largest batch in 16 GB, on a GPU; on the CPU, where all fit, the last one that is tried."""
        self.enter(None)
        settings = self.parse_training(group, *(["--memory-gb", "16"] if self.settings.device == "cuda" else []))
        if self.settings.device == "cpu":
            settings.max_batch = 3
        plain = training_memory.make_row(network, settings)
        memory = training_memory.measure_network(network, plain, settings)
        return {"largest_batch": training_memory.measure_largest_batch(plain, settings, memory["peak"])}

    def profile(self, network: str, group: Group, left_s: float) -> dict[str, Any]:
        """Table of where a training step's time goes."""
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
        """Images a second of a row of `inference.py`, with ratios to the built-in."""
        self.enter(None)
        settings = inference.parse(self.find_inference_words(*dict.fromkeys([BUILTIN, row])))
        settings.batch = self.settings.inference_batch_size
        measured = inference.measure(settings)[-1]
        torch.compiler.reset()
        return {**measured, "engine": inference.ROWS[row][1]}

    def measure_autotuned(self, row: str, left_s: float) -> dict[str, Any]:
        """The same with max-autotune, in a process that has its time."""
        self.enter(None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "inference.json"
            words = [*self.find_inference_words(BUILTIN, row), "--mode", "max-autotune", "--json", str(path)]
            run_process([sys.executable, str(INFERENCE), *words], min(_LIMITS_S["max-autotune"], left_s))
            return {**json.loads(path.read_text())["rows"][-1], "engine": "max-autotune"}


def run_process(command: Sequence[str], limit_s: float, done: Sequence[int] = (0,)) -> str:
    """Output of a process, which is ended with all that it started when its time is over.

    Args:
        command: words of the command line.
        limit_s: its time, in seconds.
        done: exit statuses of a process that did what it was asked.

    Raises:
        TimeoutError: if its time was over; its second argument is the output until then.
        ChildProcessError: if it ended with another status; says the last line of its output.
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
        raise TimeoutError(f"not done after {limit_s:.0f} s", text)
    if status not in done:
        last = (text.strip().splitlines() or ["no output"])[-1]
        raise ChildProcessError(f"ended with status {status}: {last}")
    return text


def run_tests(left_s: float) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, also of those that were done when the time was over."""
    command = [sys.executable, "-m", "pytest", "-o", "filterwarnings=", "-o", "addopts=", "-v", "-rN", "--tb=short"]
    reason = {}
    try:
        text = run_process([*command, str(TESTS)], min(_LIMITS_S["tests"], left_s), done=(0, 1))
    except TimeoutError as error:
        message, text = error.args
        reason = {"unfinished": message}
    outcomes: dict[str, str] = dict(_OUTCOME.findall(text))
    counts = Counter(outcomes.values())
    failed = sorted(name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR"))
    numbers = {outcome.lower(): counts[outcome] for outcome in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    return {**numbers, "failures": failed, **reason}


def list_jobs(bench: Bench) -> list[Job]:
    """Every row, in the order of what it is worth."""
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
        for network in ("activations", BUILTIN):  # behind the group's rows, whose networks are compiled
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
    """Seconds that a row of a kind may take: the longest of those that ran, or a guess."""
    seconds = [row["seconds"] for row in rows if row["kind"] == kind and "reason" not in row]
    return max(seconds, default=_GUESSES_S[kind])


def run_jobs(
    jobs: Sequence[Job],
    results: dict[str, Any],
    save: Callable[[], None],
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Run what is not in the results yet, as long as the time is enough; returns the names of what is left.

    Args:
        jobs: in the order in which they run.
        results: `rows` gets one for each; `running` names the one that runs.
        save: called when the results have changed.
        seconds: the time for all.
        clock: in seconds.
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
        except (Exception, SystemExit) as error:  # whatever it is, the other rows are worth having
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
    """Take over the rows of a file that the same command left.

    Args:
        path: the file.
        results: those that begin, whose settings, GPU and versions are compared.
        retry: leave out rows that failed.

    Raises:
        ValueError: if the file is not of this script, or was made with other settings or elsewhere.
    """
    earlier = load_results(path)
    kept = ["settings", "versions"]
    for name, own, other in [
        *((name, results[name], earlier[name]) for name in kept),
        ("gpu", results["hardware"]["gpu"], earlier["hardware"].get("gpu")),
    ]:
        if own != other:
            raise ValueError(f"{path} was made with {name} {other}, and these are {own}; name another file")
    rows = earlier["rows"]
    if "running" in earlier:
        rows.append({"row": earlier["running"], "step": "", "kind": "", "seconds": 0.0})
        rows[-1]["reason"] = "the process ended while it ran"
    results["rows"] = [row for row in rows if not (retry and "reason" in row)]


def format_report(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of the results as Markdown: a table for each group of training rows, and what else there is."""
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
    """Measure what there is time for, and print tables of all that the file has by then."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description="What a GPU is asked first, in a few minutes.")
    parser.add_argument("--minutes", type=at_least(0, float), default=8.0, help="for all rows (default: %(default)g)")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="file for the results; goes on there")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="default: all")
    parser.add_argument("--retry", action="store_true", help="run rows again that failed")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny network, as a rehearsal")
    settings = parser.parse_args(words)
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and PyTorch finds none; --device cpu --tiny is a rehearsal")
    if settings.device == "cpu" and not settings.tiny:
        parser.error("--device cpu is for a rehearsal and needs --tiny; training_memory.py measures there")
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
        with whole(settings.json) as unfinished:
            unfinished.write_text(json.dumps(results, indent=2) + "\n")

    save()
    try:
        left = run_jobs(list_jobs(Bench(settings)), results, save, 60 * settings.minutes)
    except KeyboardInterrupt:
        return 130
    finally:
        print(format_report(results["rows"]))
    if left:
        print("\n".join(["", "Left for the same command again:", *(f"- {name}" for name in left)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

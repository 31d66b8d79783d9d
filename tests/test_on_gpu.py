"""benchmarks/on_gpu.py, rehearsed on the CPU: every row with a tiny network, and failing rows."""

import contextlib
import json
import time

import pytest
import timm
import torch
from scripts import load_script

REHEARSAL = ["--device", "cpu", "--tiny", "--minutes", "60"]


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    script = load_script("benchmarks/on_gpu.py")
    make_network = script.training_memory.make_network

    def make_small(name, **kwargs):
        return make_network("test_resnet" if name == "resnet50" else name, **kwargs)

    monkeypatch.setattr(script.training_memory, "make_network", make_small)
    monkeypatch.setattr(torch, "compile", lambda network, **kwargs: network)  # takes minutes for so many rows
    tests = tmp_path / "test_three.py"
    tests.write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert not 'FAILED'\n"
        "@pytest.mark.skip\ndef test_none(): pass\n"
    )
    monkeypatch.setattr(script, "TESTS", tests)
    return script


def run(on_gpu, path, *words):
    """Rows of the results by name."""
    assert on_gpu.main([*REHEARSAL, "--json", str(path), *words]) == 0
    return {row["row"]: row for row in on_gpu.load_results(path)["rows"]}


@pytest.mark.thorough
def test_a_few_rows_are_rehearsed_on_the_cpu(on_gpu, tmp_path, monkeypatch, capsys):
    chosen = {
        "tests",
        "eager, float16, batch 2: activations",
        "graphs, float16, batch 2: built-in",
        "largest batch in 16 GB: activations",
        "profile of compiled, float16, batch 3: activations",
    }
    list_jobs = on_gpu.list_jobs
    monkeypatch.setattr(on_gpu, "list_jobs", lambda bench: [job for job in list_jobs(bench) if job.name in chosen])
    rows = run(on_gpu, tmp_path / "results.json")
    assert set(rows) == chosen
    tests = rows["tests"]
    assert (tests["passed"], tests["failed"], tests["error"], tests["skipped"]) == (1, 1, 0, 1)
    assert tests["failures"][0].endswith("test_three.py::test_bad")
    trained = rows["eager, float16, batch 2: activations"]
    assert 0 < trained["kept_ratio"] < 1
    assert len(trained["step_ms"]) == len(trained["step_ratios"]) == 1
    assert rows["graphs, float16, batch 2: built-in"]["reason"] == "CUDA graphs need --device cuda"
    assert rows["largest batch in 16 GB: activations"]["largest_batch"] == 3
    printed = capsys.readouterr().out
    assert "eager, float16, batch 2:\n\n|" in printed
    assert "| compiled-activations, batch 3 | ms of " in printed
    assert "- graphs, float16, batch 2: built-in: CUDA graphs need --device cuda" in printed


@pytest.mark.thorough
def test_every_row_is_rehearsed_on_the_cpu(on_gpu, tmp_path, monkeypatch, capsys):
    def run_here(command, limit_s, done=(0,)):
        if "pytest" in command:
            return run_process(command, limit_s, done)
        on_gpu.inference.main(command[2:])
        return ""

    monkeypatch.setattr(on_gpu, "NETWORKS", on_gpu.NETWORKS[:2])
    run_process = on_gpu.run_process
    monkeypatch.setattr(on_gpu, "run_process", run_here)
    monkeypatch.setattr(on_gpu.inference, "timm", SmallResNet)
    rows = run(on_gpu, tmp_path / "results.json")
    bench = on_gpu.Bench(
        on_gpu.argparse.Namespace(device="cpu", batch_sizes=[2, 3], inference_batch_size=2, steps=on_gpu.STEPS)
    )
    assert list(rows) == [job.name for job in on_gpu.list_jobs(bench)]
    assert {name for name, row in rows.items() if "reason" in row} == {
        name for name, row in rows.items() if row["kind"] == "graphs"
    }
    assert rows["graphs, float16, batch 2: built-in"]["reason"] == "CUDA graphs need --device cuda"

    for row in rows.values():
        if "group" in row:
            assert row["kept_mb"] > 0
            assert len(row["step_ms"]) == len(row["step_ratios"]) == 1
    eager = {name: rows[f"eager, float16, batch 2: {name}"] for name in ("built-in", "activations", "none")}
    assert eager["built-in"]["kept_ratio"] == eager["none"]["kept_ratio"] == 1 > eager["activations"]["kept_ratio"]
    assert all(rows[f"largest batch in 16 GB: {name}"]["largest_batch"] == 3 for name in on_gpu.NETWORKS)

    printed = capsys.readouterr().out
    assert "compiled, bfloat16, batch 3:\n\n|" in printed
    assert "| compiled, max-autotune | 2 |" in printed


def test_networks_are_rows_of_training_memory(on_gpu):
    settings = on_gpu.argparse.Namespace(batch_sizes=[128, 512], steps=on_gpu.STEPS)
    jobs = on_gpu.list_jobs(on_gpu.Bench(settings))
    assert len({job.name for job in jobs}) == len(jobs)
    assert {job.step for job in jobs} == set(on_gpu.STEPS)
    for job in jobs:
        assert job.kind in on_gpu._GUESSES_S
        if job.step in ("training", "graphs"):
            network, group = job.measure.args
            assert group.find_row(network) in on_gpu.training_memory.EVERY_ROW
    groups = [job.measure.args[1] for job in jobs if job.step in ("training", "graphs", "profile")]
    assert len(set(groups)) == 3 * 2 * 2
    # Each group's rows are behind one another, so that its networks are compiled once.
    changes = sum(before != after for before, after in zip(groups, groups[1:], strict=False))
    assert changes == len(set(groups)) - 1


class SmallResNet:
    """timm for a script that asks for ResNet-50."""

    @staticmethod
    def create_model(name, **kwargs):
        return timm.create_model("test_resnet" if name == "resnet50" else name, **kwargs)


def test_rows_are_written_one_by_one_and_not_measured_again(on_gpu, tmp_path, monkeypatch):
    path, measured = tmp_path / "results.json", []

    def measure(network, left_s):
        names = [row["row"] for row in json.loads(path.read_text())["rows"]]
        assert names == [f"row of {each}" for each in measured]
        assert json.loads(path.read_text())["running"] == f"row of {network}"
        if network == "c" and not measured[2:]:
            raise KeyboardInterrupt
        measured.append(network)
        return {"largest_batch": 7}

    def list_jobs(bench):
        return [
            on_gpu.Job(f"row of {name}", "largest batch", "largest batch", on_gpu.functools.partial(measure, name))
            for name in "abcd"
        ]

    monkeypatch.setattr(on_gpu, "list_jobs", list_jobs)
    assert on_gpu.main([*REHEARSAL, "--json", str(path)]) == 130
    assert measured == ["a", "b"]
    assert "running" not in json.loads(path.read_text())
    measured.append("c")  # stands for time that has gone by
    results = json.loads(path.read_text())
    results["rows"].append({**results["rows"][1], "row": "row of c"})
    path.write_text(json.dumps(results))
    assert list(run(on_gpu, path)) == ["row of a", "row of b", "row of c", "row of d"]
    assert measured == ["a", "b", "c", "d"]
    assert [entry.name for entry in tmp_path.iterdir() if "results" in entry.name] == ["results.json"]


def test_rows_that_fail_have_their_reason_and_the_others_run(on_gpu, tmp_path, monkeypatch, capsys):
    def fail(left_s):
        raise failures.pop()

    failures = [
        RuntimeError("no kernel\nimage"),
        SystemExit("bad option"),
        torch.cuda.OutOfMemoryError("out of memory"),
    ]
    monkeypatch.setattr(
        on_gpu,
        "list_jobs",
        lambda bench: [
            *(on_gpu.Job(f"bad {index}", "largest batch", "largest batch", fail) for index in range(3)),
            on_gpu.Job("good", "largest batch", "largest batch", lambda left_s: {"largest_batch": 7}),
        ],
    )
    path = tmp_path / "results.json"
    rows = run(on_gpu, path)
    assert [row.get("reason") for row in rows.values()] == [
        "OutOfMemoryError: out of memory",
        "SystemExit: bad option",
        "RuntimeError: no kernel image",
        None,
    ]
    assert "- bad 2: RuntimeError: no kernel image" in capsys.readouterr().out
    assert run(on_gpu, path) == rows
    failures = [ValueError(str(index)) for index in range(3)]
    again = run(on_gpu, path, "--retry")
    assert [again[f"bad {index}"]["reason"] for index in range(3)] == [f"ValueError: {2 - index}" for index in range(3)]
    assert again["good"] == rows["good"]


def test_a_builtin_network_that_fails_leaves_rows_without_ratios(on_gpu, tmp_path, monkeypatch):
    prepared = []

    def measure_network(row, network, settings):
        prepared.append(row)
        if row == "built-in":
            raise RuntimeError("no kernel image")
        return {"kept": 2_000_000, "peak": 4_000_000}

    monkeypatch.setattr(on_gpu.training_memory, "make_row", lambda row, settings: torch.nn.Identity())
    monkeypatch.setattr(on_gpu.training_memory, "measure_network", measure_network)
    monkeypatch.setattr(
        on_gpu.training_memory, "measure_times", lambda networks, settings: dict.fromkeys(networks, [5.0])
    )
    list_jobs = on_gpu.list_jobs
    monkeypatch.setattr(on_gpu, "list_jobs", lambda bench: list_jobs(bench)[:3])
    rows = run(on_gpu, tmp_path / "results.json", "--steps", "training")
    builtin, activations, resnet50 = rows.values()
    assert builtin["reason"] == "RuntimeError: no kernel image"
    for row in (activations, resnet50):
        assert (row["kept_mb"], row["kept_ratio"], row["step_ms"]) == (1.0, None, [5.0])
        assert "step_ratios" not in row
    assert prepared == ["built-in", "activations", "resnet50"]


def test_a_row_in_which_the_process_ended_is_not_run_again(on_gpu, tmp_path, monkeypatch):
    job = on_gpu.Job("bad", "profile", "profile", lambda left_s: {"table": "| |"})
    monkeypatch.setattr(on_gpu, "list_jobs", lambda bench: [job])
    path = tmp_path / "results.json"
    run(on_gpu, path)
    results = json.loads(path.read_text())
    path.write_text(json.dumps({**results, "rows": [], "running": "bad"}))
    assert run(on_gpu, path)["bad"]["reason"] == "the process ended while it ran"
    assert run(on_gpu, path, "--retry")["bad"]["table"] == "| |"


def test_rows_that_would_take_too_long_are_left_for_another_run(on_gpu):
    now, saved = [100.0], []

    def take(seconds):
        def measure(left_s):
            now[0] += seconds
            return {}

        return measure

    jobs = [on_gpu.Job(f"eager {index}", "training", "eager", take(20)) for index in range(3)]
    jobs.insert(1, on_gpu.Job("compiled", "training", "compiled", take(50)))
    jobs.append(on_gpu.Job("profile", "profile", "profile", take(5)))
    results = {"rows": []}
    # A guess says 60 s for the compiled row, the first eager one says 20 s for the others.
    left = on_gpu.run_jobs(jobs, results, lambda: saved.append(len(results["rows"])), 58, lambda: now[0])
    assert left == ["compiled", "eager 2"]
    assert [(row["row"], row["seconds"]) for row in results["rows"]] == [
        ("eager 0", 20),
        ("eager 1", 20),
        ("profile", 5),
    ]
    assert saved == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {}}, "was made with settings {}"),
        ({"versions": {"torch": "2.11.0"}}, "was made with versions"),
        ({"hardware": {"gpu": "NVIDIA H100"}}, "was made with gpu NVIDIA H100, this run has None"),
        ({"command": "python benchmarks/launches.py"}, "lacks"),
    ],
    ids=["settings", "versions", "gpu", "another_script"],
)
def test_files_of_another_run_are_refused(on_gpu, tmp_path, monkeypatch, capsys, change, message):
    job = on_gpu.Job("good", "profile", "profile", lambda left_s: {"table": "| |"})
    monkeypatch.setattr(on_gpu, "list_jobs", lambda bench: [job])
    path = tmp_path / "results.json"
    run(on_gpu, path)
    text = json.dumps({**json.loads(path.read_text()), **change})
    path.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        on_gpu.main([*REHEARSAL, "--json", str(path)])
    assert message in capsys.readouterr().err
    assert path.read_text() == text


def is_running(state):
    with contextlib.suppress(OSError):  # it has ended, or does so now
        return state.read_text().split()[2] != "Z"
    return False


def test_processes_end_with_what_they_started_when_their_time_is_over(on_gpu, tmp_path):
    script = f"echo begun; sleep 60 & echo $! > {tmp_path}/pid; wait"
    with pytest.raises(on_gpu.Unfinished, match="^not done after 3 s$") as error:
        on_gpu.run_process(["sh", "-c", script], 3)
    assert error.value.output == "begun\n"
    state = on_gpu.Path("/proc") / (tmp_path / "pid").read_text().strip() / "stat"
    end = time.monotonic() + 30  # a busy machine may let it have a last turn
    while is_running(state) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(state)
    with pytest.raises(ChildProcessError, match="ended with status 3: reason"):
        on_gpu.run_process(["sh", "-c", "echo x; echo reason; exit 3"], 60)


def test_tests_that_were_done_are_counted_when_the_time_is_over(on_gpu, monkeypatch):
    text = (
        "tests/test_gpu.py::test_a[x y] PASSED [ 1%]\ntests/test_gpu.py::test_b FAILED [ 2%]\n"
        "tests/test_gpu.py::test_c "
    )

    def run_out(*args, **kwargs):
        raise on_gpu.Unfinished(150, text)

    monkeypatch.setattr(on_gpu, "run_process", run_out)
    counted = on_gpu.run_tests(300)
    assert (counted["passed"], counted["failed"], counted["unfinished"]) == (1, 1, "not done after 150 s")
    assert counted["failures"] == ["tests/test_gpu.py::test_b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--device", "cuda"], "needs a GPU, and PyTorch finds none"), (["--device", "cpu"], "needs --tiny")],
    ids=["no_gpu", "not_tiny"],
)
def test_rows_that_cannot_run_here_are_explained(on_gpu, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        on_gpu.main([*words, "--json", str(tmp_path / "results.json")])
    assert message in capsys.readouterr().err

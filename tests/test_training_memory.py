import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from scripts import load_script
from torch import nn
from torch.autograd import DeviceType
from torch.utils.checkpoint import checkpoint

OURS = ["none", "activations", "expansions", "checkpointing", "split-bn", "frozen-bn"]

IMAGES = 4 * 3 * 100 * 4  # bytes of (4, 3, 10, 10) in float32
HIDDEN = 4 * 8 * 100 * 4  # of (4, 8, 10, 10)
LOSS = 4 * 8 * 4 + 4 * 8 + 4 + 4  # of cross entropy: log-probabilities, labels, their total weight, the loss itself


@pytest.fixture(scope="module")
def training_memory():
    return load_script("benchmarks/training_memory.py")


class Toy(nn.Module):
    """A network from 3 channels to 8 classes; `keep` chooses the tensors that backward needs."""

    def __init__(self, keep):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.keep = keep

    def forward(self, x):
        if self.keep == "views":
            x = x.view(x.shape).transpose(2, 3)
        if self.keep == "closure":
            x = checkpoint(self.widen, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = self.widen(x)
        return x.mean((2, 3))

    def widen(self, x):
        return self.conv(x).sigmoid()


def measure_toy(training_memory, keep):
    return training_memory.measure_kept(Toy(keep), torch.randn(4, 3, 10, 10), torch.zeros(4, dtype=torch.long))


def test_kept_bytes_are_those_counted_by_hand(training_memory):
    assert measure_toy(training_memory, "all") == IMAGES + HIDDEN + LOSS


def test_images_count_once_when_a_view_of_them_is_kept(training_memory):
    assert measure_toy(training_memory, "views") == IMAGES + HIDDEN + LOSS


def test_what_a_checkpoint_keeps_in_a_closure_counts(training_memory):
    assert measure_toy(training_memory, "closure") == IMAGES + LOSS


def test_images_do_not_count_when_backward_does_not_need_them(training_memory):
    toy = Toy("all")
    toy.conv.requires_grad_(False)
    head = nn.Linear(8, 8)
    pooled = 4 * 8 * 4
    batch = (torch.randn(4, 3, 10, 10), torch.zeros(4, dtype=torch.long))
    assert training_memory.measure_kept(nn.Sequential(toy, head), *batch) == pooled + LOSS


def test_gradients_and_earlier_graphs_do_not_count(training_memory):
    toy = Toy("all")
    batch = (torch.randn(4, 3, 10, 10), torch.zeros(4, dtype=torch.long))
    earlier = training_memory.compute_loss(toy, *batch)
    training_memory.compute_loss(toy, *batch).backward()
    assert training_memory.measure_kept(toy, *batch) == IMAGES + HIDDEN + LOSS
    earlier.backward()


def test_results_compare_every_setting_with_the_builtin_network(training_memory, tmp_path, capsys, monkeypatch):
    def measure_here(row, words):  # a process for each of so many rows would take long
        return training_memory.measure_memory(row, training_memory.parse(words[:-2]))

    monkeypatch.setattr(training_memory, "_measure_memory_in_process", measure_here)
    results = tmp_path / "new" / "results.json"
    arguments = ["--model", "test_tresnet", "--image-size", "64", "--batch-size", "2", "--time-batch-size", "2"]
    arguments += ["--rounds", "2", "--rows", "resnet50", training_memory.BUILTIN, *OURS]
    training_memory.main([*arguments, "--json", str(results)])

    written = json.loads(results.read_text())
    assert list(written) == ["command", "date", "hardware", "versions", "settings", "rows"]
    assert written["command"].startswith("python benchmarks/training_memory.py --model test_tresnet")
    assert set(written["hardware"]) == {"cpu", "cores", "threads", "gpu"}
    assert set(written["versions"]) == {"python", "torch", "timm", "timm-tresnet"}
    assert written["settings"]["image_size"] == 64
    rows = {row["row"]: row for row in written["rows"]}
    assert list(rows) == ["resnet50", training_memory.BUILTIN, *OURS]
    kept = {name: row["kept_mb"] for name, row in rows.items()}
    assert kept["none"] == kept[training_memory.BUILTIN]
    assert kept["none"] > kept["activations"] > kept["expansions"]
    assert kept["none"] > kept["checkpointing"]
    assert kept["none"] > kept["split-bn"] > kept["frozen-bn"]
    for name, row in rows.items():
        assert row["kept_ratio"] == pytest.approx(kept[name] / kept[training_memory.BUILTIN])
        assert row["peak_mb"] is None or row["peak_mb"] > -1  # what other tests had may be given back meanwhile
        assert len(row["step_ms"]) == len(row["step_ratios"]) == 2

    table = capsys.readouterr().out
    assert all(f"\n| {name} |" in table for name in rows)
    assert [path.name for path in results.parent.iterdir()] == ["results.json"]


@pytest.mark.thorough
def test_memory_is_measured_in_a_process_of_its_own(training_memory):
    words = ["--model", "test_tresnet", "--image-size", "64", "--batch-size", "2"]
    measured = training_memory._measure_memory_in_process("expansions", words)
    assert measured["kept"] == training_memory.measure_memory("expansions", training_memory.parse(words))["kept"]
    assert measured["peak"] is None or measured["peak"] > 0


def test_rows_without_the_builtin_network_have_no_ratios(training_memory):
    memory = {"none": {"kept": 4_000_000, "peak": None}}
    (row,) = training_memory.summarize(memory, {"none": [3.0, 1.0, 2.0]}, batch_size=2)
    assert row == {
        "row": "none",
        "kept_mb": 2.0,
        "kept_ratio": None,
        "peak_mb": None,
        "peak_ratio": None,
        "step_ms": [3.0, 1.0, 2.0],
    }
    assert training_memory.format_table([row]).splitlines()[-1] == "| none | 2.0 |  | 2 ms |"


def test_ratios_of_times_are_taken_in_each_round(training_memory):
    memory = dict.fromkeys((training_memory.BUILTIN, "none"), {"kept": 1, "peak": 1, "largest_batch": 7})
    step_ms = {training_memory.BUILTIN: [10.0, 20.0, 40.0], "none": [10.0, 30.0, 80.0]}
    row = training_memory.summarize(memory, step_ms, batch_size=1)[1]
    assert row["step_ratios"] == [1.0, 1.5, 2.0]
    assert "| 1.50x (1.00-2.00) | 7 |" in training_memory.format_table([row])


def test_compiled_rows_are_added_on_request(training_memory):
    assert training_memory.parse([]).rows == list(training_memory.ROWS)
    assert training_memory.parse(["--compile"]).rows == [*training_memory.ROWS, *training_memory.COMPILED_ROWS]
    assert training_memory.parse(["--rows", "none", "compiled", "none"]).rows == ["none", "compiled"]


def test_profile_adds_up_to_a_step(training_memory, capsys):
    arguments = ["--model", "test_tresnet", "--image-size", "64", "--time-batch-size", "2", "--rows", "activations"]
    training_memory.main([*arguments, "--profile"])
    heading, _, *operations = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert heading[1].strip() == "activations, batch 2"
    times = [float(line[2]) for line in operations]
    assert times == sorted(times, reverse=True)
    assert 0 < sum(times) <= float(heading[2].split()[-1]) + 0.1
    with pytest.raises(SystemExit, match="2"):
        training_memory.main([*arguments, "--profile", "--json", "results.json"])
    assert "leave out --json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kernels", "names"), [(False, ["aten::add"]), (True, ["triton_add", "cudnn"])], ids=["operations", "kernels"]
)
def test_profile_on_a_gpu_counts_operations_or_kernels(monkeypatch, kernels, names):
    profiles = load_script("benchmarks/profiles.py")
    cpu, gpu = DeviceType.CPU, DeviceType.CUDA
    events = [  # name, device, annotation, time on the GPU in us
        ("aten::add", cpu, False, 500),
        ("cudaLaunchKernel", cpu, False, 0),
        ("triton_add", gpu, False, 3000),
        ("cudnn", gpu, False, 1000),
        ("Torch-Compiled Region: 0/0", gpu, True, 4000),
    ]
    fields = ("key", "device_type", "is_user_annotation", "self_device_time_total")
    averages = [SimpleNamespace(**dict(zip(fields, event, strict=True))) for event in events]
    profiler = contextlib.nullcontext(SimpleNamespace(key_averages=lambda: averages))
    monkeypatch.setattr(profiles, "run_profiler", lambda **kwargs: profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    heading, _, *rows = profiles.profile(lambda: None, "a step", "cuda", 1, kernels).splitlines()
    assert heading.startswith(f"| a step | ms of {4.0 if kernels else 0.5} |")
    assert [row.split("|")[1].strip() for row in rows] == names


def test_profile_of_a_compiled_step_on_a_cpu_adds_up_its_kernels(monkeypatch):
    profiles = load_script("benchmarks/profiles.py")
    times = {"aten::convolution_backward": 6000, "aten::mkldnn_convolution": 3000, "aten::copy_": 400}
    times |= {f"graph_0_cpp_fused_add_{index}": 100 for index in range(6)}
    averages = [SimpleNamespace(key=key, self_cpu_time_total=time) for key, time in times.items()]
    profiler = contextlib.nullcontext(SimpleNamespace(key_averages=lambda: averages))
    monkeypatch.setattr(profiles, "run_profiler", lambda **kwargs: profiler)
    heading, _, *rows = profiles.profile(lambda: None, "a step", "cpu", 1).splitlines()
    assert heading == "| a step | ms of 10.0 | share |"
    assert rows[0] == "| all convolutions, forward and backward | 9.00 | 90.0% |"
    assert rows[1] == "| all 6 kinds of the compiler's kernels | 0.60 | 6.0% |"
    assert rows[2].startswith("| aten::convolution_backward | 6.00")


def test_an_existing_file_is_not_overwritten(training_memory, tmp_path, capsys):
    results = tmp_path / "results.json"
    results.write_text("precious")
    with pytest.raises(SystemExit, match="2"):
        training_memory.main(["--json", str(results)])
    assert "never overwritten" in capsys.readouterr().err
    with pytest.raises(FileExistsError, match="the new result is in"):  # it came while measuring
        training_memory.write_results({}, results)
    assert results.read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size: needs a number from 1 on, got 0"),
        (["--image-size", "70"], "--image-size needs a multiple of 4 from 64 on, got 70"),
        (["--rows", "all"], "invalid choice: 'all'"),
        (["--amp", "float16"], "need --device cuda"),
        (["--max-batch", "8"], "need --device cuda"),
        (["--rows", "compiled-graphs-activations"], "use CUDA graphs and need --device cuda"),
    ],
    ids=["no_images", "odd_size", "unknown_row", "float16_on_the_cpu", "largest_batch_on_the_cpu", "graphs_on_the_cpu"],
)
def test_bad_arguments_are_explained(training_memory, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        training_memory.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_missing_gpu_is_explained(training_memory, capsys):
    with pytest.raises(SystemExit, match="2"):
        training_memory.main(["--device", "cuda"])
    assert "PyTorch finds none" in capsys.readouterr().err


def test_a_row_that_cannot_be_measured_is_named(training_memory, monkeypatch):
    monkeypatch.setattr(training_memory.sys, "executable", "false")
    with pytest.raises(SystemExit, match="measures none ended with status 1"):
        training_memory._measure_memory_in_process("none", [])

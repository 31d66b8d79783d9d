"""Tests that need a GPU; all of them are skipped without one."""

import contextlib
import gc
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import timm
import timm.models.tresnet
import torch
from comparing import RECOMPUTING, collect, each_setting, make_model, run_alone
from torch import nn

from timm_tresnet import optimize_for_inference
from timm_tresnet.bench.measuring import find_largest_batch, measure_kept
from timm_tresnet.models.layers import BlurPool2d

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def exact_convolutions():
    """Use deterministic algorithms in full precision, so that only this package's work can differ."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@pytest.fixture
def deterministic_algorithms(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def images(batch=8, size=64, **kwargs):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to("cuda", **kwargs)


def on_gpu(setting, **kwargs):
    return make_model(setting, **kwargs).cuda()


def assert_close(actual, expected, tolerance):
    """Equal loss and statistics, and gradients as close as tolerance says.

    A norm's output is recomputed to one rounding. Where that crosses an activation's kink, a single pixel's
    derivative is another one, which is more than rounding.
    """
    for name, value in expected.items():
        if name.startswith("grad"):
            assert (actual[name] - value).norm() <= tolerance * value.norm() + 1e-12, name
        else:
            assert torch.equal(actual[name], value), name


def train_step(model, x, amp=None):
    with torch.autocast("cuda", dtype=amp or torch.float16, enabled=amp is not None):
        loss = model(x).float().square().mean()
    loss.backward()
    return collect(model, loss)


@each_setting
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"v2": True, "drop_path_rate": 0.3}], ids=["m", "v2"])
def test_recomputing_changes_no_number(setting, memory_format, dtype, kwargs):
    results = []
    for each in (setting, "none"):
        model = on_gpu(each, dtype=dtype, **kwargs).to(memory_format=memory_format)
        torch.cuda.manual_seed(2)
        results.append(train_step(model, images(dtype=dtype, memory_format=memory_format)))
    assert_close(*results, 1e-10 if dtype == torch.float64 else 1e-2)


@each_setting
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("amp", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_no_loss(setting, amp, memory_format):
    results = []
    for each in (setting, "none"):
        model = on_gpu(each).to(memory_format=memory_format)
        results.append(train_step(model, images(memory_format=memory_format), amp))
    assert_close(*results, 5e-2)


@each_setting
def test_mixed_precision_with_loss_scaling_trains_alike(setting):
    def train(each):
        model = on_gpu(each)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        scaler = torch.amp.GradScaler("cuda")
        losses = []
        for _ in range(6):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.float16):
                loss = nn.functional.cross_entropy(model(images()), torch.arange(8, device="cuda"))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
        return torch.stack(losses)

    actual, expected = train(setting), train("none")
    assert expected[-1] < expected[0]
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_network_computes_what_timms_own_computes(training):
    torch.manual_seed(0)
    builtin = timm.models.tresnet.TResNet(layers=[2, 2, 3, 1], num_classes=10).cuda().train(training)
    ours = timm.create_model("tresnet_m", layers=(2, 2, 3, 1), num_classes=10).cuda().train(training)
    ours.load_state_dict(builtin.state_dict())
    results = []
    for model in (ours, builtin):
        loss = model(images()).square().mean()
        loss.backward()
        results.append({"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    for name, value in results[1].items():
        assert (results[0][name] - value).norm() <= 1e-4 * value.norm() + 1e-12, name


@each_setting
def test_step_captured_as_a_cuda_graph_gives_the_same_gradients(setting):
    model = on_gpu(setting)
    x = images()

    def step():
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
            model.zero_grad()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(images(batch=16)[8:])
    for parameter in model.parameters():
        parameter.grad.zero_()
    graph.replay()
    replayed = collect(model, captured)
    model.zero_grad()
    eager = train_step(model, x)
    for name, value in eager.items():
        if name == "loss" or name.startswith("grad"):
            assert (replayed[name] - value).norm() <= 1e-2 * value.norm() + 1e-12, name


@each_setting
def test_step_on_another_stream_gives_the_same_numbers(setting):
    expected = train_step(on_gpu("none"), images())
    model, x = on_gpu(setting), images()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = train_step(model, x)
    stream.synchronize()
    assert_close(actual, expected, 1e-2)


@pytest.mark.usefixtures("deterministic_algorithms")
def test_seeded_training_with_deterministic_algorithms_gives_identical_weights():
    def train(setting):
        model = on_gpu(setting, drop_path_rate=0.3, drop_rate=0.2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        torch.cuda.manual_seed(4)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images()), torch.arange(8, device="cuda")).backward()
            optimizer.step()
        return model.state_dict()

    for setting in ["none", *RECOMPUTING]:
        torch.testing.assert_close(train(setting), train(setting), rtol=0, atol=0)


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@each_setting
def test_sharded_training_frees_weights_and_gives_the_same_gradients(setting):
    from torch.distributed.fsdp import fully_shard

    expected = train_step(on_gpu("none"), images())
    model = on_gpu(setting)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            fully_shard(module)
    for stage in model.body[-4:]:
        for block in stage:
            fully_shard(block)
    fully_shard(model)
    model(images()).square().mean().backward()
    for name, parameter in model.named_parameters():
        value = expected[f"grad of {name}"]
        assert (parameter.grad.full_tensor() - value).norm() <= 1e-2 * value.norm() + 1e-12, name


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_blur_is_the_cpus(stride, dilation, memory_format):
    blur = BlurPool2d(24, stride=stride, dilation=dilation)
    for height, width in ((3, 5), (8, 8), (13, 6)):
        x = torch.randn(2, 24, height, width, requires_grad=True)
        y = blur(x)
        grad = torch.randn_like(y)
        (expected,) = torch.autograd.grad(y, x, grad)
        for setting in ("none", "activations"):
            on_device = x.detach().to("cuda", memory_format=memory_format).requires_grad_()
            result = run_alone(blur.cuda(), on_device, setting)
            torch.testing.assert_close(result.cpu(), y.detach(), rtol=1e-5, atol=1e-5)
            (actual,) = torch.autograd.grad(result, on_device, grad.cuda())
            torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)
            blur.cpu()


def test_empty_batch_and_single_value_fail_or_pass_as_with_plain_pytorch():
    for setting in ["none", *RECOMPUTING]:
        model = on_gpu(setting)
        assert model(images(batch=0)).shape == (0, 10)
        with pytest.raises(ValueError, match="(?i)more than (1|one) value per channel"):
            model(images(batch=1, size=32))


@pytest.mark.parametrize(
    ("setting", "kept", "peak"),
    [("activations", 0.52, 0.56), ("expansions", 0.39, 0.48), ("checkpointing", 0.18, 0.32)],
)
def test_step_keeps_and_peaks_at_a_fraction_of_timms_own(setting, kept, peak):
    x = images(batch=64, size=128, dtype=torch.float16, memory_format=torch.channels_last)
    labels = torch.zeros(64, dtype=torch.long, device="cuda")

    def measure(model):
        model.to("cuda", torch.float16, memory_format=torch.channels_last).train()
        nn.functional.cross_entropy(model(x), labels).backward()
        memory = [measure_kept(model, x, labels)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        nn.functional.cross_entropy(model(x), labels).backward()
        return [*memory, torch.cuda.max_memory_allocated() - before]

    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=True):
        builtin = measure(timm.models.tresnet.TResNet(layers=[3, 4, 11, 3]))
        model = timm.create_model("tresnet_m", recompute="activations" if setting == "checkpointing" else setting)
        model.set_grad_checkpointing(setting == "checkpointing")
        ours = measure(model)
    assert ours[0] <= kept * builtin[0]
    assert ours[1] <= peak * builtin[1]


@each_setting
def test_memory_returns_after_a_step_a_lost_forward_and_an_exception(setting):
    model, x = on_gpu(setting), images()

    def level():
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def step():
        loss = model(x).square().mean()
        loss.backward()

    step()
    before = level()
    step()
    assert level() == before
    model(x)  # no backward
    assert level() == before
    handle = model.body.layer3[2].register_forward_hook(lambda *_: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        model(x)
        pytest.fail("the hook did not run")
    handle.remove()
    assert level() == before


def test_largest_batch_is_found_by_running_out_of_memory():
    def step(size):
        return torch.empty(size, 2**30, dtype=torch.uint8, device="cuda")

    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] // 2**30
    assert free - 2 <= find_largest_batch(step, 1024) <= free
    assert find_largest_batch(step, 3) == 3
    assert find_largest_batch(step, 1024, memory_gb=4.5) in (3, 4)


@pytest.mark.filterwarnings("default")  # the compiler warns about itself
@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=str)
def test_compiled_training_is_one_graph_with_the_same_loss(amp):
    eager = train_step(timm.create_model("test_tresnet").cuda().train(), images(), amp)
    torch.manual_seed(0)
    model = timm.create_model("test_tresnet").cuda().train()
    compiled = torch.compile(model, fullgraph=True)
    with torch.autocast("cuda", dtype=amp or torch.float16, enabled=amp is not None):
        loss = compiled(images()).float().square().mean()
    loss.backward()
    torch.testing.assert_close(loss.detach(), eager["loss"], rtol=2e-2 if amp else 1e-3, atol=0)
    assert model.body.conv1.conv.weight.grad.isfinite().all()


@pytest.mark.filterwarnings("default")  # the compiler warns about itself
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])  # the latter with CUDA graphs
@each_setting
def test_compiled_steps_give_the_numbers_of_plain_ones(setting, mode):
    torch.compiler.reset()
    model, plain = on_gpu(setting, dtype=torch.float64), on_gpu("none", dtype=torch.float64)
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    for scale in (1, 2, 3):  # warming up, recording, replaying
        model.zero_grad()
        plain.zero_grad()
        actual = train_step(compiled, scale * images(dtype=torch.float64))
        expected = train_step(plain, scale * images(dtype=torch.float64))
        for name, value in expected.items():
            prefix = "grad of " if name.startswith("grad of ") else ""
            other = actual[name if name == "loss" else f"{prefix}_orig_mod.{name.removeprefix(prefix)}"]
            torch.testing.assert_close(other, value, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.filterwarnings("default")  # the compiler warns about itself
@each_setting
def test_compiled_training_keeps_less(setting):
    torch.compiler.reset()
    x, labels = images(16, 128), torch.zeros(16, dtype=torch.long, device="cuda")
    kept = []
    for each in (setting, "none"):
        model = torch.compile(on_gpu(each, layers=(2, 2, 6, 2)), fullgraph=True, dynamic=False)
        model(x).sum().backward()
        kept.append(measure_kept(model, x, labels))
    assert kept[0] < 0.7 * kept[1]


# PyTorch's own: make_graphed_callables goes backward on a stream of its own first.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning")
@each_setting
def test_a_step_recorded_in_cuda_graphs_gives_the_numbers_of_a_plain_one(setting):
    model, plain = on_gpu(setting), on_gpu("none")
    graphed = torch.cuda.make_graphed_callables(model, (images(),))
    for scale in (1, 2):
        model.zero_grad()
        plain.zero_grad()
        x = scale * images()
        losses = [network(x).square().mean() for network in (graphed, plain)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses)
        for own, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert (own.grad - other.grad).norm() <= 1e-4 * other.grad.norm() + 1e-12


@pytest.mark.filterwarnings("default")  # the compiler warns about itself
@pytest.mark.parametrize(
    ("dynamic", "dtype"), [(False, torch.float16), (True, torch.float32)], ids=["static", "dynamic"]
)
def test_optimized_network_computes_the_network(dynamic, dtype):
    model = timm.create_model("test_tresnet", pretrained=True).cuda().eval()
    optimized = optimize_for_inference(model.to(dtype), dynamic=dynamic)
    with torch.no_grad():
        for shape in [(2, 3, 64, 64), (3, 3, 64, 96)]:
            x = torch.rand(shape, device="cuda", dtype=dtype)
            y = optimized(x).float().clone()
            expected = model(x).float()
            assert (y - expected).norm() <= (1e-3 if dtype == torch.float32 else 3e-2) * expected.norm()


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (
            "training_memory",
            ["--batch-size", "4", "--time-batch-size", "4", "--image-size", "64", "--max-batch", "8"]
            + ["--rows", "built-in", "activations"],
        ),
        ("paper_tables", ["--batch-size", "4", "--image-size", "64", "--max-batch", "8", "--models", "test_tresnet"]),
        ("ablation", ["--batch-size", "4", "--image-size", "64", "--max-batch", "0"]),
        ("resolution", ["--batch-size", "4", "--image-sizes", "64", "--max-batch", "0"]),
        ("inference", ["--batch-sizes", "4", "--image-size", "64", "--rows", "built-in", "eager", "folded"]),
    ],
)
def test_benchmark_runs_on_the_gpu(script, arguments, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(script, BENCHMARKS / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, script, module)
    spec.loader.exec_module(module)
    path = tmp_path / "results.json"
    options = ["--device", "cuda", "--rounds", "1", "--json", str(path)]
    if script != "inference":
        options += ["--amp", "float16", "--channels-last"]
    if script != "paper_tables":
        options += ["--model", "test_tresnet"]
    module.main([*options, *arguments])
    results = json.loads(path.read_text())
    assert results["hardware"]["gpu"] == torch.cuda.get_device_name()
    assert results["rows"]

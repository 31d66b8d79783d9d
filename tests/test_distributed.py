"""Two processes on one CPU, which talk through gloo; one launch for all cases that are asked for."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import timm.layers
import torch
from comparing import HIDES_SAVED, RECOMPUTING, SHOWS_SAVED, images, make_model, saved_bytes, train_step
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from timm_tresnet.weights.checkpoint import checkpoint_filter_fn

SETTINGS = ["none", *RECOMPUTING]
OPTIONS = {  # of DistributedDataParallel
    "plain": {},
    "static_graph": {"static_graph": True},
    "bucket_views": {"gradient_as_bucket_view": True, "bucket_cap_mb": 1},
    "unused_parameters": {"find_unused_parameters": True},
    "accumulation": {},
}
DDP_CASES = [("none", "plain", "synchronized")]
DDP_CASES += [(setting, "plain", "synchronized") for setting in RECOMPUTING]
DDP_CASES += [
    ("activations", "accumulation", "synchronized"),
    ("expansions", "bucket_views", "synchronized"),
    ("checkpointing", "static_graph", "synchronized"),
    ("activations", "unused_parameters", "synchronized"),
]
DDP_CASES += [(setting, "plain", "frozen") for setting in SETTINGS]
LAYERS = (1, 2, 2, 1)
STEPS, BATCH = 3, 4  # BATCH images a step over both processes
BOUNDS = {"none": 1, "activations": 0.51, "expansions": 0.45, "checkpointing": 0.28}  # of what is kept without
WRAPPED = ["network", "stages", "blocks"]  # what FSDP gathers at a time
FSDP_CASES = [(setting, wrapped, "frozen") for setting in ("none", "activations") for wrapped in WRAPPED]
FSDP_CASES += [(setting, "blocks", "frozen") for setting in ("expansions", "checkpointing")]
FSDP_CASES += [(setting, "blocks", "synchronized") for setting in SETTINGS]
COMPILED_CASES = [("none", "stages"), ("activations", "stages"), ("activations", "blocks")]  # and what FSDP gathers
CONVERTERS = {"timm": timm.layers.convert_sync_batchnorm, "torch": nn.SyncBatchNorm.convert_sync_batchnorm}
UNEVEN_CASES = [("activations", "torch"), *((setting, "timm") for setting in SETTINGS)]  # and who converts the norms
UNEVEN = [2, 5]  # images of the two processes
FEW = {  # one of each kind; the others are thorough
    ("none", "plain", "synchronized"),
    ("activations", "plain", "synchronized"),
    ("activations", "accumulation", "synchronized"),
    ("none", "plain", "frozen"),
    ("checkpointing", "plain", "frozen"),
    ("activations", "blocks", "synchronized"),
    ("checkpointing", "blocks", "synchronized"),
    ("activations", "timm"),
    ("activations", "torch"),
}


def mark(cases):
    """Cases as a test takes them."""
    return [pytest.param(case, id="-".join(case), marks=[] if case in FEW else pytest.mark.thorough) for case in cases]


def make_network(setting, norms):
    """A network with synchronized norms: two processes with half of the batch each compute what one process does."""
    model = make_model(setting, layers=LAYERS, dtype=torch.float64)
    if norms == "synchronized":
        return timm.layers.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def train(parallel, model, parts, option="plain"):
    """A few steps of SGD on parts of batches; parameters and buffers after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step, part in enumerate(parts):
        last = option != "accumulation" or step % 2 == 1 or step == len(parts) - 1
        with nullcontext() if last or parallel is model else parallel.no_sync():
            output = parallel(part)
            if option == "unused_parameters":  # the second half of the classes
                output = output[:, :5]
            output.square().mean().backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def batches():
    return images(STEPS * BATCH, 32, dtype=torch.float64).split(BATCH)


def shard(setting, wrapped, norms):
    """A network with sharded weights, gathered for the network, a stage or a block at a time."""
    from torch.distributed.fsdp import fully_shard

    model = make_network(setting, norms)
    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    stages = [module for module in model.body if isinstance(module, nn.Sequential)]
    inner = {"network": [], "stages": stages, "blocks": [block for stage in stages for block in stage]}[wrapped]
    for module in [*inner, model]:
        fully_shard(module, mesh=mesh)
    return model


def shard_mixed(setting):
    """A network whose blocks gather bfloat16 weights, and whose norms gather float32 ones, as PyTorch's need."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = make_model(setting, layers=LAYERS)
    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in list(model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            fully_shard(module, mesh=mesh)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    stages = [module for module in model.body if isinstance(module, nn.Sequential)]
    for module in [*(block for stage in stages for block in stage), model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


def gather(state_dict):
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in state_dict.items()
    }


def save_gathered(model, path):
    """Save a sharded network's whole state dict, as PyTorch's documentation does."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if torch.distributed.get_rank() == 0:  # the others get nothing
        torch.save(state_dict, path)


def train_uneven(setting, convert, rank):
    """Loss, gradients and buffers of one step on a part of a batch, and what it has kept."""
    model = CONVERTERS[convert](make_model(setting, dtype=torch.float64))
    part = images(sum(UNEVEN), dtype=torch.float64).split(UNEVEN)[rank]
    parallel = DistributedDataParallel(model)
    loss = parallel(part).square().sum() * len(UNEVEN) / (sum(UNEVEN) * 10)  # it averages over processes
    loss.backward()
    total = loss.detach() / len(UNEVEN)
    torch.distributed.all_reduce(total)
    gradients = {f"grad of {name}": parameter.grad for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {"loss": total, **gradients, **buffers}, saved_bytes(model, part) if SHOWS_SAVED else None


def run_process(folder, thorough):
    """Run one of two processes; `processes` returns its results."""

    def choose(cases):
        return [case for case in cases if thorough or case in FEW]

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    parts = [batch.chunk(2)[rank] for batch in batches()]
    results = {}
    for setting, option, norms in choose(DDP_CASES):
        model = make_network(setting, norms)
        parallel = DistributedDataParallel(model, **OPTIONS[option])
        results[setting, option, norms] = train(parallel, model, parts, option)
        if option == "plain" and SHOWS_SAVED:
            results["kept", setting, norms] = saved_bytes(parallel, parts[0]), saved_bytes(model, parts[0])
    if rank == 0:
        torch.save(parallel.module.state_dict(), Path(folder) / "module.pt")
        torch.save(parallel.state_dict(), Path(folder) / "parallel.pt")
    for setting, convert in choose(UNEVEN_CASES):
        results["uneven", setting, convert] = train_uneven(setting, convert, rank)
    empty = make_network("activations", "synchronized").body.conv1(torch.randn(3 * rank, 48, 4, 4).double())
    empty.sum().backward()
    results["empty"] = empty.detach()
    for setting, wrapped, norms in choose(FSDP_CASES) if has_fully_shard() else []:
        model = shard(setting, wrapped, norms)
        results[setting, wrapped, norms] = gather(train(model, model, parts))
        save_gathered(model, Path(folder) / "gathered.pt")
        if SHOWS_SAVED:
            results["kept", setting, wrapped, norms] = saved_bytes(model, parts[0])
    for setting, wrapped in choose(COMPILED_CASES) if has_fully_shard() else []:
        model = shard(setting, wrapped, "frozen")
        for module in [model] if wrapped == "stages" else [model.body.layer2, model.body.layer3]:
            module.compile(backend="aot_eager")
        results["compiled", setting, wrapped] = gather(train(model, model, parts))
    for setting, _ in choose([(setting, "mixed") for setting in SETTINGS]) if has_fully_shard() else []:
        model = shard_mixed(setting)
        results[setting, "mixed"] = gather(train(model, model, [part.float() for part in parts]))
        if SHOWS_SAVED:
            results["kept", setting, "mixed"] = saved_bytes(model, parts[0].float())
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def has_fully_shard():
    import torch.distributed.fsdp

    return hasattr(torch.distributed.fsdp, "fully_shard")


@pytest.fixture(scope="module")
def folder(run_two_processes, request):
    """Folder with the results of two processes."""
    tests = [item for item in request.session.items if item.module is request.module]
    return run_two_processes(__name__, any(item.get_closest_marker("thorough") for item in tests))


@pytest.fixture(scope="module")
def processes(folder):
    """Results of each of two processes."""
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone():
    """Weights after one process trained with the whole batches, by option and norms."""
    results = {}

    def compute(option, norms):
        if (option, norms) not in results:
            model = make_network("none", norms)
            results[option, norms] = train(model, model, batches(), option)
        return results[option, norms]

    return compute


def assert_equal_weights(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("case", mark(DDP_CASES))
def test_two_processes_train_like_one_with_the_whole_batch(processes, alone, case):
    for result in processes:
        assert_equal_weights(result[case], alone(*case[1:]))


@pytest.mark.parametrize("case", mark(UNEVEN_CASES))
def test_synchronized_norms_count_images_and_not_processes(processes, case):
    setting, _ = case
    expected = train_step(make_model(dtype=torch.float64), images(sum(UNEVEN), dtype=torch.float64))
    for result, batch in zip(processes, UNEVEN, strict=True):
        actual, kept = result["uneven", *case]
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12, msg=name)
        if SHOWS_SAVED:
            plain = saved_bytes(make_model(setting, dtype=torch.float64), images(batch, dtype=torch.float64))
            assert kept <= 1.02 * plain


def test_process_without_images_takes_part(processes):
    assert processes[0]["empty"].shape == (0, 16, 4, 4)
    assert processes[1]["empty"].isfinite().all()
    assert processes[1]["empty"].shape == (3, 16, 4, 4)


@pytest.mark.skipif(not SHOWS_SAVED, reason=HIDES_SAVED)
@pytest.mark.parametrize("case", mark([case for case in DDP_CASES if case[1] == "plain"]))
def test_data_parallel_training_keeps_what_one_process_keeps(processes, case):
    setting, _, norms = case
    for result in processes:
        parallel, model = result["kept", setting, norms]
        assert parallel <= 1.01 * model
        assert model <= BOUNDS[setting] * result["kept", "none", norms][1]


def test_checkpoint_of_data_parallel_training_loads_plainly(folder, processes):
    expected = processes[0][DDP_CASES[-1]]
    for name in ("module", "parallel"):
        model = make_model(seed=5, layers=LAYERS, dtype=torch.float64)
        state_dict = checkpoint_filter_fn(torch.load(folder / f"{name}.pt"), model)
        model.load_state_dict(state_dict)
        for key, value in model.state_dict().items():
            assert torch.equal(value, expected[key]), key


@pytest.mark.skipif(not has_fully_shard(), reason="this PyTorch has no torch.distributed.fsdp.fully_shard")
@pytest.mark.parametrize("case", mark(FSDP_CASES))
def test_sharded_network_trains_like_one_process_with_the_whole_batch(processes, alone, case):
    for result in processes:
        assert_equal_weights(result[case], alone("plain", case[-1]))


@pytest.mark.skipif(not has_fully_shard(), reason="this PyTorch has no torch.distributed.fsdp.fully_shard")
@pytest.mark.parametrize("case", mark(COMPILED_CASES))
def test_sharded_and_compiled_network_trains_like_one_process_with_the_whole_batch(processes, alone, case):
    for result in processes:
        assert_equal_weights(result["compiled", *case], alone("plain", "frozen"))


@pytest.mark.skipif(not has_fully_shard(), reason="this PyTorch has no torch.distributed.fsdp.fully_shard")
@pytest.mark.parametrize("case", mark([(setting, "mixed") for setting in RECOMPUTING]))
def test_sharded_network_trains_the_same_as_plain_pytorch_in_mixed_precision(processes, case):
    setting, _ = case
    for result in processes:
        for name, value in result["none", "mixed"].items():
            assert torch.equal(result[setting, "mixed"][name], value), name
        if SHOWS_SAVED:
            assert result["kept", setting, "mixed"] <= 0.55 * result["kept", "none", "mixed"]


@pytest.mark.skipif(not has_fully_shard(), reason="this PyTorch has no torch.distributed.fsdp.fully_shard")
def test_checkpoint_of_sharded_training_loads_plainly(folder, processes):
    model = make_model(seed=5, layers=LAYERS, dtype=torch.float64)
    model.load_state_dict(torch.load(folder / "gathered.pt"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, processes[0][FSDP_CASES[-1]][key]), key


@pytest.mark.skipif(not has_fully_shard(), reason="this PyTorch has no torch.distributed.fsdp.fully_shard")
@pytest.mark.skipif(not SHOWS_SAVED, reason=HIDES_SAVED)
@pytest.mark.thorough
@pytest.mark.parametrize("case", mark([case for case in FSDP_CASES if case[0] == "activations"]))
def test_sharded_network_keeps_less_for_backward_too(processes, case):
    _, wrapped, norms = case
    for result in processes:
        settings = SETTINGS if wrapped == "blocks" else ["none", "activations"]
        kept = {setting: result["kept", setting, wrapped, norms] for setting in settings}
        assert kept["activations"] <= BOUNDS["activations"] * kept["none"]
        if wrapped == "blocks":
            assert kept["expansions"] < kept["activations"]
            assert kept["checkpointing"] <= BOUNDS["checkpointing"] * kept["none"]

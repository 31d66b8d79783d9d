from pathlib import Path

import pytest
import timm.layers
import torch
from comparing import SHOWS_SAVED, images, make_model, saved_bytes, train_step
from torch import nn

from timm_tresnet.models.layers.synchronized_norm import SynchronizedNorm, reduce_statistics

CONVERTERS = {"timm": timm.layers.convert_sync_batchnorm, "torch": nn.SyncBatchNorm.convert_sync_batchnorm}
CASES = [*((setting, "timm") for setting in ("none", "activations", "expansions", "checkpointing"))]
CASES += [("activations", "torch")]
BATCHES = [2, 5]  # of the two processes


def run_process(folder):
    """One of two processes: train a step in every case, on its part of the batch."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    results = {}
    for setting, convert in CASES:
        model = CONVERTERS[convert](make_model(setting, dtype=torch.float64))
        parallel = nn.parallel.DistributedDataParallel(model)
        part = images(sum(BATCHES), dtype=torch.float64).split(BATCHES)[rank]
        loss = parallel(part).square().sum() * len(BATCHES) / (sum(BATCHES) * 10)  # DDP averages over processes
        loss.backward()
        total = loss.detach() / len(BATCHES)
        torch.distributed.all_reduce(total)
        gradients = {f"grad of {name}": parameter.grad for name, parameter in model.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        kept = saved_bytes(model, part) if SHOWS_SAVED else None
        results[setting, convert] = {"loss": total, **gradients, **buffers, "kept": kept}
    model = CONVERTERS["timm"](make_model("activations"))
    empty = model.body.conv1(torch.randn(3 * rank, 48, 4, 4))  # one of the processes has no images
    empty.sum().backward()
    results["empty"] = empty.detach()
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.usefixtures("one_process")
def test_gradients_of_the_synchronized_norm_are_those_of_its_output(affine):
    def normalize(x, weight=None, bias=None):
        mean, var, count = reduce_statistics(x, None)
        return SynchronizedNorm.apply(x, weight, bias, mean, var, count, 1e-5, None)

    x = torch.randn(3, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.tensor([[-0.5, 0.0], [0.3, 1.0]], dtype=torch.float64).requires_grad_().unbind()
    inputs = (x, weight, bias) if affine else (x,)
    assert torch.autograd.gradcheck(normalize, inputs)
    torch.testing.assert_close(
        normalize(*inputs), nn.functional.batch_norm(x, None, None, *(inputs[1:] or (None, None)), True)
    )


@pytest.fixture(scope="module")
def processes(run_two_processes):
    """Results of each of two processes."""
    folder = run_two_processes(__name__)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_processes_train_like_one_with_the_whole_batch(processes, case):
    expected = train_step(make_model(dtype=torch.float64), images(sum(BATCHES), dtype=torch.float64))
    for result in processes:
        assert result[case].keys() - {"kept"} == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(result[case][name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_synchronized_norms_keep_as_little_as_plain_ones(processes):
    for rank, batch in enumerate(BATCHES):
        for setting, convert in CASES:
            plain = saved_bytes(make_model(setting, dtype=torch.float64), images(batch, dtype=torch.float64))
            assert processes[rank][setting, convert]["kept"] <= 1.02 * plain


def test_process_without_images_takes_part(processes):
    assert processes[0]["empty"].shape == (0, 16, 4, 4)
    assert processes[1]["empty"].isfinite().all()
    assert processes[1]["empty"].shape == (3, 16, 4, 4)

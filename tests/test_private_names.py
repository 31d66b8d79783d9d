"""Private names of PyTorch that this package uses, each with its purpose: one list, one test a name.

Where a release of PyTorch drops or changes one, its test fails, and `private` above it says who uses it and what else
there is.
"""

import ast
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comparing import HIDES_SAVED, SHOWS_SAVED
from torch import nn
from users import BEFORE_2_11

from timm_tresnet.recompute import eligibility

ROOT = Path(__file__).parent.parent
LISTED = set()


def private(*names, used_by, instead):
    """List the names that a test is about; used_by and instead are for who reads it when it fails."""
    LISTED.update(names)
    return lambda test: test


@private(
    "_version",
    used_by="saved.py, to see that a tensor was modified after it was made or used",
    instead="nothing public counts edits; autograd itself checks what it saves without hooks",
)
def test_version_counts_the_edits_of_a_tensor_and_all_its_views():
    tensor = torch.zeros(4)
    views = [tensor, tensor.detach(), tensor[1:]]
    before = [view._version for view in views]
    tensor.add_(1)
    views[2].mul_(2)
    assert [view._version for view in views] == [version + 2 for version in before]


@private(
    "_storage_Use_Count",
    used_by="utils/references.py, to see whether user code has kept the memory of a tensor that it has returned",
    instead="taking each such tensor for kept, so that nothing is recomputed from it",
)
def test_references_to_memory_are_counted():
    x = torch.ones(3)
    count = torch._C._storage_Use_Count(x.untyped_storage()._cdata)
    other = x.detach()
    assert torch._C._storage_Use_Count(x.untyped_storage()._cdata) == count + (2 if BEFORE_2_11 else 1)
    assert other is not x


@private(
    "_cdata",
    used_by="tests/comparing.py, to count storages once",
    instead="untyped_storage().data_ptr(), which is 0 for all of the meta device",
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_cdata_is_the_same_for_tensors_of_one_storage_only(device):
    tensor, other = torch.empty(4, device=device), torch.empty(4, device=device)
    same = {each.untyped_storage()._cdata for each in (tensor, tensor.detach(), tensor.view(2, 2), tensor[2:])}
    assert len(same) == 1
    assert other.untyped_storage()._cdata not in same


@private(
    "_raw_saved_result",
    "_top_saved_tensors_default_hooks",
    used_by="eligibility.py (_has_saved_tensor_hooks); the former with PyTorch 2.5, which lacks the latter",
    instead="the former with every release, at the price of two operations and a hook a forward",
)
@pytest.mark.parametrize("asks", [True, False], ids=["asked", "tried"])
def test_hooks_of_others_on_all_that_is_saved_can_be_seen(asks, monkeypatch):
    if not asks:
        monkeypatch.setattr(eligibility, "_find_top_hooks", None)
    elif eligibility._find_top_hooks is None:
        pytest.skip("this PyTorch cannot be asked for them")
    assert not eligibility._has_saved_tensor_hooks()
    with torch.autograd.graph.saved_tensors_hooks(torch.neg, torch.neg):
        assert eligibility._has_saved_tensor_hooks()
    with torch.autograd.graph.save_on_cpu():
        assert eligibility._has_saved_tensor_hooks()
    assert not eligibility._has_saved_tensor_hooks()


@private(
    "SavedTensor",
    used_by="tests/comparing.py (saved_bytes), to measure what is kept",
    instead="saved_bytes skips without it, as with PyTorch 2.5; benchmark.measure_kept weighs by other means",
)
@pytest.mark.skipif(not SHOWS_SAVED, reason=HIDES_SAVED)
def test_saved_tensor_shows_what_hooks_have_kept():
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: ("kept", tensor.shape), lambda kept: None):
        y = torch.ones(3, requires_grad=True).exp()
    assert y.grad_fn._raw_saved_result.data == ("kept", (3,))
    assert torch.ones(3, requires_grad=True).exp().grad_fn._saved_result.shape == (3,)


@private(
    "_batch_norm_impl_index",
    used_by="layers/norm_arithmetic.py, for the batch's statistics, with cuDNN's kernel where F.batch_norm has it",
    instead="torch.native_batch_norm returns them too, but never by cuDNN",
)
def test_batch_norm_returns_the_statistics_that_the_public_one_keeps_to_itself():
    x, weight, bias = torch.randn(4, 3, 5, 5), torch.randn(3), torch.randn(3)
    y, mean, rstd, *_ = torch._batch_norm_impl_index(x, weight, bias, None, None, True, 0.1, 1e-5, True)
    assert torch.equal(y, F.batch_norm(x, None, None, weight, bias, True, 0.1, 1e-5))
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(rstd, 1 / (x.var((0, 2, 3), correction=0) + 1e-5).sqrt())


@private(
    "_raw_saved_input",
    "_raw_saved_other",
    "_raw_saved_self",
    "_raw_saved_tensors",
    "_saved_weight",
    used_by="models/layers/, to discard what nodes have saved; the last for the weight as autocast has cast it",
    instead="hooks on everything saved (torch.autograd.graph.saved_tensors_hooks), which cost half a step of launches",
)
def test_nodes_show_what_they_saved():
    x, kernel = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(5, 3, 1, 1, requires_grad=True)
    conv = F.conv2d(x, kernel).grad_fn
    assert conv._saved_weight is kernel
    product, seen = (x * x).grad_fn, []
    for saved in (conv._raw_saved_input, product._raw_saved_self, product._raw_saved_other):
        saved.register_hooks(lambda tensor: seen.append(tensor.data_ptr()) or tensor, lambda tensor: tensor)
    assert seen == [x.data_ptr()] * 3


@private(
    "_autograd",
    "_device",
    "_get_current_function_mode_stack",
    "_len_torch_dispatch_stack",
    "_len_torch_function_stack",
    "_python_dispatch",
    "_saved_result",
    "_saved_tensors_hooks_is_enabled",
    used_by="eligibility.py, to step aside where modes are active or hooks on saved tensors are disabled",
    instead="nothing public tells",
)
def test_modes_and_forbidden_hooks_can_be_seen():
    from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
    from torch.utils._device import DeviceContext
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()) == (0, 0)
    with Mode(), torch.device("cpu"):
        assert torch._C._len_torch_function_stack() == 2
        assert [type(mode) for mode in _get_current_function_mode_stack()] == [Mode, DeviceContext]
    with TorchDispatchMode():
        assert torch._C._len_torch_dispatch_stack() == 1
    assert torch._C._autograd._saved_tensors_hooks_is_enabled()
    with torch.autograd.graph.disable_saved_tensors_hooks("no"):
        assert not torch._C._autograd._saved_tensors_hooks_is_enabled()
    assert torch.ones(2, requires_grad=True).exp().grad_fn._saved_result._version == 0


@private(
    "_current_graph_task_id",
    "_execution_engine",
    used_by="saved.py, to share values within one backward pass and to drop them at its end",
    instead="torch.utils.checkpoint asks for the former too; without both, values are made as often as needed",
)
def test_a_backward_pass_has_a_number_and_calls_back_at_its_end():
    numbers = []

    def note(grad):
        numbers.append(torch._C._current_graph_task_id())
        torch.autograd.Variable._execution_engine.queue_callback(lambda: numbers.append("end"))

    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(note)
    assert torch._C._current_graph_task_id() == -1
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    assert numbers[1::2] == ["end", "end"]
    assert -1 not in numbers
    assert numbers[0] != numbers[2]


@private(
    "_C",
    "_current_level",
    "_functorch",
    "_is_any_autocast_enabled",
    used_by="eligibility.py, to step aside for torch.func and forward mode; saved.py, to recompute outside of autocast",
    instead="torch.is_autocast_enabled(device_type) for the last; nothing public tells of the others",
)
def test_transforms_forward_mode_and_autocast_can_be_seen():
    def look(x=None):
        from torch.autograd import forward_ad

        seen = (
            torch._C._functorch.peek_interpreter_stack() is not None,
            forward_ad._current_level >= 0,
            torch._C._is_any_autocast_enabled(),
        )
        looks.append(seen)
        return torch.zeros(())

    looks = []
    look()
    torch.func.grad(lambda x: look() + x.sum())(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        look()
    with torch.autocast("cpu"):
        look()
    assert looks == [(False,) * 3, (True, False, False), (False, True, False), (False, False, True)]


@private(
    "native_batch_norm",
    "native_batch_norm_backward",
    used_by="layers/norm_arithmetic.py, synchronized_norm.py, for batch norm's arithmetic with given statistics",
    instead="F.batch_norm in eval mode, and torch.autograd.grad of it",
)
def test_native_batch_norm_takes_statistics_and_sums_gradients():
    x, grad_y, scale, shift = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(3), torch.randn(3)
    mean, var = torch.randn(3), torch.rand(3) + 0.5
    y = torch.native_batch_norm(x, scale, shift, mean, var, False, 0.0, 1e-5)[0]
    assert torch.equal(y, F.batch_norm(x, mean, var, scale, shift, False, 0.0, 1e-5))
    grad_x, sum_grad_x_hat, sum_grad = torch.ops.aten.native_batch_norm_backward(
        grad_y, x, scale, mean, var, None, None, False, 1e-5, [True, True, True]
    )
    rstd = (var + 1e-5).rsqrt()
    torch.testing.assert_close(grad_x, grad_y * (scale * rstd)[:, None, None])
    torch.testing.assert_close(sum_grad, grad_y.sum((0, 2, 3)))


@private(
    "batch_norm_elemt",
    used_by="layers/norm_arithmetic.py, for batch norm in one kernel on CUDA",
    instead="scale_and_shift, as on the CPU",
)
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batch_norm_elemt_normalises_with_a_given_mean_and_rstd():
    x, mean, rstd, weight, bias = (torch.randn(size).cuda() for size in ((2, 3, 4, 4), (3,), (3,), (3,), (3,)))
    expected = (x - mean[:, None, None]) * (rstd * weight)[:, None, None] + bias[:, None, None]
    torch.testing.assert_close(torch.batch_norm_elemt(x, weight, bias, mean, rstd, 0.0), expected)


@private(
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    used_by="eligibility.py (find_user_code), since a hook may see and edit what a module returns",
    instead="nothing public lists hooks; without it, every module counts as user-defined and everything is stored",
)
@pytest.mark.parametrize("which", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_of_a_module_and_of_all_modules_are_in_dictionaries(which):
    module, everywhere, kind = nn.ReLU(), nn.modules.module, which.removeprefix("full_")
    held = getattr(module, f"_{kind}s"), getattr(everywhere, f"_global_{kind}s")
    assert not any(held)
    handles = [
        getattr(module, f"register_{which}")(lambda *_: None),
        getattr(everywhere, f"register_module_{which}")(lambda *_: None),
    ]
    assert all(held)
    for handle in handles:
        handle.remove()
    assert not any(held)


@private(
    "_modules",
    used_by="layers/conv_norm_act.py (add_module), to see which child is replaced; eligibility.py (find_user_code)",
    instead="dict(module.named_children())",
)
def test_modules_are_the_children_that_conversions_replace():
    unit = nn.Sequential(nn.BatchNorm2d(3))
    assert unit._modules["0"] is unit[0]
    added = []
    unit.add_module = lambda name, module: added.append((name, type(module)))
    nn.SyncBatchNorm.convert_sync_batchnorm(unit)
    assert added == [("0", nn.SyncBatchNorm)]


@private(
    "_buffers",
    "_call_impl",
    "_compiled_call_impl",
    "_conv_forward",
    "_parameters",
    used_by="program.py and eligibility.py, to read what is in a block, and whether it is as its constructor made it",
    instead="getattr, several times as slow; without it, every block runs as modules",
)
def test_fields_of_a_module_are_those_that_it_runs_with():
    conv, norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(3)
    assert conv.__dict__["_parameters"] == {"weight": conv.weight, "bias": None}
    assert norm.__dict__["_buffers"]["running_mean"] is norm.running_mean
    assert {"stride", "padding", "dilation", "groups", "padding_mode"} <= conv.__dict__.keys()
    assert {"training", "track_running_stats", "momentum", "eps"} <= norm.__dict__.keys()
    assert "_compiled_call_impl" not in conv.__dict__
    conv.compile()
    assert "_compiled_call_impl" in conv.__dict__
    other = nn.Conv2d(3, 4, 1)
    other._conv_forward = lambda x, weight, bias: weight is other.weight
    assert other(torch.ones(1, 3, 2, 2)) is True
    other._call_impl = lambda x: x
    assert other(1) == 1


@private(
    "_exit",
    used_by="benchmarks/collection.py, to end a fork without what its parent would do at exit",
    instead="a new interpreter for each command, whose imports would count",
)
def test_fork_ends_at_once():
    child = os.fork()
    if not child:
        try:
            os._exit(3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


@private(
    "_dynamo",
    used_by="compiled.py, to step aside for compiled autograd; stage.py, to see that the compiler has given up on it",
    instead="nothing public tells",
)
def test_compiler_tells_of_compiled_autograd_and_of_functions_that_it_skips():
    import torch._dynamo.compiled_autograd

    assert torch._dynamo.config.compiled_autograd is False
    assert torch._dynamo.compiled_autograd.compiled_autograd_enabled is False
    get = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", None)
    if get is None:
        pytest.skip("this PyTorch does not tell whether the compiler takes the functions that are called")
    seen = []
    assert not get()
    look = torch.compiler.disable(lambda x: seen.append(get()), recursive=False)
    torch.compile(lambda x: look(x + 1), backend=lambda graph, inputs: graph)(torch.ones(2))
    assert seen[0]


@private(
    "_get_current_dispatch_mode_stack",
    used_by="eligibility.py, to know modes that only look; models/explanation.py has one",
    instead="refusing every dispatch mode, and no explain_recompute",
)
def test_dispatch_modes_can_be_listed():
    from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

    with TorchDispatchMode() as mode:
        assert _get_current_dispatch_mode_stack() == [mode]


@private(
    "_NormBase",
    used_by="checkpoint.py, to find running statistics of blocks that run again",
    instead="modules that have a running_mean",
)
def test_norm_base_is_every_norm_with_running_statistics():
    norms = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm2d]
    assert all(issubclass(norm, nn.modules.batchnorm._NormBase) for norm in norms)
    assert {name for name, _ in nn.BatchNorm2d(3).named_buffers()} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


@private(
    "_inductor",
    used_by="benchmarks/training_memory.py, to give the compiler a budget of memory for one network alone",
    instead="torch.compile(options=...), where a release takes activation_memory_budget there",
)
def test_compiler_takes_a_budget_of_memory():
    import torch._functorch.config
    from torch._inductor.compile_fx import compile_fx

    assert callable(compile_fx)
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        assert torch._functorch.config.activation_memory_budget == 0.5
    assert torch._functorch.config.activation_memory_budget == 1


def find_private_names(folder):
    """Names with a leading underscore that are used in a folder's files and that none of them defines.

    It looks at the names alone, not at what they are read from. So it passes over a private name of PyTorch that is
    also one of ours, and over one in a string, as for getattr; and it finds those of other packages too. What is
    private without an underscore, such as StorageWeakRef, is listed by hand.
    """
    used, ours = set(), set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                    ours.add(name)
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    ours.add(name)
                case ast.Attribute(attr=name):
                    used.add(name)
                case ast.Import(names=names):
                    used.update(word for each in names for word in each.name.split("."))
                case ast.ImportFrom(module=module, names=names):
                    used.update([*(module or "").split("."), *(each.name for each in names)])
    return {name for name in used - ours if name.startswith("_") and not name.startswith("__")}


@pytest.mark.parametrize("folder", ["timm_tresnet", "benchmarks"])
def test_every_private_name_is_listed(folder):
    unlisted = find_private_names(ROOT / folder) - LISTED
    assert not unlisted, "list them here, each with a test of what it does for us, or use what is public"


def test_every_listed_name_is_used():
    folders = ("timm_tresnet", "benchmarks", "tests")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if path != Path(__file__)]
    source = "\n".join(path.read_text() for path in paths)
    assert not [name for name in LISTED if name not in source]


def test_scan_finds_attributes_and_imports_and_passes_over_our_own(tmp_path):
    (tmp_path / "a.py").write_text(
        "import torch._one\nfrom torch._two import _three\ntorch.nn._four.x\ndef _ours(x): self._mine = x._five\n"
        "_ours(self._mine).__six__"
    )
    assert find_private_names(tmp_path) == {"_one", "_two", "_three", "_four", "_five"}

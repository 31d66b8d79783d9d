import functools
import itertools
import logging

import pytest
import torch
from comparing import RECOMPUTING, assert_close, each_setting, images, make_model, train_step
from timm.layers import convert_splitbn_model, freeze_batch_norm_2d
from torch import nn
from users import MODIFIED, step_between

from timm_tresnet.recompute.compiled import COUNTS_ONCE
from timm_tresnet.recompute.eligibility import log_once

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo reads it

SMALL = {"layers": (1, 1, 2, 1), "width_factor": 0.125}
with_regions = pytest.mark.skipif(not COUNTS_ONCE, reason="this PyTorch's compiler would count twice in regions")


class Compiler:
    """Takes graphs apart and splits them as Inductor does, and runs them as they are.

    Attributes:
        graphs: what Dynamo made.
        kept: tensors that forward hands to backward, as (operator that made it, shape, bytes).
    """

    def __init__(self):
        # Imported here, since every worker of xdist imports this file: they take five seconds.
        from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
        from torch._dynamo.backends.common import aot_autograd
        from torch._inductor.decomposition import select_decomp_table

        self.graphs, self.kept = [], []
        self._box = make_boxed_func
        self._backend = aot_autograd(
            fw_compiler=self._take_forward,
            bw_compiler=lambda graph, inputs: make_boxed_func(graph),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return self._backend(graph, inputs)

    def _take_forward(self, graph, inputs):
        for node in list(graph.graph.nodes)[-1].args[0]:
            value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
            if isinstance(value, torch.Tensor) and node.op == "call_function":
                self.kept.append((str(node.target), tuple(value.shape), value.numel() * value.element_size()))
        return self._box(graph)

    def kept_bytes(self):
        return sum(size for _, _, size in self.kept)

    def kept_maps(self):
        """Operators that made the feature maps that are kept."""
        return [operator for operator, shape, _ in self.kept if len(shape) == 4 and shape[2] > 1]


def compile_part(model, part, backend, **kwargs):
    kwargs = {"backend": backend, "fullgraph": True, **kwargs}
    if part == "network":
        return torch.compile(model, **kwargs)
    if part == "stages":
        for stage in (model.body.layer1, model.body.layer2, model.body.layer3, model.body.layer4):
            stage.compile(**kwargs)
    else:  # one stage, which is quickest
        model.body.layer3.compile(**kwargs)
    return model


def compiled_step(
    setting, part="stage", backend=None, change=lambda model: model, x=None, dtype=torch.float64, **kwargs
):
    """A training step of a network made anew, by name, and its compiler."""
    torch.compiler.reset()
    model = change(make_model(setting, **{**SMALL, **kwargs})).to(dtype)
    compiler = Compiler() if backend is None else backend
    torch.manual_seed(3)
    step = train_step(compile_part(model, part, compiler), images(4).to(dtype) if x is None else x)
    return {name.replace("_orig_mod.", ""): value for name, value in step.items()}, compiler


def plain_step(change=lambda model: model, x=None, dtype=torch.float64, **kwargs):
    model = change(make_model("none", **{**SMALL, **kwargs})).to(dtype)
    torch.manual_seed(3)
    return train_step(model, images(4).to(dtype) if x is None else x)


def mark(*cases, few):
    """The first few are always tried, the rest are further variants."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=[pytest.mark.thorough] if index >= few else []
        )
        for index, case in enumerate(cases)
    ]


BLOCKS = 5
_LONG = {"layers": (1, 1, BLOCKS, 1)}
_WIDE = {"layers": (1, 1, 1, 1), "width_factor": 0.5}


@functools.cache
def long_step(setting):
    """A step through a compiled stage of several blocks."""
    return compiled_step(setting, **_LONG)


@functools.cache
def network_step(setting):
    return compiled_step(setting, "network", **_WIDE)


def assert_numbers_of_a_plain_step_and_one_count(compiled, graphs=1, **kwargs):
    step, compiler = compiled
    assert len(compiler.graphs) == graphs
    assert_close(step, plain_step(**kwargs))
    assert step["body.layer3.0.conv2.bn.num_batches_tracked"] == 1


@pytest.mark.parametrize("setting", mark("activations", "checkpointing", "expansions", few=1))
def test_a_compiled_stage_gives_the_numbers_of_a_plain_one_and_counts_once(setting):
    assert_numbers_of_a_plain_step_and_one_count(long_step(setting), **_LONG)


@pytest.mark.thorough
@pytest.mark.parametrize("setting", RECOMPUTING)
def test_a_compiled_network_gives_the_numbers_of_a_plain_one_and_counts_once(setting):
    assert_numbers_of_a_plain_step_and_one_count(network_step(setting), **_WIDE)


@pytest.mark.thorough
def test_compiled_stages_give_the_numbers_of_plain_ones_and_count_once():
    assert_numbers_of_a_plain_step_and_one_count(compiled_step("activations", "stages"), graphs=4)


@pytest.mark.thorough
@each_setting
def test_a_backend_that_runs_the_graph_as_it_is_gives_the_same_numbers(setting):
    """Two forwards before two backwards: checkpointed code runs again with the statistics of another batch there."""

    def run(model, compiled):
        if compiled:
            model.body.layer3.compile(backend="eager", fullgraph=True)
        torch.manual_seed(3)
        losses = [model(images(4).double() * scale).square().mean() for scale in (1, 2)]
        for loss in losses:
            loss.backward()
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return buffers | {name: parameter.grad for name, parameter in model.named_parameters()}

    torch.compiler.reset()
    kwargs = {**SMALL, "drop_path_rate": 0.5}
    assert_close(run(make_model(setting, **kwargs).double(), True), run(make_model("none", **kwargs).double(), False))


@pytest.mark.thorough
@pytest.mark.parametrize("setting", ["activations", "checkpointing"])
def test_random_masks_are_the_same_in_forward_and_backward(setting):
    assert_close(compiled_step(setting, drop_path_rate=0.5)[0], plain_step(drop_path_rate=0.5))


@pytest.mark.thorough  # half a minute of compiling C++
def test_inductor_draws_a_mask_once():
    """Its own random numbers: the gradient is that of the loss with the mask that the forward drew."""
    torch.compiler.reset()
    network = make_model("activations", layers=(1, 1, 1, 1), width_factor=0.125, drop_path_rate=0.9).double()
    network.body.layer4.compile(fullgraph=True)
    x = images(8, 32).double().requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)

    def compute_loss(x):
        torch.manual_seed(5)
        return network(x).square().sum()

    (gradient,) = torch.autograd.grad(compute_loss(x), x)
    with torch.no_grad():
        shifted = x + 1e-6 * direction, x - 1e-6 * direction
    after, before = (compute_loss(each.requires_grad_()).item() for each in shifted)
    assert (gradient * direction).sum().item() == pytest.approx((after - before) / 2e-6, rel=1e-5)


@with_regions
def test_outputs_of_convolutions_are_kept_and_little_else():
    maps = long_step("activations")[1].kept_maps()
    assert maps.count("aten.convolution.default") == BLOCKS * 3 + 1  # and of the blur; the shortcut's runs again
    others = [operator for operator in maps if operator != "aten.convolution.default"]
    assert others == ["aten.relu.default"] * 2  # one in the middle, so that chains stay short, and the stage's own


@with_regions
@pytest.mark.thorough
def test_expansions_are_not_kept():
    convolutions = long_step("expansions")[1].kept_maps().count("aten.convolution.default")
    assert convolutions == BLOCKS * 2 + 2  # and of the blur and the shortcut


@with_regions
@pytest.mark.thorough
def test_checkpointing_keeps_every_second_output_and_no_convolution():
    assert long_step("checkpointing")[1].kept_maps() == ["aten.relu.default"] * 3


@with_regions
@pytest.mark.parametrize("setting", mark("activations", "checkpointing", "expansions", few=1))
def test_statistics_and_gates_are_kept(setting):
    _, compiler = long_step(setting)
    gates = [shape for _, shape, _ in compiler.kept if len(shape) == 4 and shape[2] == 1]
    assert len(gates) >= BLOCKS * 2  # means of channels, and a convolution of each squeeze-and-excitation
    statistics = [operator for operator, shape, _ in compiler.kept if operator.endswith("getitem>") and len(shape) == 1]
    assert len(statistics) >= BLOCKS * 3 + 1  # of each norm


@with_regions
@pytest.mark.thorough
@pytest.mark.parametrize(("setting", "most"), [("activations", 0.6), ("expansions", 0.5), ("checkpointing", 0.3)])
def test_a_compiled_network_keeps_less_than_with_plain_pytorch(setting, most):
    kept, plain = (network_step(each)[1].kept_bytes() for each in (setting, "none"))
    assert kept <= most * plain


def freeze_all_but_the_last_stage(model):
    for parameter in (*model.body[:-1].parameters(),):
        parameter.requires_grad_(False)
    return model


@pytest.mark.thorough
def test_frozen_parts_keep_no_more_than_with_plain_pytorch():
    change = freeze_all_but_the_last_stage
    step, compiler = compiled_step("activations", change=change)
    assert_close(step, plain_step(change))
    assert compiler.kept_bytes() <= compiled_step("none", change=change)[1].kept_bytes()


def evaluate_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def average_cumulatively(model):
    model.body.layer3[1].conv1.bn.track_running_stats = False
    return model


def replace_an_activation(model):
    model.body.layer3[1].conv1.bn.act = nn.Hardswish(inplace=True)
    return model


def replace_another_activation(model):
    model.body.layer3[0].conv1.bn.act = nn.Hardswish(inplace=True)
    return model


def overwrite_what_is_saved(model):
    model.body.layer3[1].se.act = nn.SiLU(inplace=True)
    return model


def lose_a_bias(model):
    model.body.layer3[1].conv2.bn.bias = None
    return model


def draw_in_an_activation(model):
    model.body.layer3[1].conv1.bn.act = nn.RReLU()
    return model


def use_timms_drop_path(model):
    import timm.layers

    model.body.layer3[1].drop_path = timm.layers.DropPath(0.5)
    return model


def put_in_users_module(model):
    class Mine(nn.ReLU):
        def forward(self, x):
            return super().forward(x) * 2

    model.body.layer3[1].conv2.bn.act = Mine()
    model.body.layer2.append(Mine())
    return model


def change_much(model):
    return put_in_users_module(average_cumulatively(replace_another_activation(model)))


CHANGES = [
    change_much,
    evaluate_norms,
    replace_an_activation,
    functools.partial(convert_splitbn_model, num_splits=2),
    freeze_batch_norm_2d,
]


@pytest.mark.parametrize(
    ("change", "setting"),
    mark(*zip(CHANGES, itertools.cycle(("activations", "checkpointing"))), few=1),
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", "split_norms"),
)
@pytest.mark.filterwarnings("ignore:.*lru_cache")  # Dynamo, about PyTorch's own functions
def test_networks_that_users_changed_give_the_same_numbers(change, setting):
    assert_close(compiled_step(setting, change=change)[0], plain_step(change))


def use_much_that_no_region_can_hold(model):
    return lose_a_bias(overwrite_what_is_saved(draw_in_an_activation(model)))


@pytest.mark.parametrize(
    ("backend", "change"),
    mark(
        ("eager", use_much_that_no_region_can_hold),
        ("eager", use_timms_drop_path),
        ("aot_eager", use_much_that_no_region_can_hold),
        few=1,
    ),
)
def test_modules_that_no_region_can_hold_are_left_alone(backend, change):
    step, _ = compiled_step("activations", backend=backend, change=change)
    assert_close(step, plain_step(change))


@pytest.mark.thorough
def test_hooks_of_users_run_once_a_step():
    calls = []

    def add_hook(model):
        model.body.layer3[1].conv1.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
        return model

    step, compiler = compiled_step("activations", change=add_hook)
    assert len(calls) == len(compiler.graphs) == 1
    assert_close(step, plain_step())


def test_hooks_on_all_modules_run_once_in_each():
    calls = []

    def note(module, inputs, output):
        if not isinstance(module, torch.fx.GraphModule):  # a compiled graph is a module too
            calls.append(type(module))

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        step, _ = compiled_step("activations", backend="eager")
        compiled_calls = list(calls)
        calls.clear()
        expected = plain_step()
    finally:
        hook.remove()
    assert compiled_calls == calls
    assert_close(step, expected)


class Breaks(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x * 1.0


@pytest.mark.thorough
def test_statistics_count_once_where_the_compiler_has_given_up():
    def separate(model):
        for position in (2, 1):
            model.body.layer3.insert(position, Breaks())
        return model

    torch.compiler.reset()
    model = separate(make_model("activations", **SMALL)).double()
    with torch._dynamo.config.patch(recompile_limit=1):
        model.body.layer3.compile(backend="eager")
        torch.manual_seed(3)
        step = train_step(model, images(4).double())
    assert_close(step, plain_step(separate))


def test_graphs_with_regions_can_be_cached_on_the_disk():
    """PyTorch passes over contexts without a hash; it must differ with the setting."""
    from timm_tresnet.recompute.compiled import _CONTEXTS

    assert len({contexts.cache_hash for contexts in _CONTEXTS.values()}) == 3


@pytest.mark.parametrize(
    ("norm_layer", "act_layer"),
    mark(("groupnorm1", "silu"), ("batchnorm2d", "frelu"), few=1),
)
def test_other_norms_and_activations_give_the_same_numbers(norm_layer, act_layer):
    kwargs = {"norm_layer": norm_layer, "act_layer": act_layer}
    assert_close(compiled_step("expansions", **kwargs)[0], plain_step(**kwargs))


@with_regions
@pytest.mark.thorough
def test_autocast_keeps_half_and_the_numbers_of_its_precision():
    def run(setting):
        torch.compiler.reset()
        model, compiler = make_model(setting, **SMALL), Compiler()
        with torch.autocast("cpu", torch.bfloat16):
            loss = compile_part(model, "stage", compiler)(images(4)).float().square().mean()
        loss.backward()
        return loss, model.body.layer1[0].conv1.conv.weight.grad, compiler.kept_bytes()

    loss, gradient, kept = run("activations")
    plain_loss, plain_gradient, plain_kept = run("none")
    torch.testing.assert_close(loss, plain_loss, rtol=2e-2, atol=0)
    assert (gradient - plain_gradient).norm() <= 0.2 * plain_gradient.norm()
    assert kept < 0.75 * plain_kept


def operators_in(graphs):
    for graph in graphs:
        for module in graph.modules():
            if isinstance(module, torch.fx.GraphModule):
                yield from module.graph.nodes


def has_region(nodes):
    return any("checkpoint" in str(node.target) for node in nodes)


@with_regions
def test_nothing_works_in_place_on_feature_maps():
    _, compiler = long_step("activations")
    for node in operators_in(compiler.graphs):
        if node.op not in ("call_function", "call_method"):
            continue
        assert not node.kwargs.get("inplace"), node
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        assert not name.endswith("_") or name.startswith("__") or name == "copy_", node


@pytest.mark.parametrize("mode", mark("no_grad", "eval", "none", few=1))
def test_no_region_is_made_where_nothing_is_to_be_recomputed(mode):
    torch.compiler.reset()
    model, compiler = make_model("none" if mode == "none" else "activations", **SMALL).train(mode != "eval"), Compiler()
    with torch.set_grad_enabled(mode != "no_grad"):
        compile_part(model, "stage", compiler)(images())
    assert compiler.graphs
    assert not has_region(operators_in(compiler.graphs))


def test_a_compiler_that_would_count_twice_makes_no_region_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr("timm_tresnet.recompute.stage.COUNTS_ONCE", False)
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, "timm_tresnet"):
        step, compiler = compiled_step("activations")
    assert compiler.graphs
    assert not has_region(operators_in(compiler.graphs))
    assert_close(step, plain_step())
    reason = "nothing of this network: under torch.compile that needs PyTorch 2.9"
    assert [reason in record.getMessage() for record in caplog.records].count(True) == 1


def test_a_network_exported_in_training_mode_has_no_region():
    model = make_model("activations", **SMALL).train()
    exported = torch.export.export(model, (images(),))
    assert not has_region(exported.graph.nodes)


@pytest.mark.thorough
def test_features_of_a_compiled_network_are_those_of_a_plain_one():
    torch.compiler.reset()
    kwargs = {**SMALL, "layers": (1, 1, 1, 1)}
    model, plain = (make_model(setting, **kwargs).double() for setting in ("activations", "none"))
    x = images().double()
    forward = torch.compile(model.forward_intermediates, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(forward(x, intermediates_only=True), plain.forward_intermediates(x)[1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.thorough
def test_other_image_sizes_and_batches_can_follow():
    torch.compiler.reset()
    model, plain = (make_model(setting, **SMALL).double() for setting in ("activations", "none"))
    model.body.layer3.compile(backend="aot_eager", fullgraph=True)
    for batch, size in ((2, 64), (4, 96)):
        x = images(batch, size).double()
        assert_close(_step(model, x), _step(plain, x))


def _step(network, x):
    network.zero_grad()
    loss = network(x).square().mean()
    loss.backward()
    return {"loss": loss.detach(), **{name: each.grad for name, each in network.named_parameters()}}


@with_regions
def test_a_single_value_a_channel_is_refused_as_by_pytorch():
    torch.compiler.reset()
    model = make_model("activations", **SMALL)
    model.body.layer4.compile(backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="more than one value per channel when training|more than 1 value per channel"):
        model(images(1, 32))


@with_regions
@pytest.mark.thorough
def test_fused_step_before_backward_is_an_error():
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match=MODIFIED):
        step_between("expansions", torch.optim.SGD, compiled=True, fused=True)

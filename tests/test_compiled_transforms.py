"""The compiler with torch.func, with compiled autograd and around networks that it gives up on."""

from contextlib import nullcontext

import pytest
import torch
from comparing import RECOMPUTING, assert_close, collect, images, make_model, train_step

SMALL = {"layers": (1, 1, 1, 1), "width_factor": 0.125, "num_classes": 5}
each_setting = pytest.mark.parametrize(
    "setting", ["activations", *(pytest.param(each, marks=pytest.mark.thorough) for each in RECOMPUTING[1:])]
)
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo reads it


def make(setting):
    torch.compiler.reset()
    return make_model(setting, **SMALL).double()


def batch():
    return images(2, 32).double()


def make_loss(model):
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def loss(parameters, x):
        state = {**parameters, **{name: buffer.clone() for name, buffer in buffers.items()}}
        return torch.func.functional_call(model, state, (x,)).square().mean()

    return loss


def differentiate(kind, model):
    """Gradients by name, without the prefix of compiled networks."""
    wrapped = torch.compile(model, backend="eager") if kind == "grad_of_compiled" else model
    parameters = {name: parameter.detach() for name, parameter in wrapped.named_parameters()}
    loss = make_loss(wrapped)
    run = torch.func.grad(loss)
    compiled = run if kind == "grad_of_compiled" else torch.compile(run, backend="eager")
    return {name.removeprefix("_orig_mod."): grad for name, grad in compiled(parameters, batch()).items()}


@pytest.mark.thorough
@pytest.mark.parametrize(("kind", "setting"), [("compiled_grad", "checkpointing"), ("grad_of_compiled", "expansions")])
def test_grad_of_torch_func_gives_the_gradients_and_leaves_the_compiler_as_it_was(kind, setting):
    expected = train_step(make("none"), batch())
    grads = differentiate(kind, make(setting))
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[f"grad of {name}"], rtol=1e-10, atol=1e-12)
    model = make_model(setting, **SMALL).double()  # without a reset
    later = train_step(torch.compile(model, backend="eager"), batch())
    assert_close({name.replace("_orig_mod.", ""): value for name, value in later.items()}, expected)


@pytest.mark.thorough  # the next one has the compiler around both
@pytest.mark.parametrize(
    ("setting", "around_forward"),
    [("checkpointing", False), ("expansions", True)],
    ids=["checkpointing-backward", "expansions-step"],
)
def test_compiled_autograd_gives_the_gradients(setting, around_forward):
    """Around the forward too, nothing is recomputed. It takes long to trace what is, so this is one stage."""

    import torch._dynamo.compiled_autograd

    def enable():
        return torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager"))

    def run(stage, context):
        x = torch.rand(2, stage[0].conv1.conv.in_channels, 8, 8, dtype=torch.float64, generator=torch.manual_seed(1))
        with context:
            return stage(x).square().mean()

    stage, plain = make(setting).body.layer3, make("none").body.layer3
    loss = run(stage, enable() if around_forward else nullcontext())
    with enable():
        loss.backward()
    expected = run(plain, nullcontext())
    expected.backward()
    assert_close(collect(stage, loss), collect(plain, expected))


@each_setting
def test_compiled_step_with_compiled_autograd_gives_the_gradients(setting):
    model = make(setting)

    @torch.compile(backend="eager")
    def step(x):
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with torch._dynamo.config.patch(compiled_autograd=True):
        loss = step(batch())
    assert_close(collect(model, loss), train_step(make("none"), batch()))


@pytest.mark.thorough
def test_network_that_the_compiler_skips_trains_in_a_compiled_step():
    model = make("checkpointing")
    skipped = torch.compiler.disable(model)

    @torch.compile(backend="eager")
    def step(x):
        loss = skipped(x).square().mean()
        loss.backward()
        return loss

    step(batch())
    expected = train_step(make("none"), batch())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[f"grad of {name}"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stages", [("layer1", "layer2"), pytest.param(("layer1",), marks=pytest.mark.thorough)])
@each_setting
def test_stages_compiled_alone_give_the_numbers_of_a_plain_step(stages, setting):
    model = make(setting)
    for stage in stages:
        getattr(model.body, stage).compile(backend="eager")
    assert_close(train_step(model, batch()), train_step(make("none"), batch()))

"""User actions under every setting and in plain PyTorch: bit-equal results, or the same kind of error."""

import functools
import re
import warnings
from dataclasses import dataclass

import comparing
import pytest
import torch
import torch.nn.functional as F
from comparing import RECOMPUTING, collect, make_model
from packaging.version import Version
from torch.overrides import TorchFunctionMode

from timm_tresnet.models.layers import ConvNormAct

NETWORK = {"layers": (1, 2, 5, 1)}  # the third stage has a block that keeps its output in the middle


def inputs(batch=2, size=48):
    return comparing.images(batch, size)


def build(setting, **kwargs):
    return make_model(setting, **{**NETWORK, **kwargs})


def another(model, **kwargs):
    """Make another network with the same setting and other arguments."""
    return build("checkpointing" if model.body.layer1.grad_checkpointing else model.recompute, **kwargs)


def units(model):
    return [module for module in model.modules() if isinstance(module, ConvNormAct)]


class Steeper(TorchFunctionMode):
    """Gives leaky ReLU another slope."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.leaky_relu, F.leaky_relu_):
            return function(args[0], 0.3)
        return function(*args, **(kwargs or {}))


def step_between(setting, optimizer, compiled=False, **kwargs):
    """Outcome of a backward after a step of an optimizer has changed the weights."""
    model = make_model(setting, layers=(1, 1, 2, 1), width_factor=0.125)
    network = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    loss = network(inputs()).square().mean()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer(model.parameters(), lr=0.1, **kwargs).step()
    loss.backward()
    return collect(model, loss)


BEFORE_2_11 = Version(torch.__version__) < Version("2.11")  # of the releases between, only 2.5 was tried
MODIFIED = "modified by an inplace operation"
FREED = "backward through the graph a second time"
_OF_THE_TEST = (AttributeError, ImportError, NameError, TypeError)  # its own mistakes, which prove nothing


def same_as_plain(
    *variants, few=3, settings=RECOMPUTING, in_turn=False, tolerance=None, raises=None, when=lambda *_: True
):
    """Make a test of a user action, a function from a network to tensors by name.

    Args:
        variants: what the function takes before the network; a tuple where that is more than one argument.
        few: how many variants are tried each time, each under one of the settings in turn, a single one under all but
            "expansions"; all else is `thorough`.
        settings: those to compare with "none".
        in_turn: whether each variant is tried under one of the settings in turn, not under all.
        tolerance: largest relative difference of a gradient; without it, all bits are the same.
        raises: regular expression for the message of the error that plain PyTorch raises; without it, it raises none.
        when: whether a variant, given as its arguments, is one of those that raise it; all are by default.
    """

    def decorate(function):
        cases = []
        for index, variant in enumerate(variants or [()]):
            arguments = variant if isinstance(variant, tuple) else (variant,)
            run = functools.partial(function, *arguments)
            # Without the second term, a factor of a product of variants could get the same setting each time.
            turn = (index + index // len(settings) ** 2) % len(settings)
            for setting in settings:
                its_turn = setting == settings[turn]
                if in_turn and not its_turn:
                    continue
                name = "-".join([*map(_word, arguments), setting])
                chosen = its_turn if len(variants) > 1 else setting != "expansions"
                each_time = index < few and chosen
                marks = [] if each_time else [pytest.mark.thorough]
                cases.append(pytest.param(run, setting, id=name, marks=marks))
        raising = [run for run in {case.values[0] for case in cases} if raises and when(*run.args)]
        assert bool(raising) == (raises is not None), f"no variant of {function.__name__} raises {raises}"

        @pytest.mark.parametrize(("run", "setting"), cases)
        def test(run, setting):
            expected = _plain_outcome(run)
            if run in raising:
                assert isinstance(expected, Raised), f"plain PyTorch raises nothing, for {raises}"
                assert re.search(raises, expected.message), expected
            else:
                assert not isinstance(expected, Raised), (
                    f"plain PyTorch raises {expected}, and the test does not say so"
                )
            assert_same(outcome(run, setting), expected, tolerance)

        test.__name__, test.__doc__ = function.__name__, function.__doc__
        return test

    return decorate


@dataclass(frozen=True)
class Raised:
    """An error without its traceback, which would keep the network alive."""

    kind: type
    message: str


def outcome(run, setting):
    """Tensors by name, among them the state of the random numbers, or the error."""
    torch.manual_seed(2)
    model = build(setting)
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what users do also makes PyTorch warn, in both cases
        try:
            result = run(model)
        except _OF_THE_TEST:
            raise
        except Exception as error:
            return Raised(type(error), str(error))
    return {**result, "random": torch.get_rng_state()}


@functools.lru_cache(maxsize=1)  # the settings of a case follow each other
def _plain_outcome(run):
    return outcome(run, "none")


def assert_same(actual, expected, tolerance=None):
    if isinstance(expected, Raised):
        kind = actual.kind if isinstance(actual, Raised) else None
        assert kind is expected.kind, f"plain: {expected.message[:200]}; here: {str(actual)[:300]}"
        return
    assert not isinstance(actual, Raised), f"plain: no error; here: {actual.kind.__name__}: {actual.message[:500]}"
    assert actual.keys() == expected.keys()
    wrong = [name for name, value in expected.items() if not _is_same(actual[name], value, tolerance)]
    assert not wrong, f"{len(wrong)} of {len(expected)} differ, such as {wrong[:3]}"


def _is_same(actual, expected, tolerance):
    if actual is None or expected is None:
        return actual is expected
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    if not expected.is_floating_point():
        return torch.equal(actual, expected)
    if tolerance is not None:
        return bool((actual - expected).norm() <= tolerance * expected.norm() + 1e-30)
    return torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.nan_to_num(0), expected.nan_to_num(0))


def _word(argument):
    if isinstance(argument, dict):
        return ",".join(f"{name}={_word(value)}" for name, value in argument.items()) or "default"
    return getattr(argument, "__name__", str(argument).removeprefix("torch."))


def step_after(model, edit):
    """A training step with an edit between forward and backward."""
    y = model(inputs())
    edit(y)
    loss = y.square().mean()
    loss.backward()
    return collect(model, loss)


def edit_data(tensors):
    for tensor in tensors:
        tensor.data.mul_(-1.5)


def edit_in_no_grad(tensors):
    with torch.no_grad():
        for tensor in tensors:
            tensor.mul_(-1.5)


def edit_detached(tensors):
    for tensor in tensors:
        tensor.detach().mul_(-1.5)


EDITS = [edit_data, edit_in_no_grad, edit_detached]


def act_of_norm(model, make):
    for stage, block in ((model.body.layer1, 0), (model.body.layer3, 1), (model.body.layer3, 3)):
        stage[block].conv1.bn.act = make()
    return model


def act_of_block(model, make):
    model.body.layer2[1].act = make()
    model.body.layer3[2].act = make()
    model.body.layer3[3].act = make()
    return model


def module_in_stage(model, make):
    model.body.layer1.append(make())
    model.body.layer3.insert(2, make())
    model.body.append(make())
    return model


def shortcut(model, make):
    model.body.layer3[2].downsample = make()
    model.body.layer3[4].drop_path = make()
    return model


PLACES = [act_of_norm, act_of_block, module_in_stage, shortcut]  # for a module of a user


def everywhere(makers):
    """Each way to make a module, in the first position, then in the rest."""
    return [(put, make) for put in PLACES for make in makers]


def freeze_nothing(model):
    pass


def freeze_all_but_head(model):
    model.body.requires_grad_(False)


def freeze_all_but_last_stage(model):
    model.body[:-1].requires_grad_(False)


def freeze_convs(model):
    for unit in units(model):
        unit.conv.requires_grad_(False)


def freeze_norms(model):
    for unit in units(model):
        unit.bn.requires_grad_(False)


def freeze_all_but_stem(model):
    model.requires_grad_(False)
    model.body.conv1.requires_grad_(True)


def freeze_all_but_one_bias(model):
    model.requires_grad_(False)
    model.body.layer3[2].conv1.bn.bias.requires_grad_(True)


def freeze_eval_norms(model):
    for unit in units(model):
        unit.bn.eval().requires_grad_(False)


def freeze_weights_of_norms(model):
    for unit in units(model):
        unit.bn.weight.requires_grad_(False)


def freeze_by_timm(model):
    from timm.utils import freeze

    freeze(model, ["body.conv1", "body.layer1", "body.layer2"])


def freeze_gates(model):
    for module in model.modules():
        if type(module).__name__ == "SqueezeExcite":
            module.requires_grad_(False)


def freeze_everything(model):
    model.requires_grad_(False)


FREEZES = [
    freeze_all_but_head,
    freeze_all_but_last_stage,
    freeze_convs,
    freeze_norms,
    freeze_all_but_stem,
    freeze_all_but_one_bias,
    freeze_eval_norms,
    freeze_weights_of_norms,
    freeze_by_timm,
    freeze_gates,
    freeze_everything,
]

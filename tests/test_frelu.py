"""FReLU: the layer beside a loop over neighbours, and networks with it beside plain PyTorch."""

import copy

import pytest
import reference
import timm
import torch
from comparing import compare, each_setting, images, make_model, saved_bytes, train_step
from packaging.version import Version
from torch import nn
from users import MODIFIED, another, inputs, same_as_plain

from timm_tresnet import TResNet, fold_batch_norms
from timm_tresnet.models.layers import ConvNormAct, FReLU
from timm_tresnet.models.layers.activated_batch_norm import Norm
from timm_tresnet.models.layers.readers import Convolution
from timm_tresnet.recompute.program import read_program
from timm_tresnet.recompute.run import Call

SMALL = {"act_layer": "frelu", "layers": (1, 1, 2, 1), "num_classes": 10, "width_factor": 0.25}
FRELU = {"act_layer": "frelu", "block": "bottleneck"}
CASES = [
    {},
    {"block": ("basic", "basic", "bottleneck", "bottleneck"), "drop_path_rate": 0.2},
    {"stem": "conv7x7", "output_stride": 8, "aa_layer": False},
    {"norm_layer": "groupnorm1"},
    {"norm_layer": "frozenbatchnorm2d"},
]


def make_layer(channels=3, dtype=torch.float64):
    return reference.randomise(FReLU(channels, dtype=dtype))


def test_each_pixel_is_the_larger_of_itself_and_its_neighbours_weighted_and_normalised():
    layer = make_layer()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    conv, norm = layer.funnel.conv, layer.funnel.bn
    looked = reference.depthwise(x, conv.weight)
    mean, var = looked.mean((0, 2, 3)), looked.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(layer(x), reference.frelu(x, conv.weight, norm.weight, norm.bias, mean, var))
    layer.eval()
    expected = reference.frelu(x, conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    torch.testing.assert_close(layer(x), expected)
    assert not torch.equal(expected, x)
    assert repr(layer).startswith("FReLU(\n  (funnel): ConvNormAct(")
    assert list(layer.state_dict())[:2] == ["funnel.conv.weight", "funnel.bn.weight"]


def test_gradients_are_those_of_the_formula():
    layer = make_layer(2)
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(copy.deepcopy(layer), dict(zip(parameters, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))


def test_network_has_it_behind_norms_and_sums_but_not_before_sums():
    model = TResNet(**SMALL)
    for block in [block for index in range(2, 6) for block in model.body[index]]:
        assert type(block.act) is FReLU
        assert type(block.conv1.act) is FReLU
        last = block.conv3 if hasattr(block, "conv3") else block.conv2
        assert last.act is None
        assert block.downsample is None or block.downsample[-1].act is None
    assert type(model.body.conv1.act) is FReLU
    assert not any(isinstance(module, nn.LeakyReLU) for module in model.modules())
    assert type(TResNet(**{**SMALL, "act_layer": FReLU}).body.conv1.act) is FReLU


def test_other_activations_have_the_names_that_they_had():
    names = TResNet(**{**SMALL, "act_layer": "leaky_relu"}).state_dict()
    assert not any("act" in name for name in names)


def test_block_is_read_into_operations_without_calls():
    model = TResNet(**{**SMALL, **FRELU}).train()
    for module in (model.body.conv1, *(block for index in range(2, 6) for block in model.body[index])):
        program = read_program(module)
        operations = [*program.operations, *(program.shortcut or []), *(program.behind or [])]
        assert Call not in [type(operation) for operation in operations]
        inner = [
            [type(each) for each in operation.operations]
            for operation in operations
            if hasattr(operation, "operations")
        ]
        assert inner
        assert all(kinds == [Convolution, Norm] for kinds in inner)
        assert program.is_repeatable()
        assert not program.exposes_input()


@pytest.mark.parametrize("kwargs", CASES, ids=["bottlenecks", "basic", "dilated", "groupnorm", "frozen"])
@each_setting
def test_a_step_is_that_of_plain_pytorch_to_the_last_bit(setting, kwargs):
    steps = []
    for each in (setting, "none"):
        torch.manual_seed(2)
        model = make_model(each, **{**FRELU, "layers": (1, 1, 5, 1), **kwargs})
        steps.append(train_step(model, images(2, 48)))
    for name, value in steps[1].items():
        assert torch.equal(steps[0][name], value), name


@pytest.mark.parametrize("batch", [1, 3])
@each_setting
def test_half_precision_channels_last_and_an_oblong_image_are_the_same_to_the_last_bit(setting, batch):
    x = torch.randn(batch, 3, 48, 80).contiguous(memory_format=torch.channels_last)
    steps = []
    for each in (setting, "none"):
        model = make_model(each, **FRELU, layers=(1, 1, 2, 1)).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().square().mean().backward()
        steps.append([y, *(parameter.grad for parameter in model.parameters()), *model.buffers()])
    assert all(torch.equal(actual, expected) for actual, expected in zip(*steps, strict=True))


@each_setting
def test_double_backward_is_that_of_plain_pytorch(setting):
    def run(model):
        x = images(2, 48, dtype=torch.float64).requires_grad_()
        (grad,) = torch.autograd.grad(model.double()(x).square().mean(), x, create_graph=True)
        grad.square().sum().backward()
        return {"x": x.grad, **{f"grad of {name}": p.grad for name, p in model.named_parameters()}}

    compare(run, setting, **FRELU, layers=(1, 1, 1, 1))


def test_network_keeps_less_than_half_of_what_plain_pytorch_keeps():
    with torch.device("meta"):
        model = timm.create_model("tresnet_d", layers=(2, 2, 6, 2), width_factor=0.25)
    x = torch.empty(1, 3, 128, 128, device="meta")
    kept = {}
    for setting in ("none", "activations", "expansions"):
        model.set_recompute(setting)
        kept[setting] = saved_bytes(model, x)
    model.set_grad_checkpointing()
    kept["checkpointing"] = saved_bytes(model, x)
    assert kept["activations"] <= 0.47 * kept["none"]
    assert kept["expansions"] <= 0.41 * kept["none"]
    assert kept["checkpointing"] <= 0.12 * kept["none"]


def targets(model):
    block = model.body.layer3[1]
    return {
        "funnel": block.conv1.act.funnel,
        "conv": block.conv1.act.funnel.conv,
        "norm": block.conv1.act.funnel.bn,
        "act": block.conv1.act,
        "last act": block.act,
        "last conv": block.act.funnel.conv,
        "stem": model.body.conv1.act.funnel.conv,
        "next": block.conv2,
    }


def edit_input_data(m, a, y):
    a[0].data.mul_(-1.5)


def edit_input(m, a, y):
    with torch.no_grad():
        a[0].mul_(-1.5)


def edit_output_data(m, a, y):
    y.data.mul_(-1.5)


def double_output(m, a, y):
    return y * 2


TARGETS = ("conv", "last conv", "funnel", "act", "last act", "norm", "stem", "next")
HOOKS = (edit_input_data, edit_input, edit_output_data, double_output)


@same_as_plain(
    *((hook, target) for target in TARGETS for hook in HOOKS),
    few=4,
    in_turn=True,
    raises=MODIFIED,
    when=lambda hook, target: hook is edit_input,
)
def test_hooks_in_and_around_it(hook, target, model):
    model = another(model, **FRELU)
    targets(model)[target].register_forward_hook(hook)
    return train_step(model, inputs())


class Flipped(FReLU):
    def forward(self, x):
        return -super().forward(-x)


def replace_class(model):
    for module in model.modules():
        if type(module) is FReLU:
            module.__class__ = Flipped


def freeze_funnels(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("funnel" not in name)


def freeze_all_but_funnels(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("funnel.conv" in name)


def evaluate(model):
    model.eval()


def prune_funnels(model):
    for module in model.modules():
        if type(module) is FReLU:
            nn.utils.prune.random_unstructured(module.funnel.conv, "weight", 0.3)


def drop_some(model):
    model.body.layer2[0].act = nn.ReLU(inplace=True)
    model.body.layer3[0].conv1.act = None
    model.body.layer3[1].conv1.act = nn.Identity()


def make_inputs_need_none(model):
    model.body.conv1.requires_grad_(False)


CHANGES = (
    replace_class,
    freeze_funnels,
    freeze_all_but_funnels,
    evaluate,
    prune_funnels,
    drop_some,
    make_inputs_need_none,
)


@same_as_plain(*CHANGES, few=3)
def test_networks_that_users_changed(change, model):
    model = another(model, **FRELU)
    change(model)
    return train_step(model, inputs())


@pytest.mark.parametrize("variant", ["tresnet_d", "tresnet_m"])
def test_folded_network_has_the_same_logits_and_no_batch_norm(variant):
    model = timm.create_model(variant, layers=(1, 1, 1, 1), width_factor=0.25, num_classes=10, act_layer="frelu")
    model = reference.randomise(model).eval()
    folded = fold_batch_norms(model)
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        assert reference.relative_error(folded(x), model(x)) <= 1e-5
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    if Version(timm.__version__) >= Version("1.0.31"):
        assert "body.conv1.act.funnel.conv.bias" in folded.state_dict()


@pytest.mark.parametrize(
    "convert", [timm.layers.convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm], ids=["timm", "torch"]
)
def test_all_its_norms_are_synchronised_and_frozen_by_timm(convert):
    model = convert(TResNet(**SMALL))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == sum(isinstance(module, ConvNormAct) for module in model.modules())
    assert all(norm.synchronized for norm in norms)
    frozen = timm.layers.freeze_batch_norm_2d(TResNet(**SMALL))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch announces the end of TorchScript
def test_scripted_network_has_the_same_logits():
    model = reference.randomise(TResNet(**SMALL)).eval()
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))

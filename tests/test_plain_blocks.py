import pytest
import timm
import torch
from comparing import SMALL, images, make_model, saved_bytes, train_step
from packaging.version import Version
from torch import nn
from torch.nn.utils import parametrizations

from timm_tresnet.models.blocks import Bottleneck
from timm_tresnet.models.layers import ActivatedBatchNorm2d
from timm_tresnet.recompute import plain_blocks, rebuild, stages


def make_block(stride=2, **kwargs):
    """A block with everything that one can have."""
    return Bottleneck(8, 4, stride, act_layer=nn.LeakyReLU, **kwargs).train()


def all_blocks(model):
    return [block for stage in model.body if isinstance(stage, stages.Stage) for block in stage]


@pytest.mark.parametrize("name", ["tresnet_m", "tresnet_v2_l"])
def test_every_block_of_the_papers_networks_qualifies(name):
    model = timm.create_model(name, width_factor=0.125).train()
    blocks = all_blocks(model)
    assert len(plain_blocks.read_blocks(blocks)) == len(blocks)


def test_blocks_are_read_up_to_one_with_something_unusual_in_it():
    blocks = [make_block(1) for _ in range(4)]
    blocks[2].register_forward_hook(lambda *_: None)
    assert len(plain_blocks.read_blocks(blocks)) == 2
    assert len(plain_blocks.read_blocks(blocks[3:])) == 1


def test_blocks_behind_one_with_something_unusual_in_it_run_straight_again(monkeypatch):
    ran = []
    run_block = stages.run_block
    monkeypatch.setattr(stages, "run_block", lambda *args: ran.append(args) or run_block(*args))
    model = make_model("activations", layers=(1, 1, 4, 1))
    model.body.layer3[1].register_forward_hook(lambda *_: None)
    model(images())
    assert len(ran) == 1 + 1 + 3 + 1


@pytest.mark.parametrize("setting", ["activations", "expansions", "checkpointing"])
@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda block: setattr(block.conv2.bn.act, "negative_slope", 0.5), id="slope"),
        pytest.param(lambda block: setattr(block.conv1.bn, "momentum", 0.7), id="momentum"),
        pytest.param(lambda block: block.conv2.bn.eval(), id="eval_mode"),
        pytest.param(lambda block: setattr(block, "drop_path", nn.Hardtanh()), id="replaced_part"),
        pytest.param(lambda block: block.conv1.register_forward_hook(lambda *args: args[-1] * 2), id="hook"),
        pytest.param(lambda block: block.conv3.conv.requires_grad_(False), id="frozen"),
    ],
)
def test_block_that_a_hook_of_one_before_edits_runs_as_edited(edit, setting):
    def run(setting):
        model = make_model(setting, layers=(1, 1, 4, 1))
        stage = model.body.layer3

        def hook(*_):
            edit(stage[2])

        stage[1].act.register_forward_hook(hook)
        return train_step(model, images())

    edited, expected = run(setting), run("none")
    assert edited.keys() == expected.keys()
    assert all(edited[name] is value is None or torch.equal(edited[name], value) for name, value in expected.items())


@pytest.mark.parametrize("setting", ["activations", "expansions", "checkpointing"])
@pytest.mark.parametrize("kwargs", [{}, {"v2": True}, {"aa_layer": False, "use_se": False}], ids=["m", "v2", "bare"])
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16], ids=str)
def test_straight_line_computes_and_keeps_what_the_modules_do(amp, setting, kwargs, monkeypatch):
    if amp is torch.float16 and setting == "checkpointing" and Version(torch.__version__) < Version("2.11"):
        pytest.skip("PyTorch 2.5 pads float16 on a CPU under autocast alone, which is off in backward")
    ran = []
    run_block = stages.run_block
    monkeypatch.setattr(stages, "run_block", lambda *args: ran.append(args) or run_block(*args))

    def run():
        with torch.autocast("cpu", dtype=amp or torch.bfloat16, enabled=amp is not None):
            step = train_step(make_model(setting, **kwargs), images())
            return step, saved_bytes(make_model(setting, **kwargs), images())

    straight, kept = run()
    assert len(ran) == 2 * sum(SMALL["layers"])  # in two forwards
    monkeypatch.setattr(stages, "read_blocks", lambda blocks: [])
    modules, kept_by_modules = run()
    assert all(torch.equal(straight[name], modules[name]) for name in modules)
    assert kept == kept_by_modules


def set_attribute(name, value):
    def edit(block, patch):
        *path, last = name.split(".")
        module = block.get_submodule(".".join(path))
        patch.setitem(module.__dict__, last, value)

    return edit


def replace(name, module):
    return lambda block, patch: block.set_submodule(name, module)


def freeze(name):
    return lambda block, patch: block.get_parameter(name).requires_grad_(False)


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda block, patch: block.conv1.register_forward_hook(lambda *_: None), id="forward_hook"),
        pytest.param(lambda block, patch: block.se.register_forward_pre_hook(lambda *_: None), id="pre_hook"),
        pytest.param(lambda block, patch: block.act.register_full_backward_hook(lambda *_: None), id="backward_hook"),
        pytest.param(lambda block, patch: block.conv2.bn.compile(), id="compiled"),
        pytest.param(lambda block, patch: parametrizations.weight_norm(block.conv1.conv), id="parametrization"),
        pytest.param(lambda block, patch: block.conv1.bn.eval(), id="norm_in_eval_mode"),
        pytest.param(lambda block, patch: block.conv1.bn.synchronize(), id="synchronised"),
        pytest.param(lambda block, patch: block.conv2.aa.kernel.requires_grad_(), id="trained_blur"),
        pytest.param(lambda block, patch: delattr(block, "se"), id="part_gone"),
        pytest.param(set_attribute("conv1.conv.forward", lambda x: x), id="forward_of_a_convolution"),
        pytest.param(set_attribute("conv1.conv._conv_forward", lambda *_: None), id="conv_forward"),
        pytest.param(set_attribute("conv3.bn._call_impl", lambda *_: None), id="call_of_a_norm"),
        pytest.param(set_attribute("conv1.conv.padding_mode", "reflect"), id="padding_mode"),
        pytest.param(set_attribute("conv1.conv.weight", torch.ones(4, 8, 1, 1)), id="tensor_instead_of_a_parameter"),
        pytest.param(set_attribute("conv1.conv.groups", torch.tensor(1)), id="groups_that_can_be_edited"),
        pytest.param(set_attribute("conv2.aa.stride", [2, 2]), id="stride_of_the_blur_that_can_be_edited"),
        pytest.param(set_attribute("conv1.bn.eps", torch.tensor(1e-5)), id="eps_that_can_be_edited"),
        pytest.param(set_attribute("conv1.bn.eps", 0.0), id="eps_of_zero"),
        pytest.param(lambda block, patch: setattr(block.conv1.bn, "running_mean", torch.zeros(4, 2)[:, 0]), id="gaps"),
        pytest.param(set_attribute("se.fc1.padding_mode", "reflect"), id="padding_mode_of_the_gate"),
        pytest.param(set_attribute("conv2.conv.stride", [1, 1]), id="stride_that_can_be_edited"),
        pytest.param(replace("downsample", nn.Sequential()), id="empty_shortcut"),
        pytest.param(replace("downsample.0", nn.Identity()), id="no_pool"),
        pytest.param(replace("downsample.1", nn.Identity()), id="no_unit_in_the_shortcut"),
        pytest.param(set_attribute("downsample.1.bn.training", False), id="norm_of_the_shortcut_in_eval_mode"),
        pytest.param(set_attribute("conv1.bn.momentum", None), id="cumulative_average"),
        pytest.param(set_attribute("conv1.bn.track_running_stats", False), id="no_statistics"),
        pytest.param(set_attribute("conv1.bn.act.inplace", False), id="activation_not_in_place"),
        pytest.param(set_attribute("conv1.bn.act.negative_slope", torch.tensor(0.1)), id="slope_that_can_be_edited"),
        pytest.param(set_attribute("act.inplace", False), id="relu_not_in_place"),
        pytest.param(set_attribute("se.act.inplace", False), id="relu_of_the_gate_not_in_place"),
        pytest.param(replace("conv1.bn.act", nn.SiLU()), id="other_activation"),
        pytest.param(replace("conv1.bn.act", nn.ReLU(inplace=True)), id="relu_in_a_unit"),
        pytest.param(replace("conv1.bn.drop", nn.Dropout(0.5)), id="dropout"),
        pytest.param(replace("conv1.bn", nn.BatchNorm2d(4)), id="other_norm"),
        pytest.param(replace("conv1.bn", ActivatedBatchNorm2d(4, affine=False)), id="norm_without_weight"),
        pytest.param(replace("conv1.conv", nn.Conv2d(8, 4, 1)), id="bias"),
        pytest.param(replace("conv1", nn.Identity()), id="no_unit"),
        pytest.param(replace("conv3", nn.Identity()), id="no_expansion"),
        pytest.param(replace("se", nn.Sequential()), id="no_excitation"),
        pytest.param(replace("se.gate", nn.Identity()), id="no_gate"),
        pytest.param(replace("drop_path", nn.Sequential()), id="other_drop_path"),
        pytest.param(freeze("conv1.conv.weight"), id="frozen_convolution"),
        pytest.param(freeze("conv2.bn.bias"), id="frozen_bias"),
    ],
)
def test_block_with_something_unusual_in_it_does_not_qualify(edit, monkeypatch):
    block = make_block()
    assert plain_blocks.read_blocks([block])
    edit(block, monkeypatch)
    assert not plain_blocks.read_blocks([block])


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (nn.Conv2d, "forward"),
        (nn.Conv2d, "_conv_forward"),
        (nn.Conv2d, "__call__"),
        (nn.LeakyReLU, "forward"),
        (nn.Module, "__call__"),
        (nn.Module, "__getattr__"),
        (nn.Module, "_call_impl"),
        (Bottleneck, "forward"),
        (nn.functional, "conv2d"),
        (torch, "relu_"),
        (torch.Tensor, "__add__"),
    ],
    ids=str,
)
def test_patched_code_is_noticed(owner, name, monkeypatch):
    assert not plain_blocks.is_patched()
    original = getattr(owner, name)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *args, **kwargs: original(*args, **kwargs), raising=False)
        assert plain_blocks.is_patched()


def test_block_of_a_subclass_or_with_drop_path_does_not_qualify():
    class Mine(Bottleneck):
        pass

    assert not plain_blocks.read_blocks([Mine(8, 4, act_layer=nn.LeakyReLU).train()])
    assert not plain_blocks.read_blocks([make_block(drop_path_rate=0.1)])


def test_plain_tensors_can_be_taken():
    assert plain_blocks.can_take(torch.randn(2, 8, 4, 4))
    assert not plain_blocks.can_take(torch.randn(0, 8, 4, 4))
    assert not plain_blocks.can_take(torch.randn(8, 4, 4))
    assert not plain_blocks.can_take(nn.Parameter(torch.randn(2, 8, 4, 4)))
    with torch.no_grad():
        assert not plain_blocks.can_take(torch.randn(2, 8, 4, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_tensors_of_its_dtype_can_be_taken(dtype):
    x = torch.randn(2, 8, 4, 4)
    with torch.autocast("cpu", dtype=dtype):
        assert plain_blocks.can_take(x.to(dtype))
        assert not plain_blocks.can_take(x)
        assert not plain_blocks.can_take(x.double())
        with torch.autocast("cpu", enabled=False):
            assert plain_blocks.can_take(x)


def test_under_autocast_of_another_device_no_tensor_can_be_taken():
    torch.set_autocast_enabled("cuda", True)
    try:
        assert not plain_blocks.can_take(torch.randn(2, 8, 4, 4))
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_single_value_per_channel_is_refused_as_by_modules():
    model = make_model("activations")
    with pytest.raises(ValueError, match="more than one value per channel"), rebuild.recording("activations"):
        model.body.layer3(torch.randn(1, 32, 2, 2, requires_grad=True) * 1)


@pytest.mark.parametrize(
    ("patch", "patched"),
    [
        ("pass", False),
        ("torch.nn.functional.leaky_relu = lambda x, *args: x", True),
        ("torch.nn.Conv2d = type('QuantConv2d', (torch.nn.Conv2d,), {'forward': lambda self, x: x})", True),
    ],
    ids=["none", "function", "class"],
)
def test_code_that_was_patched_before_this_package_came_is_noticed(patch, patched, run_python):
    code = f"import torch; {patch}; import timm_tresnet.recompute.plain_blocks as ours; print(ours.is_patched())"
    assert run_python("-c", code).stdout.strip() == str(patched)

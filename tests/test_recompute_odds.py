"""Networks put together and changed as users do: variants, frozen parts, shared weights."""

import contextlib

import torch
from comparing import collect, make_model, train_step
from timm.layers import DropPath, LayerScale2d
from torch import nn
from torch.nn.utils import prune
from users import (
    FREEZES,
    MODIFIED,
    Steeper,
    another,
    edit_data,
    edit_in_no_grad,
    freeze_everything,
    inputs,
    same_as_plain,
    step_after,
    units,
)

from timm_tresnet.recompute.stage import Stage


@same_as_plain(
    {"v2": True},
    {"drop_path_rate": 0.4},
    {"output_stride": 8},
    {"output_stride": 16},
    {"stem": "conv7x7"},
    {"aa_layer": False},
    {"drop_rate": 0.3},
    {"norm_layer": "groupnorm1"},
    {"use_se": False},
    {"block": "bottleneck"},
    {"block": "basic"},
    {"head_features": 8},
    {"global_pool": "catavgmax"},
    {"act_layer": "prelu"},
)
def test_variant_trained_for_two_steps(kwargs, model):
    model = another(model, **kwargs)
    train_step(model, inputs())
    return train_step(model, inputs().flip(3))


@same_as_plain(
    *FREEZES, few=len(FREEZES), raises="does not require grad", when=lambda freeze: freeze is freeze_everything
)
def test_frozen(freeze, model):
    freeze(model)
    return train_step(model, inputs())


@same_as_plain()
def test_mixed_training_and_eval(model):
    for i, m in enumerate(model.body):
        m.train(i % 2 == 0)
    model.body.layer3[2].train()
    return train_step(model, inputs())


@same_as_plain()
def test_networks_inside_hooks(model):
    other = another(model, seed=5)
    seen = []

    def hook(m, a, y):
        z = other.body(inputs())
        seen.append(z)
        z.data.mul_(-1)
        return y + z.mean() + 0 * y

    model.body.layer2.register_forward_hook(hook)
    result = train_step(model, inputs())
    return {**result, **{f"other {k}": v for k, v in collect(other, result["loss"]).items()}}


@same_as_plain(edit_data, edit_in_no_grad, raises=MODIFIED, when=lambda edit: edit is edit_in_no_grad)
def test_features_of_a_network_inside_a_hook(edit, model):
    other = another(model, seed=5)
    seen = []

    def hook(m, a, y):
        z, features = other.forward_intermediates(inputs())
        seen.extend(features)
        return y + z.mean()

    model.body.layer2.register_forward_hook(hook)
    y = model(inputs())
    loss = y.square().mean()
    edit(seen[2:3])
    loss.backward()
    return {**collect(model, loss), **{f"other {k}": v for k, v in collect(other, loss).items()}}


@same_as_plain("recompute_none", "eval", "no_grad")
def test_teacher_inside_a_hook(kind, model):
    other = make_model("none", seed=5)
    if kind == "eval":
        other.eval()
    seen = []

    def hook(m, a, y):
        with torch.no_grad() if kind == "no_grad" else contextlib.nullcontext():
            z = other.body(inputs())
        seen.append(z)
        return y + z.mean()

    model.body.layer2.register_forward_hook(hook)
    y = model(inputs())
    loss = y.square().mean()
    seen[0].data.mul_(-1)
    loss.backward()
    return {**collect(model, loss), **{f"other {k}": v for k, v in collect(other, loss).items()}}


@same_as_plain("before", "after")
def test_layer_scale(when, model):
    model.body.layer3[2].se = LayerScale2d(model.body.layer3[2].conv3.conv.in_channels, init_values=0.5)
    model.body.layer3[3].se = LayerScale2d(model.body.layer3[3].conv3.conv.in_channels, init_values=-0.5)
    if when == "before":
        return train_step(model, inputs())
    return step_after(model, lambda y: model.body.layer3[2].se.gamma.data.mul_(-3))


@same_as_plain("eca", "cbam", "se", "ecam")
def test_attention_of_timm(name, model):
    from timm.layers import create_attn

    for i in (1, 3):
        channels = model.body.layer3[i].conv3.conv.in_channels
        model.body.layer3[i].se = create_attn(name, channels)
    return train_step(model, inputs())


@same_as_plain()
def test_drop_block(model):
    from timm.layers import DropBlock2d

    for i in (1, 3):
        model.body.layer3[i].conv1.bn.drop = DropBlock2d(0.1, 3, inplace=True, fast=i == 1)
    return train_step(model, inputs())


@same_as_plain("weight_norm", "spectral_norm", "old_weight_norm", "prune", "custom")
def test_parametrized(kind, model):
    class Doubled(nn.Module):
        def forward(self, w):
            return w * 2

    for i in (1, 3):
        conv = model.body.layer3[i].conv3.conv
        if kind == "weight_norm":
            nn.utils.parametrizations.weight_norm(conv)
        elif kind == "spectral_norm":
            nn.utils.parametrizations.spectral_norm(conv)
        elif kind == "old_weight_norm":
            nn.utils.weight_norm(conv)
        elif kind == "prune":
            prune.l1_unstructured(conv, "weight", 0.3)
        else:
            nn.utils.parametrize.register_parametrization(conv, "weight", Doubled())
            nn.utils.parametrize.register_parametrization(model.body.layer3[i].conv1.bn, "weight", Doubled())
    return train_step(model, inputs())


@same_as_plain()
def test_bias_in_convolutions(model):
    for u in units(model.body.layer3):
        u.conv.bias = nn.Parameter(torch.randn(u.conv.out_channels))
    return train_step(model, inputs())


@same_as_plain()
def test_grouped_convolutions(model):
    for b in model.body.layer3:
        old = b.conv2.conv
        b.conv2.conv = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, groups=4, bias=False)
        b.conv3.conv = nn.Conv2d(b.conv3.conv.in_channels, b.conv3.conv.out_channels, 1, padding="same", bias=False)
    return train_step(model, inputs())


@same_as_plain()
def test_weights_shared_between_blocks(model):
    model.body.layer3[3] = model.body.layer3[2]
    return train_step(model, inputs())


@same_as_plain()
def test_weights_shared_between_convolutions(model):
    model.body.layer3[3].conv3.conv.weight = model.body.layer3[2].conv3.conv.weight
    return train_step(model, inputs())


@same_as_plain()
def test_dropped_blocks(model):
    model.body.layer3[2].drop_path = DropPath(1.0)
    model.body.layer3[3].drop_path = DropPath(0.5)
    return train_step(model, inputs(4))


@same_as_plain()
def test_block_called_twice(model):
    class Twice(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return self.block(self.block(x))

    model.body.layer3[2] = Twice(model.body.layer3[2])
    return train_step(model, inputs())


class Drawing(Stage):
    """Leaves blocks out at random (LayerDrop), and edits them between one another."""

    def __iter__(self):
        for position, block in enumerate(self._modules.values()):
            if position == 0 or torch.rand(()) > 0.5:
                yield block
                for each in self._modules.values():
                    each.conv1.bn.momentum *= 0.9


@same_as_plain()
def test_stage_that_goes_through_its_blocks_in_its_own_way(model):
    model.body.layer3.__class__ = Drawing
    return train_step(model, inputs())


class Opening(Stage):
    def __iter__(self):
        first, *others = self._modules.values()
        yield first
        with Steeper():
            yield from others


@same_as_plain()
def test_stage_that_opens_a_mode_between_its_blocks(model):
    model.body.layer3.__class__ = Opening
    return train_step(model, inputs())


@same_as_plain("mapping", "block")
def test_blocks_replaced_while_the_stage_runs(what, model):
    stage, other = model.body.layer3, another(model, seed=5).body.layer3

    def hook(*_):
        if what == "mapping":
            stage._modules = {**stage._modules, "2": other[2]}
        else:
            stage._modules["2"] = other[2]

    stage[1].register_forward_hook(hook)
    return train_step(model, inputs())

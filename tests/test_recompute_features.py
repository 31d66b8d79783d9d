"""Feature maps that user code extracts and edits, and modules that edit tensors which autograd has not saved."""

import copy

import torch
from comparing import collect, train_step
from timm.layers import DropPath
from torch import nn
from users import EDITS, MODIFIED, build, edit_data, inputs, same_as_plain

from timm_tresnet.recompute.stage import Stage


class UserConv(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return self.conv(x)


@same_as_plain("user", "torch")
def test_conv_then_inplace_relu_in_stage(kind, model):
    make = UserConv if kind == "user" else lambda c: nn.Conv2d(c, c, 1)
    model.body.layer1.insert(1, make(16))
    model.body.layer1.insert(2, nn.ReLU(inplace=True))
    return train_step(model, inputs())


class ClampNoGrad(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            x.clamp_(max=0.5)
        return x


@same_as_plain("user", "torch")
def test_conv_then_clamp_in_stage(kind, model):
    make = UserConv if kind == "user" else lambda c: nn.Conv2d(c, c, 1)
    model.body.layer1.insert(1, make(16))
    model.body.layer1.insert(2, ClampNoGrad())
    return train_step(model, inputs())


@same_as_plain(nn.ReLU, nn.SiLU, nn.LeakyReLU, nn.Sigmoid)
def test_preactivation_in_place(cls, model):
    model.body.layer3[1].register_forward_hook(lambda m, a, y: y + 0.1)
    block = model.body.layer3[2]
    act = cls() if cls is nn.Sigmoid else cls(inplace=True)
    if cls is nn.Sigmoid:
        act = nn.Dropout(0.1, inplace=True)
    block.conv1 = nn.Sequential(act, block.conv1)
    return train_step(model, inputs())


@same_as_plain(nn.ReLU, nn.SiLU, nn.LeakyReLU)
def test_preactivation_in_place_of_stage(cls, model):
    model.body.layer2.register_forward_hook(lambda m, a, y: y + 0.1)
    model.body.layer3.insert(0, cls(inplace=True))
    return train_step(model, inputs())


@same_as_plain(nn.Identity, DropPath, nn.Sequential, raises=MODIFIED)
def test_identity_at_the_end_and_features_edited(cls, model):
    model.body.append(cls())
    y = model.body(inputs())
    with torch.no_grad():
        y.mul_(-1)
    loss = y.square().mean()
    loss.backward()
    return collect(model, loss)


@same_as_plain(nn.Identity, DropPath, nn.Sequential)
def test_identity_in_stage_and_features_edited_through_data(cls, model):
    model.body.layer3.append(cls())
    model.body.layer4.append(cls())
    y = model.body(inputs())
    loss = y.square().mean()
    y.data.mul_(-1)
    loss.backward()
    return collect(model, loss)


@same_as_plain(
    *((edit, index) for index in (2, 3, 1, 4, 0) for edit in EDITS),
    raises=MODIFIED,
    when=lambda edit, index: edit is not edit_data,
)
def test_features_edited(edit, index, model):
    y, features = model.forward_intermediates(inputs())
    loss = y.square().mean()
    edit([features[index]])
    loss.backward()
    return collect(model, loss)


@same_as_plain(
    *((edit, index) for index in (2, 1, 3) for edit in EDITS[:2]),
    raises=MODIFIED,
    when=lambda edit, index: edit is not edit_data,
)
def test_features_edited_before_the_next_stage(edit, index, model):
    x = inputs()
    for position, module in enumerate(model.body):
        x = module(x)
        if position == index + 1:
            edit([x])
    loss = x.square().mean()
    loss.backward()
    return collect(model, loss)


@same_as_plain(*EDITS, raises=MODIFIED, when=lambda edit: edit is not edit_data)
def test_output_edited(edit, model):
    y = model.body(inputs())
    loss = y.square().mean()
    edit([y])
    loss.backward()
    return collect(model, loss)


@same_as_plain("mul", "relu", raises=MODIFIED)
def test_features_edited_by_autograd(kind, model):
    y, features = model.forward_intermediates(inputs())
    z = [f.mul_(2) if kind == "mul" else f.relu_() for f in features]
    loss = sum(f.square().mean() for f in z)
    loss.backward()
    return collect(model, loss)


@same_as_plain(*(f"{a}:{b}" for a, b in [(0, 4), (2, 6), (3, 5)]))
def test_slices_of_the_body(which, model):
    a, b = map(int, which.split(":"))
    part = model.body[a:b]
    x = inputs() if a == 0 else model.body[:a](inputs()).detach()
    loss = part(x).square().mean()
    loss.backward()
    return collect(model, loss)


def test_slices_keep_settings():
    model = build("checkpointing").eval()
    model.set_recompute("expansions")
    part = model.body[:4]
    assert part.recompute == "expansions"
    assert not part.training
    assert part[2].grad_checkpointing
    part = model.body.layer3[1:3]
    assert part.recompute == "expansions"
    assert not part.training
    assert part.grad_checkpointing


@same_as_plain("features_only", "deepcopied", settings=["activations", "expansions"])  # timm checkpoints stages itself
def test_through_timm(kind, model):
    import timm

    setting = model.recompute
    if kind == "features_only":
        net = timm.create_model("test_tresnet", features_only=True, recompute=setting)
        if model.body.layer1.grad_checkpointing:
            net.set_grad_checkpointing()
        torch.manual_seed(3)
        for p in net.parameters():
            p.data.normal_(std=0.1)
        net.train()
        features = net(inputs())
        loss = sum(f.square().mean() for f in features)
        features[2].data.mul_(-1.5)
        loss.backward()
        return collect(net, loss)
    return train_step(copy.deepcopy(model), inputs())


@same_as_plain()
def test_block_alone(model):
    x = inputs()
    for m in model.body:
        for part in m if isinstance(m, Stage) else [m]:
            x = part(x)
    loss = x.square().mean()
    loss.backward()
    return collect(model, loss)

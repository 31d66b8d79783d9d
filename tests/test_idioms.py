"""Common uses of timm's TResNet work on ours with the same results; the built-in is the reference.

Each idiom is a function of a network, run on timm's own and on ours with the same weights.
"""

import copy
import io
import pickle
from collections import Counter

import pytest
import timm
import timm.layers
import timm.models.tresnet
import timm.utils
import torch
import torch.nn.functional as F
from packaging.version import Version
from reference import randomise
from timm.layers.ml_decoder import add_ml_decoder_head
from timm.models._features import FeatureHookNet, FeatureListNet
from timm.models._manipulate import adapt_input_conv, checkpoint_seq
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from timm_tresnet import TResNet

# timm before 1.0.31 leaves these numbers as they were
CHANGED = ("num_features", "head_hidden_size") if Version(timm.__version__) >= Version("1.0.31") else ()
SMALL = {"layers": (1, 2, 2, 1), "width_factor": 0.25, "num_classes": 5}
VARIANTS = {"m": {}, "v2": {"v2": True}, "drop_path": {"drop_path_rate": 0.2, "drop_rate": 0.3}}


def make_pair(**kwargs):
    """timm's TResNet, then ours, with the same weights."""
    builtin = randomise(timm.models.tresnet.TResNet(**{**SMALL, **kwargs}))
    ours = TResNet(**{**SMALL, **kwargs})
    ours.load_state_dict(builtin.state_dict())
    return builtin.eval(), ours.eval()


def images(batch=2):
    return torch.rand(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def public(value):
    return {name for name in dir(value) if not name.startswith("_")}


# What ours has otherwise, and why.
OTHER_ATTRIBUTES = {("SEModule.gate", "inplace")}  # the gate is PyTorch's own Sigmoid
OTHER_CLASSES = {"TResNet", "BasicBlock", "Bottleneck", "SpaceToDepth", "Sigmoid"}
OTHER_VALUES = {
    ("TResNet", "feature_info"),  # timm's has no module for the stem and a wrong reduction
}
PLAIN = int | float | str | bool | tuple | list | dict | None


def walk(builtin, ours):
    """Pairs of modules of the same name."""
    modules = dict(ours.named_modules())
    return [(name, module, modules[name]) for name, module in builtin.named_modules()]


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS)
def test_modules_parameters_and_their_order_are_the_builtins(kwargs):
    builtin, ours = make_pair(**kwargs)
    assert {name for name, _ in builtin.named_modules()} == {name for name, _ in ours.named_modules()}
    assert [name for name, _ in builtin.named_parameters()] == [name for name, _ in ours.named_parameters()]
    assert [name for name, _ in builtin.named_children()] == [name for name, _ in ours.named_children()]
    assert [name for name, _ in builtin.body.named_children()] == [name for name, _ in ours.body.named_children()]
    assert builtin.state_dict().keys() == ours.state_dict().keys()


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS)
def test_every_public_attribute_of_the_builtin_is_there_with_its_value(kwargs):
    for name, module, own in walk(*make_pair(**kwargs)):
        kind = "SEModule.gate" if name.endswith("se.gate") else type(module).__name__
        missing = public(module) - public(own)
        assert {(kind, attribute) for attribute in missing} <= OTHER_ATTRIBUTES, name
        for attribute in public(module) & public(own):
            value = getattr(module, attribute)
            if isinstance(value, PLAIN) and (kind, attribute) not in OTHER_VALUES:
                assert getattr(own, attribute) == value, f"{name}.{attribute}"
            elif isinstance(value, torch.Tensor):
                assert torch.equal(getattr(own, attribute), value), f"{name}.{attribute}"


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS)
def test_layers_are_instances_of_the_builtins_classes(kwargs):
    for name, module, own in walk(*make_pair(**kwargs)):
        assert isinstance(own, type(module)) or type(module).__name__ in OTHER_CLASSES, name


class GeM(nn.Module):
    """Generalised mean, as people write it: no attribute of timm's poolings."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return F.avg_pool2d(x.clamp(min=1e-6).pow(self.p), x.shape[-2:]).pow(1 / self.p).flatten(1)


class OwnHead(nn.Module):
    def __init__(self, features, classes):
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.classifier = nn.Linear(features, classes)

    def forward(self, x):
        return self.classifier(self.norm(x.mean((2, 3))))


IDIOMS = []


def idiom(function):
    IDIOMS.append(pytest.param(function, id=function.__name__))
    return function


def step(model, x=None, seed=3):
    """Logits, then gradients and running statistics of a training step."""
    model.train()
    torch.manual_seed(seed)
    output = model(images() if x is None else x)
    (output[0] if isinstance(output, list) else output).square().mean().backward()
    return {
        "output": output,
        "gradients": {name: each.grad for name, each in model.named_parameters() if each.grad is not None},
        "buffers": {name: each for name, each in model.named_buffers() if "running" in name or "num_" in name},
    }


@idiom
def own_head(model):
    model.head = OwnHead(model.num_features, 3)
    return model(images()), model.forward_head(model.forward_features(images())), step(model)


@idiom
def identity_head(model):
    model.head = nn.Identity()
    return model(images()), step(model)


@idiom
def sequential_head(model):
    model.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(model.num_features, 4))
    return model(images()), step(model)


@idiom
def head_of_timm(model):
    model.head = timm.layers.NormMlpClassifierHead(model.num_features, 4, hidden_size=8)
    first = model(images())
    model.reset_classifier(0)
    return first, model(images()), model.num_classes


@idiom
def ml_decoder_head_of_timm(model):
    model = add_ml_decoder_head(model)
    layer = model.head.decoder.layers[0]
    layer.self_attn = layer.multihead_attn  # which PyTorch reads since 2.1, where it also hands over more arguments
    layer.forward = lambda tgt, memory, **kwargs: type(layer).forward(layer, tgt, memory)
    return model.eval()(images()), model.drop_rate, step(model)["gradients"]


@idiom
def deleted_head(model):
    del model.head
    model.head = nn.Flatten(1)
    return model(images())


@idiom
def classifier_of_a_user(model):
    model.head.fc = nn.Linear(model.num_features, 7)
    return model(images()), model.get_classifier().out_features, step(model)


@idiom
def pooling_of_a_user(model):
    model.head.global_pool = GeM()
    return model(images()), model.forward_head(model.forward_features(images()), pre_logits=True), step(model)


@idiom
def convolution_as_classifier(model):
    model.reset_classifier(0, "")
    model.head.fc = nn.Conv2d(model.num_features, 3, 1)
    return model(images()), step(model)


@idiom
def classifier_reset(model):
    results = []
    for arguments in [(7,), (0,), (0, ""), (4, "avg"), (3, "catavgmax"), (2, None), (2, "max")]:
        model.reset_classifier(*arguments)
        torch.manual_seed(4)
        with torch.no_grad():
            for parameter in model.get_classifier().parameters():
                nn.init.normal_(parameter, std=0.01)  # timm draws these as PyTorch does, ours as for a new network
        results += [model(images()), model.num_classes, *(getattr(model, name) for name in CHANGED)]
        results.append(model.forward_head(model.forward_features(images()), pre_logits=True))
    return results


@idiom
def no_squeeze_and_excitation(model):
    for module in model.modules():
        if getattr(module, "se", None) is not None:
            module.se = None
    return model(images()), step(model)


@idiom
def squeeze_and_excitation_of_another_kind(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, timm.layers.SqueezeExcite):
            parent = model.get_submodule(name.rpartition(".")[0])
            parent.se = timm.layers.EffectiveSEModule(module.fc1.in_channels)
    return model(images()), step(model)


@idiom
def norm_inside_squeeze_and_excitation(model):
    for module in model.modules():
        if isinstance(module, timm.layers.SqueezeExcite):
            module.bn = nn.GroupNorm(4, module.fc1.out_channels)
    return model(images()), step(model)


@idiom
def blur_by_stride(model):
    for module in model.modules():
        if isinstance(module, timm.layers.ConvNormAct) and module.aa is not None:
            module.conv.stride = (2, 2)
            module.aa = None
    return model(images()), step(model)


@idiom
def blur_of_another_kind(model):
    for module in model.modules():
        if isinstance(getattr(module, "aa", None), timm.layers.BlurPool2d):
            module.aa = timm.layers.BlurPool2d(module.aa.channels, filt_size=5, stride=module.aa.stride)
    return model(images()), step(model)


@idiom
def shortcuts_walked(model):
    found = []
    for stage in (model.body.layer1, model.body.layer2, model.body.layer3, model.body.layer4):
        for block in stage:
            found.append((block.stride, block.expansion, block.se is None, block.downsample is None))
            if block.downsample is not None:
                found.append(block.downsample[-1].conv.weight)
                block.downsample[-1].bn = nn.Identity()
    return found, model(images())


@idiom
def last_norm_of_a_block(model):
    norm = model.body.layer4[-1].conv3.bn
    norm.weight.data.fill_(0.5)
    assert isinstance(norm, nn.BatchNorm2d)
    return norm.weight, norm.running_var, model.body.layer4[-1].conv3.out_channels, model(images())


@idiom
def backbone_from_children(model):
    backbone = nn.Sequential(*list(model.children())[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    return backbone(images()), step(backbone)


@idiom
def flat_backbone_from_body(model):
    return nn.Sequential(*list(model.body.children())[:4])(images()), model.body[:3](images()), model.body[-1][0].stride


@idiom
def body_cut_short(model):
    model.body = nn.Sequential(*list(model.body)[:5])
    model.num_features = model.feature_info[3]["num_chs"]
    model.reset_classifier(0)
    return model(images()), step(model)


@idiom
def stage_sliced_and_replaced(model):
    model.body.layer3 = model.body.layer3[:1]
    model.body.layer2 = nn.Sequential(*list(model.body.layer2)[:1])
    del model.body.layer4
    model.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    return model(images()), step(model), len(model.body)


@idiom
def blocks_appended_and_exchanged(model):
    stage = model.body.layer3
    stage.append(copy.deepcopy(stage[1]))
    stage[0], stage[1] = nn.Sequential(stage[0], nn.Dropout2d(0.0)), nn.Identity()
    return model(images()), step(model)


@idiom
def stem_for_other_channels(model):
    weight = model.body.conv1.conv.weight
    model.body.conv1.conv = nn.Conv2d(4 * 16, weight.shape[0], 3, padding=1, bias=False)
    weights = adapt_input_conv(1, copy.deepcopy(weight.data[:, :3]))
    return model(torch.rand(1, 4, 64, 64, generator=torch.Generator().manual_seed(2))), weights


@idiom
def frozen_and_unfrozen(model):
    timm.utils.freeze(model, ["body.conv1", "body.layer1", "body.layer2.0.conv1.bn"])
    first = step(model)
    model.zero_grad()
    timm.utils.unfreeze(model)
    return first["gradients"], step(model)


@idiom
def norms_frozen_and_unfrozen(model):
    model = timm.layers.freeze_batch_norm_2d(model)
    first = step(model)
    model.zero_grad()
    return first, step(timm.layers.unfreeze_batch_norm_2d(model))


@idiom
def norms_in_eval_while_the_rest_trains(model):
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    loss = model(images()).square().mean()
    loss.backward()
    return loss, {name: each.grad for name, each in model.named_parameters()}, model.state_dict()


@idiom
def split_norms(model):
    model = timm.layers.convert_splitbn_model(model, 2)
    return step(model, images(4)), model.state_dict()


@idiom
def averaged_models(model):
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    for each in (average, ema):
        (each.update_parameters if each is average else each.update)(model)
    return average(images()), ema.module(images()), timm.utils.get_state_dict(ema, timm.utils.unwrap_model)


@idiom
def copies(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    return [each(images()) for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded)]


@idiom
def parameter_groups(model):
    decayed = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7)
    plain = param_groups_weight_decay(model, weight_decay=0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    skipped = model.no_weight_decay() if hasattr(model, "no_weight_decay") else None

    def show(groups):
        return [{**group, "params": [names[id(each)] for each in group["params"]]} for group in groups]

    return show(decayed), show(plain), skipped, model.group_matcher(), model.group_matcher(coarse=True)


@idiom
def statistics_of_activations(model):
    torch.manual_seed(2)
    hooks = [timm.utils.model.avg_sq_ch_mean, timm.utils.model.avg_ch_var]
    return timm.utils.model.extract_spp_stats(model, ["body.layer*.*.act", "body.layer?"], hooks, [2, 3, 64, 64])


@idiom
def features_by_hooks_and_lists(model):
    model.feature_info = model.feature_info[1:]  # the first one of timm's names no module
    hooked = FeatureHookNet(copy.deepcopy(model), out_indices=(0, 2), flatten_sequential=True)
    listed = FeatureListNet(copy.deepcopy(model), out_indices=(1, 3), flatten_sequential=True)
    return hooked(images()), listed(images()), step(listed)


@idiom
def intermediates(model):
    every = model.forward_intermediates(images(), intermediates_only=True)
    last, some = model.forward_intermediates(images(), indices=[1, 3], stop_early=True)
    return every, last, some


@idiom
def pruned(model):
    results = []
    for indices in (1, [2], [0, 3]):
        each = copy.deepcopy(model)
        taken = each.prune_intermediate_layers(indices)
        results += [taken, each(images()), len(each.body), *(getattr(each, name) for name in CHANGED)]
    return results


@idiom
def checkpointing_by_hand(model):
    model.train()
    x = checkpoint_seq(model.body[2:], model.body[:2](images()), flatten=True)
    model.forward_head(x).square().mean().backward()
    return {name: each.grad for name, each in model.named_parameters()}


@idiom
def checkpointing_by_attribute(model):
    model.grad_checkpointing = True
    gradients = step(model)["gradients"]
    on = model.grad_checkpointing
    model.set_grad_checkpointing(False)
    return gradients, on, model.grad_checkpointing


@idiom
def hooks(model):
    seen = []
    model.body.layer3[0].conv2.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    model.body.layer2.register_forward_pre_hook(lambda module, args: (args[0] * 0.9,))
    model.body.layer1[0].se.register_forward_hook(lambda module, args, output: output * 2)
    return model(images()), seen


@idiom
def patched_forward(model):
    block = model.body.layer3[1]
    forward = block.forward
    block.forward = lambda x: forward(x) * 0.5
    return model(images()), step(model)


@idiom
def converted_modules(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LeakyReLU):
            model.get_submodule(name.rpartition(".")[0]).act = nn.SiLU()
    model = timm.layers.convert_sync_batchnorm(model)
    return model.eval()(images()), Counter(type(module).__name__ for module in model.modules())["SiLU"]


@idiom
def changed_dropout(model):
    model.head.drop = nn.Dropout(0.5)
    model.drop_rate = 0.5
    for module in model.modules():
        if isinstance(module, timm.layers.DropPath):
            module.drop_prob = 0.4
    return step(model), model.drop_rate


@idiom
def precision_and_layout(model):
    model = model.double().to(memory_format=torch.channels_last)
    return model(images().double().to(memory_format=torch.channels_last)), next(model.parameters()).dtype


@pytest.mark.parametrize("kwargs", [
    VARIANTS["m"],
    *(pytest.param(kwargs, marks=pytest.mark.thorough) for name, kwargs in VARIANTS.items() if name != "m"),
], ids=VARIANTS)  # fmt: skip
@pytest.mark.parametrize("function", IDIOMS)
def test_idiom_gives_what_the_builtin_gives(function, kwargs):
    results = []
    for model in make_pair(**kwargs):
        torch.manual_seed(5)
        results.append(function(model))
    expected, actual = results
    assert_same(actual, expected, "result")


def assert_same(actual, expected, name):
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), name
        for key, value in expected.items():
            assert_same(actual[key], value, f"{name}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), name
        for index, values in enumerate(zip(actual, expected, strict=True)):
            assert_same(*values, f"{name}[{index}]")
    elif isinstance(expected, torch.Tensor | float):
        actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
        assert actual.shape == expected.shape, name
        assert (actual - expected).norm() <= 1e-5 * expected.norm() + 1e-7, name
    else:
        assert actual == expected, name


@pytest.mark.parametrize("head", ["linear", "bottleneck"])
def test_pooling_of_a_user_stays_when_the_classifier_is_reset(head):
    model = TResNet(**SMALL, head=head).eval()
    model.head.global_pool = GeM()
    model.reset_classifier(3)
    assert isinstance(model.head.global_pool, GeM)
    features = model.forward_features(images())
    pooled = model.head.global_pool(features)
    if head == "bottleneck":
        pooled = model.head.embedding(pooled)
    torch.testing.assert_close(model(images()), model.head.fc(pooled))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    model.reset_classifier(3, "avg")
    assert model.head.global_pool.pool_type == "avg"


def test_a_head_that_cannot_be_reset_is_named_and_nothing_changes():
    model = TResNet(**SMALL).eval()
    model.head = OwnHead(model.num_features, 3)
    expected = model(images())
    for change in (lambda: model.reset_classifier(4), lambda: model.prune_intermediate_layers([1])):
        with pytest.raises(TypeError, match=r"needs a head with a method reset\(num_classes, pool_type\).*OwnHead"):
            change()
    assert model.num_classes == 5
    assert torch.equal(model(images()), expected)
    assert model.get_classifier() is model.head


@pytest.mark.parametrize("settings", [{}, {"recompute": "expansions"}], ids=["activations", "expansions"])
def test_parts_that_are_identities_are_recomputed_as_absent_ones(settings):
    absent = TResNet(**SMALL, **settings)
    identities = copy.deepcopy(absent)
    for module in identities.modules():
        for name in ("se", "aa", "downsample"):
            if getattr(module, name, module) is None:
                setattr(module, name, nn.Identity())
    results = step(absent), step(identities)
    assert_same(*results, "result")

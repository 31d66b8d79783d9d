import copy
import io
import pickle
import warnings

import pytest
import timm
import timm.models.tresnet
import torch
from reference import randomise
from torch import nn

import timm_tresnet
from timm_tresnet import TResNet
from timm_tresnet.models.layers import BlurPool2d, SpaceToDepth, SqueezeExcite
from timm_tresnet.variants import ARCHITECTURES

VARIANTS = list(ARCHITECTURES)
SMALL = {"layers": (1, 1, 1, 1), "num_classes": 10}
FEW = ("tresnet_m", "tresnet_d")  # basic blocks and bottlenecks; bottlenecks alone, with FReLU
each_variant = pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[] if name in FEW else pytest.mark.thorough) for name in VARIANTS]
)

each_feature = pytest.mark.parametrize(
    "index", [pytest.param(index, marks=[] if index in (0, 3) else pytest.mark.thorough) for index in range(5)]
)


@pytest.mark.parametrize(
    ("variant", "params_m", "gmacs"),
    [  # the paper's and timm's figures, rounded as they print them
        ("tresnet_m", 31.4, 5.7),
        ("tresnet_l", 56.0, 10.9),
        ("tresnet_xl", 78.4, 15.2),
        ("tresnet_v2_l", 46.2, 8.8),
    ],
)
def test_size_is_the_published_one(variant, params_m, gmacs):
    from torch.utils.flop_counter import FlopCounterMode

    model = timm.create_model(variant, device="meta").eval()
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == params_m
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert round(counter.get_total_flops() / 2e9, 1) == gmacs


def test_ml_decoder_backbone_is_v2_xl():
    model = timm.create_model("tresnet_v2_xl", num_classes=0, device="meta")
    assert [len(model.body[index]) for index in range(2, 6)] == [3, 8, 34, 5]
    assert not any(isinstance(module, timm_tresnet.BasicBlock) for module in model.modules())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"stem": "conv7x7"},
        {"aa_layer": False},
        {"use_se": False},
        {"use_se": (False, True, False, True)},
        {"block": "basic"},
        {"block": ("bottleneck", "basic", "basic", "bottleneck")},
        {"act_layer": "relu"},
        {"act_layer": "silu"},
        {"act_layer": nn.GELU},
        {"act_layer": "frelu"},
        {"negative_slope": 0.1, "stem_negative_slope": 0.2},
        {"width_factor": 0.5},
        {"norm_layer": "groupnorm1"},
        {"global_pool": "catavgmax"},
        {"output_stride": 8},
        {"v2": True},
    ],
    ids=str,
)
def test_every_ingredient_can_be_exchanged(kwargs):
    model = timm.create_model("tresnet_m", **{**SMALL, "width_factor": 0.25, **kwargs})
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    features = model.forward_intermediates(torch.randn(1, 3, 64, 64), intermediates_only=True)
    for feature, info in zip(features, model.feature_info, strict=True):
        assert feature.shape == (1, info["num_chs"], 64 // info["reduction"], 64 // info["reduction"])


def test_frozen_norms_are_those_of_the_pretrained_weights_and_stay_so():
    model = timm.create_model("test_tresnet", pretrained=True, norm_layer="frozenbatchnorm2d").train()
    frozen = timm.layers.freeze_batch_norm_2d(timm.create_model("test_tresnet", pretrained=True)).train()
    x = torch.randn(1, 3, 64, 64)  # one image, of which no statistics could be taken
    torch.testing.assert_close(model(x), frozen(x), rtol=0, atol=0)
    before = dict(frozen.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, _ in model.named_parameters()}
    assert not any(".bn." in name for name in changed)
    plain = timm.create_model("test_tresnet").eval()
    plain.load_state_dict(after)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)


def test_ingredients_end_up_where_they_belong():
    model = TResNet(**SMALL, negative_slope=0.1, stem_negative_slope=0.2, aa_layer=False, use_se=(0, 1, 0, 1))
    assert model.body.conv1.bn.act.negative_slope == 0.2
    assert model.body.layer1[0].conv1.bn.act.negative_slope == 0.1
    assert isinstance(model.body.layer1[0].act, nn.ReLU)
    assert not any(isinstance(module, BlurPool2d) for module in model.modules())
    assert model.body.layer2[0].conv1.conv.stride == (2, 2)
    with_se = [
        any(isinstance(module, SqueezeExcite) for module in model.body[index].modules()) for index in range(2, 6)
    ]
    assert with_se == [False, True, False, True]
    assert not any(isinstance(module, SpaceToDepth) for module in TResNet(**SMALL, stem="conv7x7").modules())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layers": (1, 1, 1)}, "layers to have one entry for each of its 4 stages"),
        ({"layers": (1, 0, 1, 1)}, "at least one block a stage"),
        ({"block": "bottle"}, "block to be one of 'basic', 'bottleneck', got 'bottle'"),
        ({"stem": "s2d"}, "stem to be one of 'space_to_depth', 'conv7x7', got 's2d'"),
        ({"aa_layer": "avg"}, "aa_layer to be one of 'blur', True, False, '', got 'avg'"),
        ({"output_stride": 4}, "output_stride to be one of 32, 16, 8, got 4"),
        ({"act_layer": "sine"}, "act_layer to be an activation of timm, or 'frelu', got 'sine'"),
        ({"use_se": (True, False)}, "use_se to have one entry"),
        ({"width_factor": 0.01}, "width_factor that gives a channel or more"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_in_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TResNet(**kwargs)


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_network_computes_the_strided_one_where_that_keeps_a_pixel(output_stride):
    kwargs = {**SMALL, "layers": (1, 1, 2, 2), "use_se": False, "width_factor": 0.25}
    strided = randomise(TResNet(**kwargs)).double().eval()
    dilated = TResNet(**kwargs, output_stride=output_stride).double().eval()
    dilated.load_state_dict(strided.state_dict())
    x = torch.randn(1, 3, 320, 320, dtype=torch.float64)
    with torch.no_grad():
        coarse, fine = strided.forward_features(x), dilated.forward_features(x)
    step = 32 // output_stride
    assert fine.shape[-1] == 320 // output_stride
    # Reflected borders differ between the grids, and reach four pixels inwards.
    torch.testing.assert_close(fine[:, :, ::step, ::step][:, :, :-4, :-4], coarse[:, :, :-4, :-4])


@pytest.mark.parametrize("size", [(62, 64), (64, 30), (16, 16)], ids=["height", "width", "too_small"])
def test_image_sizes_that_do_not_fit_are_refused_with_fitting_ones(size):
    with pytest.raises(ValueError, match=f"multiples of 4, at least 20, got {size[0]}x{size[1]}"):
        TResNet(**SMALL)(torch.zeros(1, 3, *size))


def test_smallest_image_works():
    assert TResNet(**SMALL).eval()(torch.zeros(1, 3, 20, 20)).shape == (1, 10)


def test_init_weights_after_the_meta_device_gives_a_new_network():
    model = TResNet(**SMALL, device="meta").to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(77)
    model.init_weights()
    for name, tensor in model.state_dict().items():
        assert not (tensor == 77).any(), name
    assert model.body.layer1[0].conv2.bn.weight.abs().max() == 0
    assert model.body.layer3[0].conv3.bn.weight.abs().max() == 0
    assert abs(model.head.fc.weight.std().item() - 0.01) < 1e-3
    fan_out = model.body.layer1[0].conv1.conv.weight.std().item() * (64 * 9 / 2) ** 0.5
    assert abs(fan_out - 1) < 0.05
    assert model.eval()(torch.randn(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_and_device_hold_for_every_tensor(dtype):
    model = TResNet(**SMALL, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.eval()(torch.randn(1, 3, 64, 64, dtype=dtype)).dtype == dtype
    on_meta = TResNet(**SMALL, device="meta")
    assert all(tensor.is_meta for tensor in (*on_meta.parameters(), *on_meta.buffers()))


def test_no_weight_is_drawn_on_the_meta_device(monkeypatch):
    drawn = []
    monkeypatch.setattr(nn.init, "kaiming_normal_", lambda weight, **kwargs: drawn.append(weight))
    TResNet(**SMALL, device="meta")
    assert not drawn
    TResNet(**SMALL)
    assert drawn


def test_forward_is_features_then_head():
    model = TResNet(**SMALL).eval()
    x = torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 2)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model(x), model.get_classifier()(pooled))


def test_reset_classifier_changes_classes_and_pooling():
    model = TResNet(**SMALL).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert abs(model.head.fc.weight.std().item() - 0.01) < 1e-3
    model.reset_classifier(5, "catavgmax")
    assert model(x).shape == (2, 5)
    assert model.head_hidden_size == 2 * model.num_features
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, model.num_features, 2, 2)
    assert not model.head.training
    assert TResNet(layers=(1, 1, 1, 1), num_classes=0)(x.float()).shape == (2, 2048)


@each_feature
def test_features_only_has_every_index(index):
    net = timm.create_model("tresnet_m", features_only=True, out_indices=(index,), **SMALL)
    (feature,) = net(torch.randn(1, 3, 64, 64))
    assert net.feature_info.reduction() == [[4, 4, 8, 16, 32][index]]
    assert feature.shape == (1, net.feature_info.channels()[0], *[64 // net.feature_info.reduction()[0]] * 2)


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
def test_features_only_gives_the_intermediates_whatever_the_wrapper(feature_cls):
    torch.manual_seed(5)
    net = timm.create_model("tresnet_m", features_only=True, feature_cls=feature_cls, **SMALL).eval()
    torch.manual_seed(5)
    model = timm.create_model("tresnet_m", **SMALL).eval()
    x = torch.randn(1, 3, 64, 64)
    features = net(x)
    features = list(features.values()) if isinstance(features, dict) else features
    torch.testing.assert_close(
        features, model.forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True), rtol=0, atol=0
    )


def test_forward_intermediates_takes_every_form_of_indices():
    model = TResNet(**SMALL).eval()
    x = torch.randn(1, 3, 64, 64)
    final, everything = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert len(everything) == 5
    for indices, expected in [(2, [3, 4]), ([0, -1], [0, 4]), ((1, 3), [1, 3]), ([3, 1], [1, 3])]:
        taken = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        torch.testing.assert_close(taken, [everything[index] for index in expected])
    final, (stem,) = model.forward_intermediates(x, indices=[0], stop_early=True)
    assert final is stem
    for wrong in (6, 0, [5], [-6]):
        with pytest.raises(ValueError, match="TResNet has 5 features"):
            model.forward_intermediates(x, indices=wrong)
    with pytest.raises(ValueError, match="NCHW only"):
        model.forward_intermediates(x, output_fmt="NHWC")


@each_feature
def test_pruned_network_ends_at_the_last_feature_asked_for(index):
    model = TResNet(**SMALL)
    x = torch.randn(2, 3, 64, 64)
    expected = model.eval().forward_intermediates(x, indices=[index], intermediates_only=True)
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([index - 5]) == [index]
    torch.testing.assert_close(pruned.forward_intermediates(x, indices=[index], intermediates_only=True), expected)
    torch.testing.assert_close(pruned(x), expected[0])
    assert pruned.num_features == model.feature_info[index]["num_chs"]
    pruned.reset_classifier(3, "avg")
    assert pruned(x).shape == (2, 3)
    pruned.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


def test_pruning_the_last_stage_can_keep_the_classifier():
    model = TResNet(**SMALL).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    model.prune_intermediate_layers([4], prune_head=False)
    torch.testing.assert_close(model(x), expected)


def test_layer_decay_groups_cover_every_parameter():
    from timm.optim import create_optimizer_v2

    model = TResNet(**{**SMALL, "layers": (1, 2, 1, 1)})
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=1e-4, layer_decay=0.5)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert len({group["lr_scale"] for group in optimizer.param_groups}) == 7  # stem, five blocks, head


def test_grad_checkpointing_changes_neither_gradients_nor_statistics():
    plain = randomise(TResNet(**{**SMALL, "layers": (2, 2, 2, 2)}, drop_path_rate=0.2))
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    x = torch.randn(4, 3, 64, 64)
    kept = []
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.setdefault(t.data_ptr(), t), lambda t: t
        ):
            output = model(x)
        kept.append(sum(tensor.nbytes for tensor in saved.values()))
        output.square().sum().backward()
    assert kept[1] < kept[0] / 3
    for (name, actual), expected in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=0, atol=0, msg=name)
    torch.testing.assert_close(checkpointed.state_dict(), plain.state_dict(), rtol=0, atol=0)
    checkpointed.set_grad_checkpointing(False)
    assert not any(getattr(module, "grad_checkpointing", False) for module in checkpointed.modules())


@each_variant
def test_variant_scripts(variant):
    model = timm.create_model(variant, scriptable=True, **SMALL).eval()
    x = torch.randn(1, 3, 64, 64)
    with warnings.catch_warnings():  # PyTorch announces the end of TorchScript
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
        scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))
    with pytest.raises(torch.jit.Error, match="multiples of 4"):
        scripted(torch.zeros(1, 3, 62, 62))


@each_variant
def test_variant_exports_with_a_dynamic_batch(variant):
    model = timm.create_model(variant, **SMALL).eval()
    x = torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    y = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(program.module()(y), model(y))


@each_variant
def test_variant_traces_for_feature_extraction(variant):
    from torchvision.models.feature_extraction import create_feature_extractor

    model = timm.create_model(variant, **SMALL).eval()
    x = torch.randn(1, 3, 64, 64)
    extractor = create_feature_extractor(model, {"body.conv1": "stem", "body.layer4": "last"})
    stem, *_, last = model.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(extractor(x), {"stem": stem, "last": last})


@pytest.mark.thorough  # test_compiled.py has the rest
@pytest.mark.parametrize(  # the other variants differ in numbers alone
    ("variant", "backend"), [("tresnet_m", "aot_eager"), ("tresnet_v2_l", "eager"), ("tresnet_d", "eager")]
)
@pytest.mark.filterwarnings("default::DeprecationWarning:torch")  # PyTorch 2.5's compiler warns of its own code
def test_variant_compiles_to_one_graph_in_eval_and_train(variant, backend):
    model = timm.create_model(variant, **SMALL, width_factor=0.25).double()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    reference = copy.deepcopy(model)
    outputs = compiled(x), reference(x)
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for (name, parameter), plain in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, plain.grad, msg=name)
    for (name, buffer), plain in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(buffer, plain, msg=name)
    torch.testing.assert_close(compiled.eval()(x), reference.eval()(x))


def test_network_can_be_pickled_copied_and_laid_out_channels_last():
    model = randomise(TResNet(**SMALL)).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), expected)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = TResNet(**SMALL).eval()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(fresh(x), expected)
    fresh = fresh.to(memory_format=torch.channels_last)
    torch.testing.assert_close(fresh(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)

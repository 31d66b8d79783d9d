import pytest
import reference
import timm
import torch

from timm_tresnet import TResNet
from timm_tresnet.weights.checkpoint import (
    adapt_stem,
    checkpoint_filter_fn,
    choose_network,
    find_networks,
    from_official,
    rename_head,
    unwrap,
)

LAYERS = (1, 2, 2, 1)
NETWORKS = {
    "m": {"network": {"layers": LAYERS}, "official": {}},
    "l": {"network": {"layers": LAYERS, "width_factor": 1.2}, "official": {"planes": 76}},
    "v2": {"network": {"layers": LAYERS, "v2": True}, "official": {"bottlenecks": (True,) * 4}},
}
each_network = pytest.mark.parametrize("names", NETWORKS.values(), ids=NETWORKS)


def load(network, state_dict, **kwargs):
    model = TResNet(num_classes=10, **network, **kwargs).eval()
    model.load_state_dict(checkpoint_filter_fn(state_dict, model))
    return model


@each_network
def test_official_weights_give_the_official_logits(names):
    tensors = reference.official_state_dict(LAYERS, **names["official"])
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        actual, expected = load(names["network"], tensors)(x), reference.official_forward(tensors, x)
    assert (actual - expected).norm() / expected.norm() <= 1e-5


def test_stanford_cars_slope_is_a_matter_of_the_config():
    tensors = reference.official_state_dict(LAYERS, bottlenecks=(True,) * 4)
    slopes = {"negative_slope": 1e-6, "stem_negative_slope": 1e-6}
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        actual = load(NETWORKS["v2"]["network"], tensors, **slopes)(x)
        expected = reference.official_forward(tensors, x, slope=1e-6, stem_slope=1e-6)
        other = reference.official_forward(tensors, x)
    assert (actual - expected).norm() / expected.norm() <= 1e-5
    assert (actual - other).norm() / other.norm() > 1e-5


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: {"model": tensors},
        lambda tensors: {"state_dict": tensors, "epoch": 7},
        lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
        lambda tensors: {"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}},
    ],
    ids=["model", "state_dict", "module", "state_dict_and_module"],
)
def test_wrapped_checkpoints_are_unwrapped(wrap):
    tensors = reference.official_state_dict(LAYERS)
    expected = load(NETWORKS["m"]["network"], tensors).state_dict()
    actual = load(NETWORKS["m"]["network"], wrap(tensors)).state_dict()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_the_moving_average_goes_before_the_weights_it_averages():
    tensors = reference.official_state_dict(LAYERS)
    other = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    assert unwrap({"state_dict": other, "state_dict_ema": tensors}) == tensors
    assert (
        unwrap({"model": other, "ema": {f"module.{name}": t for name, t in tensors.items()}}).keys() == tensors.keys()
    )


ONE, TWO, THREE = torch.ones(1), torch.ones(2), torch.ones(3)
STEM = "body.conv1.conv.weight"


def test_tensors_beside_the_network_are_left_out():
    (network,) = find_networks({f"net.{STEM}": ONE, "net.head.fc.bias": TWO, "loss.weight": THREE, "net.epoch": 7})
    assert network.tensors == {STEM: ONE, "head.fc.bias": TWO}
    assert (network.key, network.others) == ("net", ("loss.weight", "net.epoch"))


def test_wrappers_in_the_middle_of_names_are_taken_off():
    weights = unwrap(
        {"body._orig_mod.conv1.conv.weight": ONE, "body.module._orig_mod.layer1.0.x": TWO, "head.y": THREE}
    )
    assert weights == {STEM: ONE, "body.layer1.0.x": TWO, "head.y": THREE}
    assert unwrap({f"model.mymodule.{STEM}": ONE, "model.mymodule.body.module_x": TWO}).keys() == {
        STEM,
        "body.module_x",
    }


WRAPPERS = {
    "model_state_dict": "", "net": "", "params": "", "weights": "", "student": "", "anything at all": "",
    "state_dict": "model.", "module": "module.", "nested.deep.inside": "_orig_mod.module.", "hf": "timm_model.",
    "backbone": "backbone.", "lightning": "model.model.", "fsdp": "_fsdp_wrapped_module.", "models.0": "",
}  # fmt: skip


@pytest.mark.parametrize(("keys", "prefix"), WRAPPERS.items(), ids=WRAPPERS)
def test_a_network_is_found_under_any_name_and_prefix(keys, prefix):
    tensors = {STEM: ONE, "head.fc.bias": TWO}
    inside = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    for key in reversed(keys.split(".")):
        inside = [inside] if key == "0" else {key: inside, "epoch": 7, "optimizer": {"state": {0: {"exp_avg": ONE}}}}
    assert unwrap(inside) == tensors


def make_two(first, second):
    return {first: {STEM: ONE}, second: {STEM: TWO}}


@pytest.mark.parametrize(
    ("checkpoint", "key"),
    [
        (make_two("model", "model_ema"), "model_ema"),
        (make_two("ema_model", "net"), "ema_model"),
        (make_two("params", "params_ema"), "params_ema"),
        (make_two("state_dict", "teacher"), "state_dict"),
        (make_two("best", "model_state_dict"), "model_state_dict"),
        ({"state_dict": {f"model.{STEM}": ONE, f"averaged_model.module.{STEM}": TWO}}, "state_dict.averaged_model"),
        ({"schema": make_two("net", "swa_net"), "model": 3}, "schema.swa_net"),
    ],
)
def test_of_several_networks_the_likeliest_is_taken(checkpoint, key):
    networks = find_networks(checkpoint)
    assert choose_network(networks).key == key
    (other,) = (network for network in networks if network.key != key)
    assert choose_network(networks, other.key) is other


@pytest.mark.parametrize("names", [("student", "teacher"), ("ema_1", "ema_2"), ("best", "worst")])
def test_networks_that_are_as_likely_are_named(names):
    networks = find_networks(make_two(*names))
    with pytest.raises(ValueError, match=f"has 2 networks, '{names[0]}', '{names[1]}'; choose one by its key"):
        choose_network(networks)
    with pytest.raises(ValueError, match=f"one of '{names[0]}', '{names[1]}', got 'mine'"):
        choose_network(networks, "mine")


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two tensors for head.fc.bias: with and without 'net.'"):
        unwrap({f"net.{STEM}": ONE, "net.head.fc.bias": TWO, "head.fc.bias": THREE})
    with pytest.raises(ValueError, match="two tensors for head.x, one of them as head.module.x"):
        unwrap({STEM: ONE, "head.x": TWO, "head.module.x": THREE})
    with pytest.raises(ValueError, match="two tensors for body.layer2.0.conv1.conv.weight"):
        from_official({"body.layer2.0.conv1.0.weight": 1, "body.layer2.0.conv1.0.0.weight": 2})


def test_plain_norms_under_official_names_keep_their_weights():
    tensors = reference.official_state_dict(LAYERS)
    kept = from_official(tensors, inplace_abn=False)
    torch.testing.assert_close(list(kept.values()), list(tensors.values()), rtol=0, atol=0)


def test_constant_blur_kernels_are_left_out():
    plain = reference.official_state_dict(LAYERS)
    with_kernels = {**reference.official_state_dict(LAYERS, blur_buffers=True), **plain}
    assert len(with_kernels) == len(plain) + 3
    assert from_official(with_kernels).keys() == from_official(plain).keys()


def test_weights_under_our_names_are_not_touched():
    model = TResNet(layers=LAYERS, num_classes=10)
    torch.nn.init.normal_(model.body.layer1[0].conv1.bn.weight)  # negative ones stay negative
    filtered = checkpoint_filter_fn(model.state_dict(), model)
    torch.testing.assert_close(filtered, dict(model.state_dict()), rtol=0, atol=0)


def test_misfitting_tensors_are_named():
    tensors = reference.official_state_dict(LAYERS)
    tensors["body.layer9.weight"] = tensors.pop("body.layer4.0.conv3.0.weight")
    with pytest.raises(
        RuntimeError, match=r"(?s)Missing.*body.layer4.0.conv3.conv.weight.*Unexpected.*body.layer9.weight"
    ):
        load(NETWORKS["m"]["network"], tensors)


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("kernel_size", [3, 7], ids=["space_to_depth", "conv7x7"])
def test_adapted_stem_answers_to_equal_channels_as_before(kernel_size, in_chans):
    pixels = 16 if kernel_size == 3 else 1
    weight = torch.randn(4, pixels * 3, kernel_size, kernel_size)
    adapted = adapt_stem(weight, pixels * in_chans)
    assert adapted.shape == (4, pixels * in_chans, kernel_size, kernel_size)
    if in_chans in (1, 3, 6):  # with these, each old channel counts equally often
        torch.testing.assert_close(
            adapted.unflatten(1, (pixels, in_chans)).sum(2), weight.unflatten(1, (pixels, 3)).sum(2)
        )


def test_half_precision_stem_is_adapted_in_single_precision():
    weight = torch.randn(4, 48, 3, 3).half()
    torch.testing.assert_close(adapt_stem(weight, 16), adapt_stem(weight.float(), 16), rtol=0, atol=0)


def test_official_file_loads_through_timm(tmp_path):
    tensors = reference.official_state_dict(LAYERS)
    torch.save(
        {"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}, tmp_path / "tresnet_m.pth"
    )
    overlay = {"file": str(tmp_path / "tresnet_m.pth"), "hf_hub_id": None, "num_classes": 10}
    model = timm.create_model("tresnet_m", pretrained=True, pretrained_cfg_overlay=overlay, layers=LAYERS).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        actual, expected = model(x), reference.official_forward(tensors, x)
    assert (actual - expected).norm() / expected.norm() <= 1e-5


def test_projections_of_any_width_are_split_into_queries_and_the_rest():
    prefix = "head.decoder.layers.0.multihead_attn.in_proj_"
    weight, bias = torch.arange(6.0)[:, None].expand(6, 2), torch.arange(6.0)
    renamed = rename_head({f"{prefix}weight": weight, f"{prefix}bias": bias})
    assert renamed.keys() == {
        f"head.{part}.{kind}" for part in ("queries.proj", "decoder.kv") for kind in ("weight", "bias")
    }
    assert renamed["head.queries.proj.bias"].tolist() == [0, 1]
    assert renamed["head.decoder.kv.bias"].tolist() == [2, 3, 4, 5]
    assert renamed["head.decoder.kv.weight"].shape == (4, 2)
    odd = {f"{prefix}bias": torch.zeros(7)}  # of another network
    assert rename_head(odd) == odd

import pytest
import reference
import timm
import torch

from timm_tresnet import TResNet
from timm_tresnet.weights.checkpoint import (
    adapt_stem,
    checkpoint_filter_fn,
    choose_network,
    find_misfits,
    find_networks,
    from_official,
    from_query2label,
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


def test_words_tell_averages_and_plain_networks_from_others():
    def choose(first, second):
        networks = find_networks({first: {STEM: ONE}, second: {STEM: TWO}})
        return choose_network(networks).key

    plain = "state dict model models module net network params weights timm backbone state_dict model.0 net_3".split()
    for word in plain:
        assert choose("teacher", word) == word
    for word in ("ema", "EMA", "model_ema", "swa_model", "avg", "average", "averaged", "ema.model", "net.avg_1"):
        assert choose("model", word) == word
    for word in ("schema", "swap", "averages", "emanet", "gavg"):
        assert choose(word, "model") == "model"


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


@pytest.mark.parametrize(
    ("official", "head"),
    [
        ({"head": "bottleneck", "head_features": 24}, {"head": "bottleneck", "head_features": 24}),
        ({"head": "ml_decoder", "num_groups": 3, "decoder_embedding": 64}, {"head": "ml_decoder", "num_groups": 3}),
        (
            {"head": "ml_decoder", "zero_shot": True, "decoder_embedding": 64},
            {"head": "ml_decoder", "label_embedding": 300},
        ),
    ],
    ids=["bottleneck", "groups", "labels"],
)
def test_official_heads_give_the_official_logits(official, head):
    tensors = reference.official_state_dict(LAYERS, planes=16, **official)
    head = {**head, **{name: official[name] for name in ("decoder_embedding",) if name in official}}
    labels = torch.randn(7, 300) if "label_embedding" in head else None
    model = TResNet(LAYERS, width_factor=0.25, num_classes=0 if labels is not None else 10, **head).eval()
    missing, unexpected = model.load_state_dict(checkpoint_filter_fn({"model": tensors}, model), strict=False)
    assert (set(missing) <= {"head.queries.vectors"}, unexpected) == (True, [])
    options = {}
    if labels is not None:
        model.set_label_embeddings([f"label {index}" for index in range(7)], labels)
        options = {"word_vectors": labels}
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        actual, expected = model(x), reference.official_forward(tensors, x, **options)
    assert actual.shape == (2, 10 if labels is None else 7)
    assert reference.relative_error(actual, expected) <= 1e-5


def test_official_frelu_gives_the_official_logits():
    tensors = reference.official_state_dict(LAYERS, planes=16, frelu=True, counters=True)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        actual = load({"layers": LAYERS, "width_factor": 0.25, "act_layer": "frelu"}, tensors)(x)
        assert reference.relative_error(actual, reference.official_forward(tensors, x)) <= 1e-5


def test_official_query2label_gives_the_official_logits():
    tensors = reference.official_state_dict(LAYERS, planes=16, head="query2label", head_features=24)
    (network,) = find_networks(tensors)
    weights = from_official(network.tensors) | from_query2label(network.beside)
    head = {"head": "query2label", "head_features": 24, "decoder_embedding": 512}
    model = TResNet(LAYERS, width_factor=0.25, num_classes=10, **head).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (unexpected, [name for name in missing if not name.endswith("num_batches_tracked")]) == ([], [])
    plain = {name.removeprefix("module.").removeprefix("backbone.0.body."): each for name, each in tensors.items()}
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert reference.relative_error(model(x), reference.official_forward(plain, x)) <= 1e-5
    # Queries for other classes are left out.
    other = TResNet(LAYERS, width_factor=0.25, num_classes=7, **head)
    assert "head.queries.vectors" in checkpoint_filter_fn(weights, model)
    assert "head.queries.vectors" not in checkpoint_filter_fn(weights, other)


def test_transformers_other_than_query2labels_are_not_taken():
    tensors = reference.official_state_dict(LAYERS, planes=16, head="query2label", head_features=24)
    (network,) = find_networks(tensors)
    beside = network.beside
    assert from_query2label(beside)
    decoder = {name: each for name, each in beside.items() if ".decoder.layers." in name}
    for change in ({"1.": "2."}, {"multihead_attn": "self_attn"}, {"decoder": "encoder"}, {"linear1": "linear3"}):
        ((old, new),) = change.items()
        assert from_query2label({**beside, **{name.replace(old, new): each for name, each in decoder.items()}}) == {}
    assert from_query2label({}) == {}


def test_attention_of_xformers_is_that_of_pytorch_in_three_parts():
    prefix = "head.decoder.layers.0.multihead_attn."
    parts = [torch.full((2, 3), float(value)) for value in range(3)]
    of_xformers = {
        f"{prefix}in_proj_container.{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)
    }
    of_pytorch = {f"{prefix}in_proj_weight": torch.cat(parts)}
    for renamed in (rename_head(of_xformers), rename_head(of_pytorch)):
        assert renamed.keys() == {"head.queries.proj.weight", "head.decoder.kv.weight"}
        assert torch.equal(renamed["head.queries.proj.weight"], parts[0])
        assert torch.equal(renamed["head.decoder.kv.weight"], torch.cat(parts[1:]))
    for name in ("proj", "out_proj"):
        assert rename_head({f"{prefix}{name}.bias": ONE}) == {"head.decoder.proj.bias": ONE}
    for odd in (dict(list(of_xformers.items())[:2]), {**of_xformers, f"{prefix}in_proj_container.k_proj.weight": ONE}):
        assert rename_head(odd) == odd


def test_two_tensors_of_a_head_under_one_name_are_refused():
    twice = {"head.fc.bias": ONE, "head.decoder.duplicate_pooling_bias": TWO}
    with pytest.raises(ValueError, match="^the checkpoint has two tensors for head.fc.bias$"):
        rename_head(twice)


def test_what_does_not_fit_is_listed():
    shapes = {"a": (1, 2), "b": (3,), "d": torch.Size([4])}
    expected = {"a": (1, 2), "b": [3, 1], "c": (1,), "d": (4,), "x.num_batches_tracked": ()}
    assert find_misfits(shapes, expected) == (["c"], [], ["b (3,) instead of (3, 1)"])
    assert find_misfits(expected, shapes)[1] == ["c", "x.num_batches_tracked"]


def test_more_channels_repeat_the_old_ones_in_turn():
    weight = torch.randn(4, 16 * 3, 3, 3)
    old = weight.unflatten(1, (16, 3))
    for channels in (2, 4, 5):
        adapted = adapt_stem(weight, 16 * channels).unflatten(1, (16, channels))
        for channel in range(channels):
            torch.testing.assert_close(adapted[:, :, channel], old[:, :, channel % 3] * (3 / channels))
    assert adapt_stem(weight, 48) is weight
    assert adapt_stem(weight.double(), 16).dtype == torch.float64


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

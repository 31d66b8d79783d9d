import argparse
import re

import numpy
import pytest
import reference
import timm
import torch
from converting import SMALL, assert_gives, load_folder, save_checkpoint
from safetensors.torch import save_file

import timm_tresnet.tresnet
from timm_tresnet import TResNet, convert_checkpoint, write_folder
from timm_tresnet.conversion.recognition import _detect
from timm_tresnet.weights.checkpoint import from_official
from timm_tresnet.weights.loading import load_network

CUSTOM = (1, 1, 2, 1)


def half(tensors):
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


LAYOUTS = {
    "bare": lambda tensors: tensors,
    "official": lambda tensors: {"model": tensors, "num_classes": 10},
    "module": lambda tensors: {"state_dict": {f"module.{name}": t for name, t in tensors.items()}, "epoch": 7},
    "compiled": lambda tensors: {f"_orig_mod.module.{name}": tensor for name, tensor in tensors.items()},
    "ema": lambda tensors: {"model": half(tensors), "ema": {f"module.{name}": t for name, t in tensors.items()}},
    "nested": lambda tensors: {"model": {"state_dict": tensors}},
    "train": lambda tensors: {
        "state_dict": half(tensors),
        "state_dict_ema": tensors,
        "args": argparse.Namespace(lr=0.1),
        "optimizer": {"state": {0: {"step": 3}}},
    },
    "mixed": lambda tensors: {**tensors, "epoch": 7, 3: 4},
    "model_state_dict": lambda tensors: {"model_state_dict": tensors, "loss": 0.5},
    "net": lambda tensors: {"net": {f"module.{name}": t for name, t in tensors.items()}, "acc": 93.1, "epoch": 7},
    "swa": lambda tensors: {"n_averaged": torch.tensor(3), **{f"module.{name}": t for name, t in tensors.items()}},
    "lightning": lambda tensors: {
        "state_dict": {**{f"model.{n}": t for n, t in tensors.items()}, "criterion.weight": torch.ones(10)},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9)}},
    },
    "models": lambda tensors: {"models": [tensors]},
    "compiled_body": lambda tensors: {name.replace("body.", "body._orig_mod.", 1): t for name, t in tensors.items()},
    "numpy": lambda tensors: {"model": tensors, "best": numpy.float64(0.5), "rng": numpy.random.get_state()},
    "objects": lambda tensors: {"model": tensors, "opt": Settings(lr=0.1), "hparams": Named(lr=0.1), "log": Log([1])},
    "parameters": lambda tensors: {
        name: torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point()) for name, tensor in tensors.items()
    },
    "without_counters": lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")},
    "one_storage": lambda tensors: dict(zip(tensors, share_storage(tensors.values()), strict=True)),
}


class Settings:
    def __init__(self, **values):
        self.__dict__.update(values)


class Named(dict):
    """As Lightning's AttributeDict."""


class Log(list):
    """As fastcore's L."""


def share_storage(tensors):
    """The same numbers as views of one tensor, as a flattened optimizer leaves them; counters stay."""
    tensors = list(tensors)
    numbers = torch.cat([tensor.flatten() for tensor in tensors if tensor.is_floating_point()])
    position = 0
    for tensor in tensors:
        if not tensor.is_floating_point():
            yield tensor
            continue
        yield numbers[position : position + tensor.numel()].view(tensor.shape)
        position += tensor.numel()


@pytest.mark.parametrize("wrap", LAYOUTS.values(), ids=LAYOUTS)
def test_official_checkpoints_give_the_official_logits(wrap, tensors, tmp_path):
    conversion = convert_checkpoint(save_checkpoint(wrap(tensors), tmp_path / "tresnet_l.pth"))
    assert (conversion.architecture, conversion.layout, conversion.head) == ("test_tresnet", "official", "linear")
    assert conversion.model_args == {}
    assert conversion.num_classes == 10
    write_folder(conversion, tmp_path / "folder")
    x = torch.rand(2, 3, 64, 96)
    assert_gives(tmp_path / "folder", reference.official_forward(tensors, x), x)


def test_blur_kernels_and_safetensors_files_are_taken(tmp_path):
    tensors = reference.official_state_dict(**SMALL, blur_buffers=True)
    save_file(tensors, tmp_path / "m.safetensors")
    write_folder(convert_checkpoint(tmp_path / "m.safetensors"), tmp_path / "folder")
    x = torch.rand(1, 3, 64, 64)
    assert_gives(tmp_path / "folder", reference.official_forward(tensors, x), x)


@pytest.mark.parametrize(
    "wrap", [lambda w: w, lambda w: {"state_dict": {f"module.{n}": t for n, t in w.items()}}], ids=["bare", "train"]
)
def test_timm_checkpoints_stay_as_they_are(wrap, tmp_path):
    model = timm.create_model("test_tresnet", pretrained=True)
    torch.nn.init.normal_(model.body.layer1[0].conv1.bn.weight)
    conversion = convert_checkpoint(save_checkpoint(wrap(model.state_dict()), tmp_path / "a.pth"))
    assert (conversion.layout, conversion.architecture) == ("timm", "test_tresnet")
    torch.testing.assert_close(conversion.state_dict, dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_become_single_before_the_norm_weights_are_rebuilt(dtype, tmp_path):
    name = "body.conv1.1.weight"
    tensors = reference.official_state_dict(**SMALL)
    cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    conversion = convert_checkpoint(save_checkpoint(cast, tmp_path / "a.pth"))
    assert {tensor.dtype for tensor in conversion.state_dict.values()} == {torch.float32, torch.int64}
    expected = (cast[name].double().abs() + 1e-5).float()
    torch.testing.assert_close(conversion.state_dict["body.conv1.bn.weight"], expected, rtol=1e-6, atol=0)
    assert f"weights were cast from {dtype} to torch.float32" in conversion.notes


HEADS = {
    "bottleneck": ({"head": "bottleneck", "head_features": 24}, 10, {"head": "bottleneck", "head_features": 24}),
    "ml_decoder": (
        {"head": "ml_decoder", "num_groups": 3, "decoder_embedding": 64},
        10,
        {"head": "ml_decoder", "num_groups": 3, "decoder_embedding": 64},
    ),
    "full_decoding": (
        {"head": "ml_decoder"},
        10,
        {"head": "ml_decoder", "num_groups": 10, "decoder_embedding": 768},
    ),
    "none": ({"head": "none"}, 0, {}),
}


@pytest.mark.parametrize(("official", "num_classes", "model_args"), HEADS.values(), ids=HEADS)
def test_kind_of_head_is_found(official, num_classes, model_args, tmp_path):
    tensors = reference.official_state_dict(**SMALL, **official)
    conversion = convert_checkpoint(save_checkpoint({"model": tensors}, tmp_path / "a.pth"))
    assert (conversion.head, conversion.num_classes) == (official["head"], num_classes)
    assert conversion.model_args == model_args
    write_folder(conversion, tmp_path / "folder")
    x = torch.rand(2, 3, 64, 64)
    assert_gives(tmp_path / "folder", reference.official_forward(tensors, x), x)
    assert load_folder(tmp_path / "folder", num_classes=3)(x).shape == (2, 3)


def test_zero_shot_networks_answer_once_they_have_labels(tmp_path):
    tensors = reference.official_state_dict(**SMALL, head="ml_decoder", decoder_embedding=64, zero_shot=True)
    conversion = convert_checkpoint(save_checkpoint({"model": tensors}, tmp_path / "a.pth"))
    assert (conversion.head, conversion.num_classes) == ("ml_decoder", 0)
    assert conversion.model_args == {"head": "ml_decoder", "decoder_embedding": 64, "label_embedding": 300}
    assert any("model.set_label_embeddings(names, vectors)" in note for note in conversion.notes)
    write_folder(conversion, tmp_path / "folder")
    model, x, vectors = load_folder(tmp_path / "folder"), torch.rand(2, 3, 64, 64), torch.randn(7, 300)
    with pytest.raises(ValueError, match=r"no labels yet; call set_label_embeddings"):
        model(x)
    model.set_label_embeddings([f"label {index}" for index in range(7)], vectors)
    with torch.no_grad():
        expected = reference.official_forward(tensors, x, word_vectors=vectors)
        assert reference.relative_error(model(x), expected) <= 1e-5
    # timm's form of the same network has its labels in the file
    again = convert_checkpoint(save_checkpoint(model.state_dict(), tmp_path / "b.pth"))
    assert (again.num_classes, again.layout) == (7, "timm")
    write_folder(again, tmp_path / "again")
    assert_gives(tmp_path / "again", expected, x)


def as_query2label(tensors):
    """Names of the file without its wrapper; the backbone has the official names."""
    return {name.removeprefix("module.").removeprefix("backbone.0.body."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("wrapped", [True, False], ids=["ddp", "bare"])
def test_file_of_query2label_gives_the_logits_of_its_code(wrapped, tmp_path):
    tensors = reference.official_state_dict(**SMALL, head="query2label", head_features=24)
    if not wrapped:
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    conversion = convert_checkpoint(save_checkpoint({"state_dict": tensors}, tmp_path / "checkpoint.pkl"))
    assert (conversion.head, conversion.num_classes) == ("query2label", 10)
    assert conversion.model_args == {"head": "query2label", "head_features": 24, "decoder_embedding": 512}
    assert any("4 heads, as published" in note for note in conversion.notes)
    assert not any("left out" in note and "unknown" not in note for note in conversion.notes)
    write_folder(conversion, tmp_path / "folder")
    x = torch.rand(2, 3, 64, 96)
    assert_gives(tmp_path / "folder", reference.official_forward(as_query2label(tensors), x), x)


@pytest.mark.parametrize("change", ["self_attn", "third_layer", "norm1"])
def test_of_another_transformer_of_query2label_the_backbone_is_converted(change, tmp_path):
    tensors = reference.official_state_dict(**SMALL, head="query2label")
    layer = "module.transformer.decoder.layers."
    if change == "norm1":
        tensors = {name: tensor for name, tensor in tensors.items() if not re.search("transformer.*norm1", name)}
        with pytest.raises(ValueError, match=r"missing head.encoder.norm1.weight, head.encoder.norm1.bias"):
            convert_checkpoint(save_checkpoint({"state_dict": tensors}, tmp_path / "checkpoint.pkl"))
        return
    for name in [name for name in tensors if name.startswith(f"{layer}1.")]:  # its options to keep self-attention
        other = name.replace("multihead", "self") if change == "self_attn" else name.replace("s.1.", "s.2.")
        tensors[other] = tensors[name]
    conversion = convert_checkpoint(save_checkpoint({"state_dict": tensors}, tmp_path / "checkpoint.pkl"))
    assert (conversion.head, conversion.num_classes, conversion.model_args) == ("query2label", 0, {})
    assert any("the Query2Label head was left out" in note for note in conversion.notes)
    write_folder(conversion, tmp_path / "folder")
    backbone = {name: tensor for name, tensor in as_query2label(tensors).items() if name.startswith("body.")}
    x = torch.rand(2, 3, 64, 64)
    assert_gives(tmp_path / "folder", reference.official_forward(backbone, x), x)


ML_DANBOORU = {
    "layers": (1, 1, 2, 1), "planes": 16, "bottlenecks": (True,) * 4, "num_classes": 10, "frelu": True,
    "counters": True, "head": "ml_decoder", "num_groups": 3, "decoder_embedding": 64,
}  # fmt: skip
NARROW_D = {"layers": [1, 1, 2, 1], "width_factor": 0.25, "block": ["bottleneck"] * 4, "act_layer": "frelu"}


def as_xformers(tensors):
    """The attention of ML-Danbooru's decoder as stored by a training with xformers."""
    attention = "head.decoder.layers.0.multihead_attn."
    tensors = dict(tensors)
    for kind in ("weight", "bias"):
        for name, part in zip("qkv", tensors.pop(f"{attention}in_proj_{kind}").chunk(3), strict=True):
            tensors[f"{attention}in_proj_container.{name}_proj.{kind}"] = part
        tensors[f"{attention}proj.{kind}"] = tensors.pop(f"{attention}out_proj.{kind}")
    return tensors


FEW = {dict: "ema", as_xformers: "module"}


@pytest.mark.parametrize(
    ("change", "layout"),
    [
        pytest.param(change, layout, marks=[] if FEW[change] == layout else pytest.mark.thorough)
        for change in (dict, as_xformers)
        for layout in ("bare", "ema", "module", "without_counters")
    ],
)
def test_file_of_ml_danbooru_gives_the_logits_of_its_code(layout, change, tmp_path):
    tensors = reference.official_state_dict(**ML_DANBOORU)
    file = save_checkpoint(LAYOUTS[layout](change(tensors)), tmp_path / "a.ckpt")
    conversion = convert_checkpoint(file, custom=True, multi_label=True, threshold=0.7)
    assert conversion.model_args == {**NARROW_D, "head": "ml_decoder", "num_groups": 3, "decoder_embedding": 64}
    assert not conversion.inplace_abn
    assert not any("In-Place ABN" in note for note in conversion.notes)
    write_folder(conversion, tmp_path / "folder")
    x = torch.rand(2, 3, 64, 96)
    assert_gives(tmp_path / "folder", reference.official_forward(tensors, x), x)


def test_file_of_ml_danbooru_loads_with_timm_too():
    tensors = reference.official_state_dict(**ML_DANBOORU)
    options = {name: ML_DANBOORU[name] for name in ("layers", "num_classes", "head", "num_groups", "decoder_embedding")}
    model = timm.create_model("tresnet_d", width_factor=0.25, learn_queries=True, **options).eval()
    model.load_state_dict(timm_tresnet.tresnet.checkpoint_filter_fn({"model": as_xformers(tensors)}, model))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert reference.relative_error(model(x), reference.official_forward(tensors, x)) <= 1e-5


@pytest.mark.parametrize("frelu", [True, False], ids=["frelu", "leaky_relu"])
def test_tresnet_d_of_either_file_of_its_code_is_found(frelu, tmp_path):
    with torch.device("meta"):
        tensors = reference.official_state_dict(
            (3, 6, 14, 3), bottlenecks=(True,) * 4, num_classes=12547, head="ml_decoder", num_groups=32,
            decoder_embedding=1024, frelu=frelu,
        )  # fmt: skip
    weights = from_official(tensors)
    assert _detect(weights, True, custom=False) == ("tresnet_d", {} if frelu else {"act_layer": "leaky_relu"})
    with torch.device("meta"):  # src_files/models/tresnet/tresnet.py has In-Place ABN
        model = timm.create_model("tresnet_d", num_classes=0, act_layer="frelu" if frelu else "leaky_relu")
    body = {name: tensor.shape for name, tensor in weights.items() if name.startswith("body.")}
    own = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.endswith("tracked")}
    assert body == own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("body.conv1.2.depthwise_conv_bn.0.weight"), "missing body.conv1.act.funnel.conv.weight"),
        (lambda t: t.pop("body.layer3.1.relu.depthwise_conv_bn.1.bias"), r"missing body.layer3.1.act.funnel.bn.bias"),
        (
            lambda t: t.update({"body.conv1.2.depthwise_conv_bn.0.weight": torch.randn(16, 16, 3, 3)}),
            r"wrong shape body.conv1.act.funnel.conv.weight \(16, 16, 3, 3\) instead of \(16, 1, 3, 3\)",
        ),
        (
            lambda t: t.update({"body.conv1.2.depthwise_conv_bn.2.weight": torch.ones(16)}),
            "unexpected body.conv1.2.dep",
        ),
        (lambda t: t.update({"body.conv1.act.funnel.bn.weight": torch.ones(16)}), "two tensors for body.conv1.act.fun"),
        (
            lambda t: t.pop("head.decoder.layers.0.multihead_attn.in_proj_container.k_proj.bias"),
            "unexpected head.decoder.layers.0.multihead_attn.in_proj_container.q_proj.bias",
        ),
    ],
    ids=["stem", "sum", "not_depthwise", "third", "twice", "key_of_xformers"],
)
def test_parts_of_frelu_are_refused(change, message, tmp_path):
    tensors = as_xformers(reference.official_state_dict(**ML_DANBOORU))
    change(tensors)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(save_checkpoint(tensors, tmp_path / "a.pth"), custom=True)


def test_frelu_on_another_variant_is_an_argument_of_it(tmp_path):
    tensors = reference.official_state_dict(**{**SMALL, "head": "linear"}, frelu=True)
    conversion = convert_checkpoint(save_checkpoint(tensors, tmp_path / "a.pth"))
    assert (conversion.architecture, conversion.model_args) == ("test_tresnet", {"act_layer": "frelu"})
    write_folder(conversion, tmp_path / "folder")
    x = torch.rand(2, 3, 64, 64)
    assert_gives(tmp_path / "folder", reference.official_forward(tensors, x), x)


def test_class_names_in_the_file_become_label_names(tmp_path):
    tensors = reference.official_state_dict(**SMALL, head="ml_decoder", decoder_embedding=64)
    names = [f"label {index}" for index in range(10)]
    file = save_checkpoint({"model": tensors, "idx_to_class": dict(enumerate(names))}, tmp_path / "a.pth")
    write_folder(convert_checkpoint(file), tmp_path / "folder")
    model = load_folder(tmp_path / "folder")
    assert list(model.pretrained_cfg["label_names"]) == names


GOOD_NAMES = [f"label {index}" for index in range(10)]
NAMES = {
    "list": GOOD_NAMES,
    "tuple": tuple(GOOD_NAMES),
    "any_order": {index: GOOD_NAMES[index] for index in (3, 1, 0, 2, 6, 5, 4, 9, 8, 7)},
    "keys_of_json": {str(index): name for index, name in reversed(list(enumerate(GOOD_NAMES)))},
    "class_to_idx": {name: index for index, name in reversed(list(enumerate(GOOD_NAMES)))},
}
NO_NAMES = {
    "none": (None, "needs a dict or a list of names, got NoneType"),
    "text": ("abcdefghij", "needs a dict or a list of names, got str"),
    "no_names": ([], "needs 10 names, one for each class, got 0"),
    "more": ([*GOOD_NAMES, "x"], "needs 10 names, one for each class, got 11"),
    "gap": ({**dict(enumerate(GOOD_NAMES[:9])), 10: "x"}, "needs the keys 0 to 9"),
    "one_number_for_two": ({**{name: index for index, name in enumerate(GOOD_NAMES[:9])}, "x": 3}, "needs the keys"),
    "from_one": (dict(enumerate(GOOD_NAMES, 1)), "needs the keys 0 to 9"),
    "texts": ({name: name for name in GOOD_NAMES}, "needs the keys 0 to 9"),
    "twice": (["a", *GOOD_NAMES[1:9], "a"], "needs a name for each class, got a more than once"),
    "empty": ([*GOOD_NAMES[:9], " "], 'needs name 9 to be text without control characters, got " "'),
    "numbers": ([*GOOD_NAMES[:9], 7], "needs name 9 to be text without control characters, got int"),
    "escape": ([*GOOD_NAMES[:9], "\x1b[31m"], r'needs name 9 to be text .*, got "\\u001b\[31m"'),
    "surrogate": ([*GOOD_NAMES[:9], "\ud800"], r'needs name 9 to be text .*, got "\\ud800"'),
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_names_are_in_the_order_of_the_outputs(names, tensors, tmp_path):
    conversion = convert_checkpoint(save_checkpoint({"model": tensors, "idx_to_class": names}, tmp_path / "a.pth"))
    assert conversion.labels == {"label_names": GOOD_NAMES}
    assert not any("idx_to_class" in note for note in conversion.notes)


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        pytest.param(*case, id=name, marks=[] if name in ("text", "gap", "twice", "escape") else pytest.mark.thorough)
        for name, case in NO_NAMES.items()
    ],
)
def test_names_that_cannot_be_used_are_left_out_and_the_note_says_why(names, fault, tensors, tmp_path):
    conversion = convert_checkpoint(save_checkpoint({"model": tensors, "idx_to_class": names}, tmp_path / "a.pth"))
    assert conversion.labels == {}
    (note,) = (note for note in conversion.notes if "idx_to_class" in note)
    assert re.match(f"the file's idx_to_class was left out: it {fault}", note)
    write_folder(conversion, tmp_path / "folder")
    assert load_network(f"local-dir:{tmp_path / 'folder'}").num_classes == 10


FEW_NAMES = {  # and what the ten outputs are then called
    "list": (GOOD_NAMES[:8], [*GOOD_NAMES[:8], "class 8", "class 9"]),
    "gap": ({"9": "last", "1": "first"}, ["class 0", "first", *(f"class {index}" for index in range(2, 9)), "last"]),
    "numbers_of_names": ({"last": 9}, [*(f"class {index}" for index in range(9)), "last"]),
    "names_like_ours": (
        [f"class {index}" for index in range(1, 10)],
        [*(f"class {index}" for index in range(1, 10)), "unnamed class 9"],
    ),
}


@pytest.mark.parametrize(("names", "expected"), FEW_NAMES.values(), ids=FEW_NAMES)
def test_outputs_without_a_name_are_numbered_and_the_note_says_how_many_have_one(names, expected, tensors, tmp_path):
    conversion = convert_checkpoint(save_checkpoint({"model": tensors, "idx_to_class": names}, tmp_path / "a.pth"))
    assert conversion.labels == {"label_names": expected}
    said = f"class names: the checkpoint ({len(names)} names for 10 classes, the rest are numbered)"
    assert [note for note in conversion.notes if "class" in note] == [said]


def test_names_without_labels_are_left_out_too(tmp_path):
    tensors = reference.official_state_dict(**SMALL, head="ml_decoder", decoder_embedding=64, zero_shot=True)
    file = save_checkpoint({"model": tensors, "idx_to_class": GOOD_NAMES}, tmp_path / "a.pth")
    notes = convert_checkpoint(file).notes
    assert any("idx_to_class was left out: it needs 0 names, one for each class, got 10" in note for note in notes)


def test_a_zero_shot_network_without_labels_can_be_converted_again(tmp_path):
    tensors = reference.official_state_dict(**SMALL, head="ml_decoder", decoder_embedding=64, zero_shot=True)
    first = convert_checkpoint(save_checkpoint({"model": tensors}, tmp_path / "a.pth"))
    save_file(first.state_dict, tmp_path / "b.safetensors")
    again = convert_checkpoint(tmp_path / "b.safetensors")
    assert (again.num_classes, again.model_args) == (0, first.model_args)
    torch.testing.assert_close(again.state_dict, first.state_dict, rtol=0, atol=0)


def test_a_head_in_official_names_on_a_timm_network_is_taken(tmp_path):
    model = timm.create_model("test_tresnet", num_classes=0)
    tensors = model.state_dict() | reference.ml_decoder_state_dict(512, 7, 3, 64)
    conversion = convert_checkpoint(save_checkpoint(tensors, tmp_path / "a.pth"))
    assert (conversion.layout, conversion.num_classes) == ("timm", 7)
    write_folder(conversion, tmp_path / "folder")
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = reference.ml_decoder(tensors, model.eval().forward_features(x))
    assert_gives(tmp_path / "folder", expected, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("head.decoder.query_embed.weight"), "is incomplete: missing head.queries.vectors"),
        (lambda t: t.pop("head.decoder.embed_standart.weight"), "is incomplete: missing head.embedding.weight"),
        (lambda t: t.pop("head.decoder.layers.0.linear1.bias"), "missing head.decoder.mlp.fc1.bias"),
        (
            lambda t: t.update({"head.decoder.duplicate_pooling": torch.zeros(3, 64, 9)}),
            r"wrong shape head.fc.weight \(3, 64, 9\) instead of \(3, 64, 4\)",
        ),
        (lambda t: t.update({"head.decoder.layers.1.norm1.bias": torch.zeros(64)}), "unexpected head.decoder.layers.1"),
        (lambda t: t.update({"head.decoder.embed_standart.weight": torch.zeros(3, 512)}), "decoder_embedding in multi"),
    ],
    ids=["queries", "embedding", "layer", "groups", "two_layers", "width"],
)
def test_parts_of_a_decoder_are_refused(change, message, tmp_path):
    tensors = reference.official_state_dict(**SMALL, head="ml_decoder", num_groups=3, decoder_embedding=64)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(save_checkpoint(tensors, tmp_path / "a.pth"))


def test_architecture_is_that_of_the_tensors_not_of_the_name(tmp_path):
    tensors = reference.official_state_dict((3, 4, 23, 3), bottlenecks=(True,) * 4, num_classes=80, head="ml_decoder")
    conversion = convert_checkpoint(save_checkpoint({"model": tensors}, tmp_path / "tresnet_l.pth"))
    assert conversion.architecture == "tresnet_v2_l"
    assert conversion.public_weight is None
    assert any("tresnet_l.miil_in1k" in note and "was not used" in note for note in conversion.notes)
    known = convert_checkpoint(tmp_path / "tresnet_l.pth", public_weight="tresnet_v2_l.ml_decoder_coco_448")
    assert known.pretrained_cfg["input_size"] == (3, 448, 448)
    assert known.labels["label_names"][0] == "person"
    with pytest.raises(ValueError, match=r"public weight tresnet_l.miil_in1k needs .* the file has .*tresnet_v2_l"):
        convert_checkpoint(tmp_path / "tresnet_l.pth", public_weight="tresnet_l.miil_in1k")


ABLATIONS = {
    "shallow": {"layers": CUSTOM},
    "wide": {"layers": CUSTOM, "width_factor": 1.3},
    "bottlenecks": {"layers": CUSTOM, "block": "bottleneck"},
    "without_gates": {"layers": CUSTOM, "use_se": False},
    "classic_stem": {"layers": CUSTOM, "stem": "conv7x7"},
    "grey": {"layers": CUSTOM, "in_chans": 1},
}


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(
            arguments, id=name, marks=[] if name in ("without_gates", "classic_stem") else pytest.mark.thorough
        )
        for name, arguments in ABLATIONS.items()
    ],
)
def test_networks_that_are_no_variant_are_taken_on_demand(arguments, tmp_path):
    model = TResNet(**arguments, num_classes=5).eval()
    file = save_checkpoint(model.state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"is none of the variants.*(1, 1, 2, 1).*tresnet_xl.*incomplete.*custom"):
        convert_checkpoint(file)
    write_folder(convert_checkpoint(file, custom=True), tmp_path / "folder")
    x = torch.rand(1, arguments.get("in_chans", 3), 64, 64)
    with torch.no_grad():
        assert_gives(tmp_path / "folder", model(x), x)


def test_official_strided_convolutions_are_distinguished_from_blurred_ones(tmp_path):
    tensors = reference.official_state_dict(CUSTOM, blurred=False)
    conversion = convert_checkpoint(save_checkpoint(tensors, tmp_path / "a.pth"), custom=True)
    assert conversion.model_args["aa_layer"] is False
    write_folder(conversion, tmp_path / "folder")
    x = torch.rand(1, 3, 64, 64)
    assert_gives(tmp_path / "folder", reference.official_forward(tensors, x), x)


def test_other_image_channels_are_found(tmp_path):
    model = TResNet(layers=(2, 2, 3, 1), width_factor=0.25, in_chans=6, num_classes=5).eval()
    conversion = convert_checkpoint(save_checkpoint(model.state_dict(), tmp_path / "a.pth"), input_size=64)
    assert conversion.model_args == {"in_chans": 6}
    assert conversion.pretrained_cfg["input_size"] == (6, 64, 64)
    write_folder(conversion, tmp_path / "folder")
    x = torch.rand(1, 6, 64, 64)
    with torch.no_grad():
        assert_gives(tmp_path / "folder", model(x), x)


def test_norm_weights_follow_the_flag_where_the_names_mislead(tensors, tmp_path):
    official, renamed = tmp_path / "official.pth", tmp_path / "renamed.pth"
    plain = {n: t.abs() + 1e-5 if n.endswith(".1.weight") else t for n, t in tensors.items()}
    save_checkpoint(plain, official)  # as the official code's InplacABN_to_ABN leaves it
    model = timm.create_model("test_tresnet")
    torch.nn.init.normal_(model.body.conv1.bn.weight)
    save_checkpoint(model.state_dict(), renamed)  # names changed, values not
    expected = plain["body.conv1.1.weight"]

    def convert(file, norm_weights):
        conversion = convert_checkpoint(file, norm_weights=norm_weights)
        return conversion.state_dict["body.conv1.bn.weight"], conversion.notes

    weight, notes = convert(official, None)
    torch.testing.assert_close(weight, expected + 1e-5, rtol=0, atol=0)
    assert any("norm_weights='bn' keeps the weights" in note for note in notes)
    weight, notes = convert(official, "bn")
    torch.testing.assert_close(weight, expected, rtol=0, atol=0)
    assert not any("norm" in note for note in notes)
    weight, notes = convert(renamed, "abn")
    torch.testing.assert_close(weight, model.body.conv1.bn.weight.detach().abs() + 1e-5, rtol=0, atol=0)
    with pytest.raises(ValueError, match="norm_weights needs to be 'abn', 'bn' or None, got 'iabn'"):
        convert(official, "iabn")


def test_partly_matching_checkpoints_are_refused_by_name(tensors, tmp_path):
    tensors["body.layer4.0.extra"] = tensors.pop("body.layer4.0.conv3.0.weight")
    tensors["head.fc.bias"] = torch.zeros(11)
    with pytest.raises(ValueError, match=r"cannot convert .*a.pth: does not fit test_tresnet") as caught:
        convert_checkpoint(save_checkpoint({"model": tensors}, tmp_path / "a.pth"))
    for part in (
        "missing body.layer4.0.conv3.conv.weight",
        "unexpected body.layer4.0.extra",
        "head.fc.bias (11,) instead of (10,)",
    ):
        assert part in str(caught.value)


def make_cyclic():
    wrapper = {}
    wrapper["model"] = wrapper
    return wrapper


NO_NETWORK = "needs a TResNet, with body.conv1.0.weight or body.conv1.conv.weight, got "
NO_NUMBERS = "needs to hold plain floating-point numbers of 16 to 64 bits, got"
BLURS = "body.layer2.0.conv1, body.layer3.0.conv2, body.layer4.0.conv2"
REFUSED = {  # what is said behind the name of the file; ... for what is left out here
    "resnet": (
        lambda tensors: {"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)},
        f"{NO_NETWORK}conv1.weight, fc.weight",
    ),
    "empty": (lambda tensors: {}, f"{NO_NETWORK}nothing"),
    "list": (lambda tensors: list(tensors.values()), "needs a dict of tensors, got list"),
    "cyclic": (lambda tensors: make_cyclic(), f"{NO_NETWORK}nothing"),
    "wrapped_resnet": (
        lambda tensors: {"model_state_dict": {"conv1.weight": torch.zeros(1)}, "epoch": 7},
        f"{NO_NETWORK}model_state_dict.conv1.weight",
    ),
    "deep_resnet": (
        lambda tensors: {"a": {"b": {"c": {"x": torch.zeros(1), "d": {"y": torch.zeros(1)}}}}, "z": torch.zeros(1)},
        f"{NO_NETWORK}a.b.c.x, z",
    ),
    "two": (
        lambda tensors: {"student": tensors, "teacher": dict(tensors)},
        "has 2 networks, 'student', 'teacher'; choose one by its key (--key in the command)",
    ),
    "extra": (
        lambda tensors: {**tensors, "loss.weight": torch.zeros(1)},
        "does not fit test_tresnet  with 10 classes: missing nothing; unexpected loss.weight; wrong shape nothing",
    ),
    "truncated": (
        lambda tensors: {name: t for name, t in tensors.items() if not name.startswith(("body.layer3", "body.layer4"))},
        "no tensors of body.layer3: missing body.layer3.*, body.layer4.*",
    ),
    "one_block_lost": (
        lambda tensors: {name: t for name, t in tensors.items() if not name.startswith("body.layer3.2")},
        "is none of the variants: {'layers': (2, 2, 2, 1), 'planes': 16, 'block': ('basic', 'basic', 'bottleneck', "
        "'bottleneck')}, use_se=[True, True, True, False], aa_layer=True, stem=space_to_depth. The variants are "
        "tresnet_s {'layers': (3, 4, 7, 3), 'planes': 64, 'block': ('basic', 'basic', 'bottleneck', 'bottleneck')}; "
        "tresnet_m {...}; all have use_se=[True, True, True, False], aa_layer=True, stem=space_to_depth. Perhaps the "
        "file is incomplete; if the network is meant to differ, convert it as a custom one",
    ),
    "twice": (
        lambda tensors: {**{f"module.{name}": t for name, t in tensors.items()}, "head.fc.bias": torch.zeros(10)},
        "the checkpoint has two tensors for head.fc.bias: with and without 'module.'",
    ),
    "two_names": (
        lambda tensors: {**tensors, "body.layer1.0.conv1.0.0.weight": tensors["body.layer1.0.conv1.0.weight"]},
        f"needs a blur after all of {BLURS} or after none, got one after body.layer1.0.conv1, {BLURS}: missing "
        "nothing, unexpected body.layer1.0.conv1.0.0.weight",
    ),
    "some_blurred": (
        lambda tensors: {name.replace("layer3.0.conv2.0.", "layer3.0.conv2."): t for name, t in tensors.items()},
        f"needs a blur after all of {BLURS} or after none, got one after body.layer2.0.conv1, body.layer4.0.conv2: "
        "missing body.layer3.0.conv2.0.0.weight, unexpected nothing",
    ),
    "deep_block": (
        lambda tensors: {**tensors, "body.layer3.99999999.conv1.0.weight": torch.zeros(1)},
        "does not fit test_tresnet  with 10 classes: missing nothing; unexpected body.layer3.99999999.conv1.conv.weight"
        "; wrong shape nothing",
    ),
    "stem": (
        lambda tensors: {**tensors, "body.conv1.0.weight": torch.zeros(16, 50, 3, 3)},
        "body.conv1.conv.weight needs the shape of a TResNet stem, got (16, 50, 3, 3)",
    ),
    "kernel": (
        lambda tensors: {**tensors, "body.conv1.0.weight": torch.zeros(16, 48, 5, 5)},
        "body.conv1.conv.weight needs the shape of a TResNet stem, got (16, 48, 5, 5)",
    ),
    "no_channels": (
        lambda tensors: {**tensors, "body.conv1.0.weight": torch.zeros(16, 0, 3, 3)},
        "body.conv1.conv.weight needs the shape of a TResNet stem, got (16, 0, 3, 3)",
    ),
    "no_planes": (
        lambda tensors: {**tensors, "body.conv1.0.weight": torch.zeros(0, 48, 3, 3)},
        "body.conv1.conv.weight needs the shape of a TResNet stem, got (0, 48, 3, 3)",
    ),
    "classifier": (
        lambda tensors: {**tensors, "head.fc.weight": torch.zeros(10)},
        "head.fc.weight needs 2 or 3 dimensions, got shape (10,)",
    ),
    "bias": (
        lambda tensors: {**tensors, "head.fc.bias": torch.zeros(10, 1)},
        "head.fc.bias needs 1 dimensions, got shape (10, 1)",
    ),
    "no_features": (
        lambda tensors: {**tensors, "head.fc.weight": torch.zeros(10, 0)},
        "head.fc.weight needs 2 or 3 dimensions, got shape (10, 0)",
    ),
    "repeated": (
        lambda tensors: {**tensors, "head.fc.weight": torch.zeros(1, 1).expand(10**7, 10**7)},
        "head.fc.weight of shape (10000000, 10000000) is larger than its data in the file",
    ),
    "sparse": (
        lambda tensors: {**tensors, "head.fc.bias": torch.zeros(10).to_sparse()},
        f"head.fc.bias {NO_NUMBERS} torch.float32, torch.sparse_coo",
    ),
    "integers": (
        lambda tensors: {**tensors, "head.fc.bias": torch.zeros(10, dtype=torch.int8)},
        f"head.fc.bias {NO_NUMBERS} torch.int8, torch.strided",
    ),
    "eight_bits": (
        lambda tensors: {**tensors, "body.conv1.1.weight": tensors["body.conv1.1.weight"].to(torch.float8_e4m3fn)},
        f"body.conv1.1.weight {NO_NUMBERS} torch.float8_e4m3fn, torch.strided",
    ),
    "a_number": (
        lambda tensors: {**tensors, "body.conv1.1.bias": torch.tensor(1.0)},
        "body.conv1.1.bias needs at least one dimension, got a single number",
    ),
    "nowhere": (
        lambda tensors: {**tensors, "head.fc.bias": torch.zeros(10, device="meta")},
        f"head.fc.bias {NO_NUMBERS} torch.float32, torch.strided",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_tresnet_is_refused(change, message, tensors, tmp_path):
    file = save_checkpoint(change(tensors), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"\Acannot (convert|read) ") as caught:
        convert_checkpoint(file)
    start, _, end = message.partition("...")
    said = str(caught.value).partition(f" {file}: ")[2]
    assert said.startswith(start)
    assert said.endswith(end) if "..." in message else said == message

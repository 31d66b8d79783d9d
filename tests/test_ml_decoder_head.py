import copy
import pickle

import numpy as np
import pytest
import reference
import timm
import torch
import torch.nn.functional as F
from packaging.version import Version
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3, reparameterize_model
from torch import nn

from timm_tresnet import TResNet
from timm_tresnet.models.layers import MLDecoderHead
from timm_tresnet.models.layers.ml_decoder_head import FoldedQueries, GroupLinear
from timm_tresnet.weights.checkpoint import rename_head

SMALL = {"layers": (1, 1, 1, 1), "width_factor": 0.125, "head": "ml_decoder", "decoder_embedding": 16}
GROUPS = {  # classes, groups asked for, groups that there are
    "full_decoding": (7, 7, 7),
    "more_groups_than_classes": (7, 100, 7),
    "fewer_groups": (12, 4, 4),
    "not_divisible": (11, 4, 4),
    "an_empty_group": (9, 5, 5),  # two classes a group leave nothing to the last one
    "one_class": (1, 3, 1),
    "one_group": (6, 1, 1),
}


def make_pair(num_classes, num_groups, zero_shot=False, dtype=torch.float64):
    """A head and tensors under the official names with the same weights."""
    tensors = reference.ml_decoder_state_dict(24, num_classes, num_groups, 32, zero_shot)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    options = {"label_embedding": 300} if zero_shot else {"num_groups": num_groups}
    head = MLDecoderHead(24, num_classes, decoder_embedding=32, dtype=dtype, **options)
    weights = {name.removeprefix("head."): tensor for name, tensor in rename_head(tensors).items()}
    if zero_shot:
        weights["queries.vectors"] = head.queries.vectors
    head.load_state_dict(weights)
    return head.eval(), tensors


def make_network(**kwargs):
    return TResNet(**{**SMALL, "num_classes": 7, "num_groups": 3, **kwargs}).eval()


def without_dropout(module):
    for each in module.modules():
        if isinstance(each, nn.Dropout):
            each.p = 0.0
    return module


@pytest.mark.parametrize(("num_classes", "num_groups", "expected_groups"), GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_logits_loss_and_gradients_are_those_of_the_official_head(num_classes, num_groups, expected_groups, mode):
    head, tensors = make_pair(num_classes, num_groups)
    without_dropout(head).train(mode == "train")
    tensors = {name: tensor.requires_grad_("query_embed" not in name) for name, tensor in tensors.items()}
    x = torch.randn(3, 24, 3, 4, dtype=torch.float64)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    logits = [head(inputs[0]), reference.ml_decoder(tensors, inputs[1])]
    assert head.queries.vectors.shape == (expected_groups, 32)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-10, atol=1e-10)
    target = (torch.rand_like(logits[0]) < 0.3).double()
    for each in logits:
        F.binary_cross_entropy_with_logits(each, target).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-8, atol=1e-12)
    expected = rename_head({name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None})
    actual = {f"head.{name}": parameter.grad for name, parameter in head.named_parameters()}
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-12)


def test_labels_are_asked_for_by_their_word_embeddings():
    head, tensors = make_pair(5, 5, zero_shot=True)
    x = torch.randn(2, 24, 3, 4, dtype=torch.float64)
    for count in (5, 1, 13):  # seen and unseen ones, without training
        vectors = torch.randn(count, 300, dtype=torch.float64)
        head.set_label_embeddings(vectors)
        expected = reference.ml_decoder(tensors, x, vectors)
        assert expected.shape == (2, count)
        torch.testing.assert_close(head(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_classes", [4, 7, 9])
def test_group_layer_is_a_linear_layer_a_group(num_classes):
    layer = GroupLinear(4, 6, num_classes)
    nn.init.normal_(layer.bias)
    x = torch.randn(3, 4, 6)
    outputs = [x[:, group] @ layer.weight[group] for group in range(4)]
    torch.testing.assert_close(layer(x), torch.cat(outputs, 1)[:, :num_classes] + layer.bias)


def test_dropout_is_drawn_for_each_image_and_at_every_place():
    head = MLDecoderHead(24, 7, num_groups=3, decoder_embedding=32, drop_rate=0.5).train()
    x = torch.randn(1, 24, 3, 4).expand(2, -1, -1, -1)
    first, second = head(x)
    assert not torch.allclose(first, second)
    rates = {name: module.p for name, module in head.named_modules() if isinstance(module, nn.Dropout)}
    assert rates.pop("drop") == 0.5
    assert set(rates.values()) == {0.1}
    assert len(rates) == 5  # queries, attention, its output, twice in the small network
    for name in rates:
        once = without_dropout(copy.deepcopy(head))
        once.get_submodule(name).p = 0.5
        first, second = once(x)
        assert not torch.allclose(first, second), name


def test_weights_are_drawn_as_the_official_code_draws_them():
    head = MLDecoderHead(512, 9605, num_groups=200)
    attention = nn.MultiheadAttention(768, 8)
    bound = attention.in_proj_weight.abs().max()
    for projection in (head.queries.proj, head.decoder.kv):
        torch.testing.assert_close(projection.weight.abs().max(), bound, rtol=1e-3, atol=0)
        assert not projection.bias.any()
    torch.testing.assert_close(head.queries.vectors.std(), torch.tensor(1.0), rtol=0.02, atol=0)
    official = nn.init.xavier_normal_(torch.empty(200, 768, 49)).std()
    torch.testing.assert_close(head.fc.weight.std(), official, rtol=0.01, atol=0)
    assert not head.fc.bias.any()
    linear = nn.Linear(512, 768)
    torch.testing.assert_close(head.embedding.weight.std(), linear.weight.std(), rtol=0.02, atol=0)


def test_a_network_made_on_the_meta_device_is_drawn_anew():
    for options in ({}, {"num_groups": None, "label_embedding": 5}):
        model = make_network(**options, device="meta").to_empty(device="cpu")
        for tensor in model.state_dict().values():
            tensor.fill_(7)
        model.init_weights()
        assert all(parameter.isfinite().all() and (parameter != 7).any() for parameter in model.head.parameters())
        assert model.head.queries.vectors.std() > 0.5
        assert model(torch.rand(2, 3, 64, 64)).std() > 0


def test_queries_are_stored_and_never_trained():
    model = make_network().train()
    before = model.head.queries.vectors.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.rand(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    assert torch.equal(model.head.queries.vectors, before)
    assert "head.queries.vectors" in model.state_dict()
    other = make_network()
    other.load_state_dict(model.state_dict())
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(other(x), model.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"num_groups": None, "label_embedding": 5}], ids=["groups", "labels"])
def test_folded_queries_are_constants_that_give_the_same_logits(options):
    model = make_network(**options)
    folded = reparameterize_model(model)
    x = torch.rand(2, 3, 64, 96)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert type(folded.head.queries) is FoldedQueries
    assert {name for name in folded.state_dict() if name.startswith("head.queries")} == {
        "head.queries.queries",
        "head.queries.projected",
    }
    assert reparameterize_model(folded).head.queries.projected.equal(folded.head.queries.projected)
    features = folded.forward_features(x)
    with pytest.raises(ValueError, match="queries are folded, .* call eval"):
        folded.train().forward_head(features)
    with pytest.raises(ValueError, match="cannot be reset once its queries are folded"):
        folded.reset_classifier(3)
    assert folded.num_classes == 7
    with pytest.raises(ValueError, match="not folded"):
        folded.set_label_embeddings(["a"], torch.zeros(1, 5))
    assert model.head.queries.vectors.any()  # the network itself stays as it was


def test_folding_in_training_mode_computes_what_eval_mode_does():
    model = make_network()  # timm's validate.py folds before it calls eval()
    x = torch.rand(2, 3, 64, 64)
    expected = model(x)
    torch.testing.assert_close(reparameterize_model(model.train()).eval()(x), expected, rtol=1e-4, atol=1e-5)


def test_new_classes_keep_the_decoder_and_get_groups_and_queries():
    model = make_network()
    kept = {name: t.clone() for name, t in model.head.state_dict().items() if not name.startswith(("fc", "queries.v"))}
    queries = model.head.queries.vectors.clone()
    model.reset_classifier(2)
    assert model.head.queries.vectors.shape == (2, 16)
    assert (model.head.fc.weight.shape, model.head.fc.bias.shape) == ((2, 16, 1), (2,))
    model.reset_classifier(20)
    assert model.head.queries.vectors.shape == (3, 16)  # as many as were asked for
    assert not torch.equal(model.head.queries.vectors, queries)
    assert model.head.fc.weight.shape == (3, 16, 7)
    for name, tensor in kept.items():
        assert torch.equal(model.head.state_dict()[name], tensor), name
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 20)
    assert not model.head.training


def test_without_classes_the_decoders_mean_comes_out():
    model = make_network()
    x = torch.rand(2, 3, 64, 64)
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    assert expected.shape == (2, model.head_hidden_size) == (2, 16)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert model.num_classes == 0
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 256, 2, 2)
    assert model.head_hidden_size == model.num_features == 256
    assert not model.head.state_dict()
    model.reset_classifier(5)  # a feature map needs no pooling for this head
    assert model(x).shape == (2, 5)


def test_dtype_device_and_mode_follow_the_network():
    model = make_network().to("meta", torch.float64).train()
    for num_classes in (0, 4):
        model.reset_classifier(num_classes)
    tensors = {**dict(model.head.named_parameters()), **dict(model.head.named_buffers())}
    assert {(tensor.device.type, tensor.dtype) for tensor in tensors.values()} == {("meta", torch.float64)}
    assert all(module.training for module in model.modules())
    frozen = make_network().requires_grad_(False)
    frozen.reset_classifier(0)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_timm_scales_and_groups_its_parameters():
    model = make_network()
    classifier = model.get_classifier()
    nn.init.ones_(classifier.bias)
    with torch.no_grad():  # as train.py does for --head-init-scale
        classifier.weight.mul_(0.0)
        classifier.bias.mul_(0.5)
    nn.init.constant_(classifier.bias, -2.0)  # and for --head-init-bias
    torch.testing.assert_close(model(torch.rand(2, 3, 64, 64)), torch.full((2, 7), -2.0))
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    head = {layer for name, layer in layers.items() if name.startswith("head.")}
    assert head == {max(layers.values())}
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert {scales[id(parameter)] for parameter in model.head.parameters()} == {1.0}
    assert scales[id(model.body.conv1.conv.weight)] < 1.0


@pytest.mark.parametrize("setting", ["none", "activations", "expansions", "checkpointing"])
def test_every_way_of_keeping_less_gives_the_same_gradients(setting):
    plain = make_network(recompute="none").train()
    other = copy.deepcopy(plain)
    if setting == "checkpointing":
        other.set_grad_checkpointing()
    else:
        other.set_recompute(setting)
    x = torch.rand(4, 3, 64, 64)
    gradients = []
    for model in (plain, other):
        torch.manual_seed(3)  # of dropout
        model(x).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_close_to_single(dtype):
    head, _ = make_pair(11, 4, dtype=torch.float32)
    x = torch.rand(2, 24, 4, 4)
    expected = head(x)
    with torch.autocast("cpu", dtype):
        cast = head(x)
    whole = copy.deepcopy(head).to(dtype)(x.to(dtype))
    for actual in (cast, whole):
        assert reference.relative_error(actual.float(), expected) < (0.03 if dtype is torch.bfloat16 else 0.004)
    assert whole.dtype == dtype


def test_channels_last_and_single_images_make_no_difference():
    model = make_network()
    x = torch.rand(3, 3, 64, 96)
    expected = model(x)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([model(image[None]) for image in x]), expected, rtol=1e-4, atol=1e-5)


def test_copies_pickles_and_averages_are_whole():
    model = make_network(num_groups=None, label_embedding=5)
    model.set_label_embeddings(["a", "b"], torch.randn(2, 5))
    x = torch.rand(1, 3, 64, 64)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), ModelEmaV3(model)):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch announces the end of TorchScript
@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"num_groups": None, "label_embedding": 5}, marks=pytest.mark.thorough)],
    ids=["groups", "labels"],
)
def test_scripted_networks_give_the_same_logits(options):
    model = make_network(**options)
    x = torch.rand(2, 3, 64, 64)
    for network in (model, reparameterize_model(model)):
        torch.testing.assert_close(torch.jit.script(network)(x), network(x))
    model.reset_classifier(0, "")
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@pytest.mark.thorough
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.11"), reason="PyTorch 2.5 exports it for one number of images alone"
)
def test_compiled_and_exported_heads_give_the_same_logits():
    head, _ = make_pair(11, 4, dtype=torch.float32)
    x = torch.rand(3, 24, 4, 5)
    torch.testing.assert_close(torch.compile(head, fullgraph=True, backend="aot_eager")(x), head(x))
    shapes = ({0: torch.export.Dim("batch"), 2: torch.export.Dim("rows"), 3: torch.export.Dim("columns")},)
    program = torch.export.export(head, (x,), dynamic_shapes=shapes).module()
    for other in (x, torch.rand(1, 24, 2, 7)):
        torch.testing.assert_close(program(other), head(other))


def test_feature_extractors_have_no_head():
    x = torch.rand(1, 3, 64, 64)
    options = {"head": "ml_decoder", "decoder_embedding": 16}
    extractor = timm.create_model("test_tresnet", features_only=True, **options).eval()
    assert [tuple(features.shape[2:]) for features in extractor(x)] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    model = timm.create_model("test_tresnet", num_classes=5, **options).eval()
    final, intermediates = model.forward_intermediates(x)
    torch.testing.assert_close(model.forward_head(final), model(x))
    assert len(intermediates) == 5
    model.prune_intermediate_layers([2])
    assert not model.head.state_dict()
    model.reset_classifier(3, "avg")
    assert model(x).shape == (1, 3)


@pytest.mark.parametrize("options", [{"num_groups": 3}, {"label_embedding": 5}], ids=["groups", "labels"])
def test_timm_saves_and_loads_it(options, tmp_path):
    if "label_embedding" in options and Version(timm.__version__) < Version("1.0.31"):
        pytest.skip("timm before 1.0.31 hides from networks what weights they get")
    options = {"head": "ml_decoder", "decoder_embedding": 16, **options}
    source = timm.create_model("test_tresnet", num_classes=7, **options).eval()
    if "label_embedding" in options:
        source.set_label_embeddings([f"label {index}" for index in range(9)], torch.randn(9, 5))
    timm.models.save_for_hf(source, tmp_path, safe_serialization=True, model_args=options)
    x = torch.rand(2, 3, 64, 64)
    load = f"local-dir:{tmp_path}"
    same = timm.create_model(load, pretrained=True).eval()
    torch.testing.assert_close(same(x), source(x), rtol=0, atol=0)
    embedder = timm.create_model(load, pretrained=True, num_classes=0).eval()
    expected = source.forward_head(source.forward_features(x), pre_logits=True)
    torch.testing.assert_close(embedder(x), expected, rtol=0, atol=0)
    tuned = timm.create_model(load, pretrained=True, num_classes=4).eval()
    assert tuned(x).shape == (2, 4)
    assert tuned.head.queries.vectors.shape[0] == (3 if "num_groups" in options else 4)
    for name, tensor in source.head.decoder.state_dict().items():
        assert torch.equal(tuned.head.decoder.state_dict()[name], tensor), name
    maps = timm.create_model(load, pretrained=True, num_classes=0, global_pool="").eval()
    torch.testing.assert_close(maps(x), source.forward_features(x), rtol=0, atol=0)
    if "label_embedding" in options:
        assert list(same.pretrained_cfg["label_names"]) == [f"label {index}" for index in range(9)]


def test_names_of_labels_come_with_their_word_embeddings():
    options = {"head": "ml_decoder", "decoder_embedding": 16, "label_embedding": 5}
    model = timm.create_model("test_tresnet", num_classes=3, **options).eval()
    names = ["a cat", "a dog"]
    model.set_label_embeddings(iter(names), np.ones((2, 5)))
    assert model.num_classes == model.pretrained_cfg["num_classes"] == 2
    assert model.pretrained_cfg["label_names"] == tuple(names)
    assert model.default_cfg is model.pretrained_cfg
    logits = model(torch.rand(1, 3, 64, 64))
    assert logits.shape == (1, 2)
    torch.testing.assert_close(logits[:, 0], logits[:, 1])  # the same words, the same answer
    assert timm.create_model("test_tresnet").pretrained_cfg["num_classes"] == 10  # nobody else's


@pytest.mark.parametrize(
    ("names", "vectors", "message"),
    [
        (["a", "b"], torch.zeros(3, 5), r"a vector for each of 2 names, got \(3, 5\)"),
        (["a", "b"], torch.zeros(2, 4), r"vectors of shape \(labels, 5\) in floating point, got \(2, 4\)"),
        (["a", "b"], torch.zeros(2, 5, dtype=torch.long), r"in floating point, got \(2, 5\) in torch.int64"),
        (["a", "b"], torch.full((2, 5), torch.nan), "finite numbers, got some that are NaN"),
        (["a", "b", "a"], torch.zeros(3, 5), "a name for each label, got a twice"),
        ([], torch.zeros(0, 5), r"got \(0, 5\)"),
        (["a", 2], torch.zeros(2, 5), "needs names to be strings"),
        ("ab", torch.zeros(2, 5), "a list of names, got 'ab'"),
        (None, torch.zeros(2, 5), "a list of names, got None"),
        (["a", "b"], "ab", "vectors as a tensor, an array or a list .*, got str"),
        (["a", "b"], None, "vectors as a tensor, an array or a list .*, got NoneType"),
        (["a", "b"], [torch.zeros(5), torch.zeros(4)], "a vector of equal width for each label, got list"),
        (["a", "b"], torch.zeros(2, 5).to_sparse(), r"dense vectors, got torch.sparse_coo; call to_dense\(\)"),
    ],
    ids=[
        "fewer_names",
        "width",
        "integers",
        "nan",
        "twice",
        "none",
        "numbers",
        "one_text",
        "no_names",
        "texts",
        "no_vectors",
        "ragged",
        "sparse",
    ],  # fmt: skip
)
def test_labels_that_do_not_fit_are_refused_and_change_nothing(names, vectors, message):
    model = make_network(num_groups=None, label_embedding=5)
    before = model.head.queries.vectors.clone()
    with pytest.raises(ValueError, match=message):
        model.set_label_embeddings(names, vectors)
    assert model.num_classes == 7
    assert torch.equal(model.head.queries.vectors, before)


@pytest.mark.parametrize("saved", [0, 4], ids=["labels_to_come", "labels"])
def test_the_last_layer_serves_other_labels_too(saved, tmp_path):
    options = {"head": "ml_decoder", "decoder_embedding": 16, "label_embedding": 5}
    source = timm.create_model("test_tresnet", num_classes=saved, **options).eval()
    nn.init.normal_(source.head.fc.weight)
    nn.init.normal_(source.head.fc.bias)
    kept = {name: tensor.clone() for name, tensor in source.head.fc.state_dict().items()}
    timm.models.save_for_hf(source, tmp_path, safe_serialization=True, model_args=options)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=5).eval()
    source.reset_classifier(0)
    source.reset_classifier(5)
    for model in (loaded, source):
        torch.testing.assert_close(dict(model.head.fc.state_dict()), kept, rtol=0, atol=0)
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize("options", [{"num_groups": 4}, {"label_embedding": 5}], ids=["groups", "labels"])
def test_a_network_without_classes_takes_the_weights_of_one_that_lost_them(options):
    model = make_network(**{"num_groups": None, "num_classes": 2, **options})
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    fresh = make_network(**{"num_groups": None, "num_classes": 0, **options})
    assert isinstance(fresh.get_classifier(), nn.Identity)
    fresh.load_state_dict(model.state_dict())
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)


def test_vectors_set_inside_inference_mode_can_be_trained():
    for options in ({}, {"num_groups": None, "label_embedding": 5}):
        model = make_network(**options).train()
        with torch.inference_mode():
            model.reset_classifier(3)
            if "label_embedding" in options:
                model.set_label_embeddings(["a", "b"], torch.randn(2, 5))
        model(torch.rand(2, 3, 64, 64)).sum().backward()
        assert all(parameter.grad is not None for parameter in model.head.parameters())


def test_word_embeddings_may_come_one_by_one():
    model = make_network(num_groups=None, label_embedding=5)
    vectors = torch.randn(3, 5)
    for given in (list(vectors), tuple(vectors.numpy()), vectors.tolist()):
        model.set_label_embeddings(["a", "b", "c"], torch.zeros(3, 5))
        model.set_label_embeddings(["a", "b", "c"], given)
        torch.testing.assert_close(model.head.queries.vectors, vectors)


def test_names_of_labels_go_with_their_classifier():
    options = {"head": "ml_decoder", "decoder_embedding": 16, "label_embedding": 5}
    model = timm.create_model("test_tresnet", num_classes=3, **options)
    model.set_label_embeddings(["a", "b"], torch.randn(2, 5))
    model.reset_classifier(2)
    assert "label_names" not in model.pretrained_cfg
    assert model.default_cfg is model.pretrained_cfg
    assert timm.create_model("test_tresnet").pretrained_cfg["label_names"]  # nobody else's


def test_numbers_that_overflow_in_the_networks_precision_are_refused():
    model = make_network(num_groups=None, label_embedding=5)
    with pytest.raises(ValueError, match="NaN or infinite in torch.float32"):
        model.set_label_embeddings(["a"], torch.full((1, 5), 1e39, dtype=torch.float64))
    with pytest.raises(ValueError, match="NaN or infinite in torch.float16"):
        model.half().set_label_embeddings(["a"], torch.full((1, 5), 1e6))


def test_labels_of_a_network_that_hands_out_its_feature_map_are_refused():
    model = make_network(num_groups=None, label_embedding=5, num_classes=0, global_pool="")
    with pytest.raises(ValueError, match=r"needs a decoder, .* call reset_classifier\(1, 'avg'\)"):
        model.set_label_embeddings(["a"], torch.zeros(1, 5))
    model.reset_classifier(1, "avg")
    model.set_label_embeddings(["a", "b"], torch.zeros(2, 5))
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 2)


@pytest.mark.parametrize("options", [{}, {"head": "linear", "decoder_embedding": None}], ids=["groups", "linear"])
def test_labels_need_a_network_for_them(options):
    model = TResNet(**{**SMALL, **options}, num_classes=2)
    with pytest.raises(ValueError, match="head='ml_decoder' and label_embedding=WIDTH"):
        model.set_label_embeddings(["a"], torch.zeros(1, 300))


def test_a_network_without_labels_says_what_it_needs():
    model = make_network(num_groups=None, label_embedding=5, num_classes=0)
    with pytest.raises(ValueError, match=r"no labels yet; call set_label_embeddings\(names, vectors\)"):
        model(torch.rand(1, 3, 64, 64))
    model.set_label_embeddings(["a", "b", "c"], torch.randn(3, 5))
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize("width", [12, 7, 0, -8])
def test_the_decoders_width_is_for_eight_heads(width):
    with pytest.raises(ValueError, match=f"decoder_embedding in multiples of 8, .*got {width}"):
        MLDecoderHead(24, 5, decoder_embedding=width)

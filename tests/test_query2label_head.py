"""Query2Label's head beside the official one, computed a label and a head at a time."""

import pytest
import reference
import timm
import torch
from packaging.version import Version

from timm_tresnet import TResNet, fold_batch_norms
from timm_tresnet.models.layers import Query2LabelHead
from timm_tresnet.models.layers.query2label_head import encode_position
from timm_tresnet.weights.checkpoint import from_query2label

SMALL = {"layers": (1, 1, 1, 1), "width_factor": 0.125, "head": "query2label", "head_features": 24}


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (14, 14)], ids=str)
def test_positions_are_those_of_detr(size):
    actual = encode_position(*size, 16, torch.empty(0))
    torch.testing.assert_close(actual, reference.position(*size, 16), rtol=1e-5, atol=1e-5)
    assert encode_position(*size, 16, torch.empty(0, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("width", [None, 16], ids=["as_wide", "projected"])
def test_logits_are_those_of_the_official_head(width):
    tensors = reference.query2label_state_dict(32, 7, 24, width)
    head = Query2LabelHead(32, 7, decoder_embedding=width, hidden_features=24).eval()
    head.load_state_dict({name.removeprefix("head."): t for name, t in from_query2label(tensors).items()})
    x = torch.randn(2, 32, 3, 5)
    expected = reference.query2label(tensors, x)
    assert reference.relative_error(head(x), expected) <= 1e-5
    assert expected.std(1).min() > 0.1  # labels differ


def test_order_of_pixels_matters_and_dropout_acts_in_training_alone():
    head = Query2LabelHead(32, 7, hidden_features=24).eval()
    x = torch.randn(1, 32, 3, 5)
    assert not torch.allclose(head(x), head(x.flip(3)))
    assert torch.equal(head(x), head(x))
    head.train()
    assert not torch.equal(head(x), head(x))


def test_every_weight_is_drawn_and_trained():
    model = TResNet(**SMALL, num_classes=5, device="meta").to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(7)
    model.init_weights()
    assert all((parameter != 7).any() and parameter.isfinite().all() for parameter in model.head.parameters())
    model(torch.rand(2, 3, 64, 64)).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.head.named_parameters()}
    # no score of attention changes with the keys' bias
    assert all(gradient.any() for name, gradient in gradients.items() if not name.endswith("attn.k.bias"))


def test_other_labels_keep_the_transformer_and_get_queries_of_their_own(tmp_path):
    model = timm.create_model("test_tresnet", num_classes=7, head="query2label", head_features=24).eval()
    options = {"head": "query2label", "head_features": 24}
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True, model_args=options)
    x = torch.rand(2, 3, 64, 64)
    load = f"local-dir:{tmp_path}"
    torch.testing.assert_close(timm.create_model(load, pretrained=True).eval()(x), model(x), rtol=0, atol=0)
    tuned = timm.create_model(load, pretrained=True, num_classes=4).eval()
    assert tuned(x).shape == (2, 4)
    assert tuned.head.queries.vectors.shape == (4, 512)
    for name, tensor in model.head.state_dict().items():
        if not name.startswith(("queries", "fc")):
            assert torch.equal(tuned.head.state_dict()[name], tensor), name
    if Version(timm.__version__) >= Version("1.0.31"):  # before it, the encoder is random, and a line says so
        embedder = timm.create_model(load, pretrained=True, num_classes=0).eval()
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
        torch.testing.assert_close(embedder(x), expected, rtol=0, atol=0)
    maps = timm.create_model(load, pretrained=True, num_classes=0, global_pool="").eval()
    torch.testing.assert_close(maps(x), model.forward_features(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch announces the end of TorchScript
def test_scripted_exported_and_folded_networks_have_the_same_logits():
    model = reference.randomise(TResNet(**SMALL, num_classes=5)).eval()
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
        torch.testing.assert_close(fold_batch_norms(model)(x), expected, rtol=1e-3, atol=1e-4)
        half = model.bfloat16()(x.bfloat16())
    assert reference.relative_error(half.float(), expected) < 0.1


def test_half_precision_under_autocast_and_channels_last():
    model = TResNet(**SMALL, num_classes=5).train().to(memory_format=torch.channels_last)
    x = torch.rand(1, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().sum()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)

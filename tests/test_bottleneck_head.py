import pytest
import timm
import torch

from timm_tresnet import TResNet
from timm_tresnet.models.layers import BottleneckHead

LAYERS = (1, 1, 1, 1)


@pytest.fixture
def model():
    return TResNet(layers=LAYERS, num_classes=7, head_features=12).eval()


def test_head_is_two_linear_layers_on_the_channel_means():
    head = BottleneckHead(6, 4, 3).eval()
    x = torch.randn(2, 6, 5, 4)
    embedding = x.mean((2, 3)) @ head.embedding.weight.T + head.embedding.bias
    torch.testing.assert_close(head(x, pre_logits=True), embedding)
    torch.testing.assert_close(head(x), embedding @ head.fc.weight.T + head.fc.bias)


def test_keys_are_those_of_a_plain_head_and_an_embedding(model):
    keys = {name for name in model.state_dict() if name.startswith("head")}
    assert keys == {"head.embedding.weight", "head.embedding.bias", "head.fc.weight", "head.fc.bias"}
    assert model.get_classifier() is model.head.fc


def test_logits_before_the_classifier_are_the_embedding(model):
    features = model.forward_features(torch.rand(2, 3, 64, 64))
    embedding = model.forward_head(features, pre_logits=True)
    assert embedding.shape == (2, 12)
    assert model.head_hidden_size == 12
    assert model.num_features == 2048
    torch.testing.assert_close(model.head.fc(embedding), model.forward_head(features))


def test_both_layers_start_from_a_narrow_normal_distribution():
    model = TResNet(layers=LAYERS, num_classes=700, head_features=512)
    for layer in (model.head.embedding, model.head.fc):
        assert layer.weight.std().item() == pytest.approx(0.01, abs=1e-3)


def test_a_new_classifier_keeps_the_embedding_while_its_input_stays(model):
    x = torch.rand(1, 3, 64, 64)
    embedding = model.head.embedding.weight.clone()
    model.reset_classifier(3)
    assert model(x).shape == (1, 3)
    torch.testing.assert_close(model.head.embedding.weight, embedding, rtol=0, atol=0)
    model.reset_classifier(0)
    assert model(x).shape == (1, 12)
    torch.testing.assert_close(model.head.embedding.weight, embedding, rtol=0, atol=0)
    model.reset_classifier(2, "catavgmax")
    assert model(x).shape == (1, 2)
    assert model.head.embedding.in_features == 4096
    assert model.head.embedding.weight.std().item() == pytest.approx(0.01, abs=1e-3)
    assert model.head_hidden_size == 12
    assert not model.head.training


def test_without_pooling_the_feature_map_comes_out(model):
    model.reset_classifier(0, "")
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 2048, 2, 2)
    assert model.head_hidden_size == model.num_features == 2048
    model.reset_classifier(5, "")
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 5, 2, 2)
    assert model.head_hidden_size == 12


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch announces the end of TorchScript
def test_scripted_network_gives_the_same_logits(model):
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_timm_loads_the_embedding_where_it_fits(tmp_path, model):
    arguments = {"layers": list(LAYERS), "head_features": 12}
    source = timm.create_model("tresnet_m", num_classes=7, **arguments).eval()
    timm.models.save_for_hf(source, tmp_path, safe_serialization=True, model_args=arguments)
    x = torch.rand(1, 3, 64, 64)
    same = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(same(x), source(x), rtol=0, atol=0)
    fine_tuned = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)
    torch.testing.assert_close(fine_tuned.head.embedding.weight, source.head.embedding.weight, rtol=0, atol=0)
    embedder = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(embedder(x), source.forward_head(source.forward_features(x), pre_logits=True))
    unpooled = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0, global_pool="").eval()
    torch.testing.assert_close(unpooled(x), source.forward_features(x))


@pytest.mark.parametrize("head_features", [0, -3])
def test_an_embedding_needs_a_feature(head_features):
    with pytest.raises(ValueError, match=f"head_features to be at least 1 or None, got {head_features}"):
        TResNet(layers=LAYERS, head_features=head_features)

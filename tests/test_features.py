"""Feature lists and traced graphs: their stored bytes, and that checkpoints count a batch once."""

import logging

import pytest
import timm
import torch
from comparing import SMALL, assert_same, collect, images, saved_bytes
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from timm_tresnet.recompute import eligibility
from timm_tresnet.recompute.stage import Stage


class Features(nn.Module):
    """All features of a network, in one tensor."""

    def __init__(self, feature_cls, recompute="activations"):
        super().__init__()
        torch.manual_seed(0)
        self.net = timm.create_model(
            "tresnet_m", features_only=True, feature_cls=feature_cls, recompute=recompute, **SMALL
        ).train()

    def forward(self, x):
        features = self.net(x)
        features = features.values() if isinstance(features, dict) else features
        return torch.cat([feature.flatten(1) for feature in features], 1)


def train(model):
    loss = model(images()).square().mean()
    loss.backward()
    return collect(model, loss)


@pytest.mark.parametrize("feature_cls", ["list", "fx"])
def test_wrapped_stages_recompute_and_give_the_same_numbers(feature_cls):
    ours, plain = Features(feature_cls), Features(feature_cls, "none")
    assert saved_bytes(ours, images()) <= 0.7 * saved_bytes(plain, images())
    assert_same(train(ours), train(plain))


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx"])
def test_wrapped_stages_checkpoint_and_count_a_batch_once(feature_cls):
    checkpointed, plain = Features(feature_cls), Features(feature_cls, "none")
    kept = saved_bytes(checkpointed, images())
    checkpointed = Features(feature_cls)
    checkpointed.net.set_grad_checkpointing()
    assert_same(train(checkpointed), train(plain))
    assert saved_bytes(checkpointed, images()) < 0.8 * kept


class One(nn.Module):
    def __init__(self, extractor):
        super().__init__()
        self.extractor = extractor

    def forward(self, x):
        return self.extractor(x)["b"]


def extract(leaves):
    torch.manual_seed(0)
    model = timm.create_model("tresnet_m", **SMALL).train()
    nodes = {"body.layer3": "a", "body.layer4": "b"}
    kwargs = {"tracer_kwargs": {"leaf_modules": leaves}} if leaves else {}
    return create_feature_extractor(model, nodes, **kwargs)


def step(extractor):
    loss = sum(feature.square().mean() for feature in extractor(images()).values())
    loss.backward()
    return {name: parameter.grad for name, parameter in extractor.named_parameters()}


def test_graph_of_torchvision_recomputes_with_stages_as_leaves_and_says_so_without(caplog):
    eligibility.log_once.cache_clear()
    caplog.set_level(logging.INFO, "timm_tresnet")
    recomputing = extract([Stage])
    assert caplog.messages == []
    opened = extract(None)
    (line,) = caplog.messages
    assert "unless Stage is among the leaf modules" in line
    expected, actual = step(opened), step(recomputing)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], grad) for name, grad in expected.items())
    assert saved_bytes(One(recomputing), images()) <= 0.7 * saved_bytes(One(opened), images())

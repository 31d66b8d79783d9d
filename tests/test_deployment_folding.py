import copy
import io
import pickle
import warnings

import pytest
import timm
import torch
from exporting import (
    WHOLE,
    each_alteration,
    make_altered,
    make_small,
    prune_weights,
)
from reference import randomise, relative_error
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import parametrize

from timm_tresnet import export_model, fold_batch_norms, optimize_for_inference
from timm_tresnet.deployment.folding import copy_folded
from timm_tresnet.models.layers import ConvNormAct
from timm_tresnet.models.layers.ml_decoder_head import FoldedQueries


@pytest.mark.parametrize(
    "variant",
    ["tresnet_m", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("tresnet_v2_l", "test_tresnet"))],
)
@pytest.mark.parametrize("kwargs", [{}, {"act_layer": "relu", "aa_layer": False, "stem": "conv7x7"}], ids=str)
def test_folded_network_has_the_same_logits_and_no_batch_norm(variant, kwargs):
    model = make_small(variant, **kwargs)
    state_dict = copy.deepcopy(model.state_dict())
    folded = fold_batch_norms(model)
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        assert relative_error(folded(x), model(x)) <= 1e-5
    assert not any("bn" in name for name in folded.state_dict())
    torch.testing.assert_close(model.state_dict(), state_dict, rtol=0, atol=0)


def test_whole_tresnet_m_folds_within_the_tolerance():
    model = randomise(timm.create_model("tresnet_m")).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(fold_batch_norms(model)(x), model(x)) <= 1e-4


def test_timm_folds_in_training_mode_and_eval_makes_it_run():
    model = make_small()
    folded = reparameterize_model(copy.deepcopy(model).train())  # as validate.py does
    x = torch.rand(2, 3, 64, 64)
    with pytest.raises(ValueError, match=r"call eval\(\)"):
        folded(x)
    with torch.no_grad():
        assert relative_error(folded.eval()(x), model(x)) <= 1e-5


def test_folding_refuses_training_mode():
    with pytest.raises(ValueError, match=r"got one in training mode; call model.eval\(\) first"):
        fold_batch_norms(make_small().train())


def parametrize_stem(model):
    parametrize.register_parametrization(model.body.conv1.conv, "weight", nn.Identity())


def train_a_part(model):
    model.eval().body.layer1.train()


def replace_head(model):
    model.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(model.num_features, 10))


PARTS = {  # added after eval(), and their names
    parametrize_stem: "body.conv1.conv.parametrizations",
    train_a_part: "body.layer1",
    replace_head: "head",
}


@pytest.mark.parametrize(("alter", "named"), PARTS.items())
def test_parts_in_training_mode_are_named(alter, named, tmp_path):
    model = make_small()
    alter(model)
    said = rf"needs a network in eval mode, got one with {named} in training mode; call model.eval\(\) again"
    with pytest.raises(ValueError, match=f"^fold_batch_norms {said}"):
        fold_batch_norms(model)
    with pytest.raises(ValueError, match=f"^export_model {said}"):
        export_model(model, tmp_path / "network.pt", "torchscript")
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(fold_batch_norms(model.eval())(x), model(x)) <= 1e-5


@each_alteration
def test_foldable_units_are_folded_and_the_rest_stays(alter, caplog):
    plain, model = make_altered(alter)
    x = torch.rand(2, 3, 64, 96)
    with caplog.at_level("INFO", "timm_tresnet"):
        folded = fold_batch_norms(model)
    with torch.no_grad():
        expected = model(x)
        assert relative_error(expected, plain(x)) > 1e-3
        assert relative_error(folded(x), expected) <= 1e-5
        assert relative_error(model(x), expected) == 0
        if alter is not prune_weights:  # deepcopy refuses it
            assert relative_error(reparameterize_model(model)(x), expected) <= 1e-5
    left = [name for name, module in folded.named_modules() if isinstance(module, ConvNormAct)]
    units = sum(isinstance(module, ConvNormAct) for module in model.modules())
    assert (left == []) == (alter in WHOLE)
    assert len(left) < units
    assert all(name in caplog.text for name in left)


def test_queries_with_hooks_are_not_folded():
    model = timm.create_model("test_tresnet", head="ml_decoder", decoder_embedding=16).eval()
    model.head.queries.norm.register_forward_hook(lambda module, args, output: output * 0.5)
    folded = fold_batch_norms(model)
    assert not isinstance(folded.head.queries, FoldedQueries)
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_queries_are_folded_where_no_batch_norm_is():
    model = timm.create_model("test_tresnet", norm_layer="groupnorm1", head="ml_decoder", decoder_embedding=16).eval()
    folded = copy_folded(model)
    assert isinstance(folded.head.queries, FoldedQueries)
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_folding_a_folded_network_changes_nothing():
    once = fold_batch_norms(make_small())
    torch.testing.assert_close(fold_batch_norms(once).state_dict(), once.state_dict(), rtol=0, atol=0)


def test_folded_network_can_be_pickled_copied_scripted_traced_and_moved():
    folded = fold_batch_norms(make_small())
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = folded(x)
        for copied in (pickle.loads(pickle.dumps(folded)), copy.deepcopy(folded)):
            torch.testing.assert_close(copied(x), expected)
        with warnings.catch_warnings():  # PyTorch announces the end of TorchScript
            warnings.filterwarnings("ignore", message="`torch.jit.* is deprecated")
            torch.testing.assert_close(torch.jit.script(folded)(x), expected)
            torch.testing.assert_close(torch.jit.trace(folded, x)(x), expected)
        torch.testing.assert_close(torch.fx.symbolic_trace(folded.body.layer1)(torch.rand(1, 64, 8, 8)).shape[1], 64)
        assert relative_error(folded.double()(x.double()).float(), expected) <= 1e-5
        assert folded.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        assert folded.to("meta")(x.bfloat16().to("meta")).shape == (2, 10)


def test_state_dict_of_a_folded_network_loads_into_another():
    folded, other = fold_batch_norms(make_small()), fold_batch_norms(make_small())
    buffer = io.BytesIO()
    torch.save(folded.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(other(x), folded(x))
    assert "FoldedConvNormAct(\n" in repr(folded)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_optimized_network_computes_the_same(dynamic, monkeypatch):
    model = make_small()
    compiler = torch.compile

    def compile_without_code(network, fullgraph, dynamic, mode):
        assert mode is None  # on the CPU
        return compiler(network, fullgraph=fullgraph, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_without_code)
    optimized = optimize_for_inference(model, dynamic=dynamic)
    for shape in [(2, 3, 64, 64), (3, 3, 64, 96)]:
        x = torch.rand(shape)
        y = optimized(x)
        assert not y.requires_grad
        assert relative_error(y, model(x).detach()) <= 1e-5

import warnings

import pytest
import timm
import torch
from comparing import (
    SMALL,
    assert_same,
    collect,
    compare,
    each_setting,
    images,
    make_model,
    saved_bytes,
    train_step,
)

from timm_tresnet import TResNet
from timm_tresnet.recompute.stage import Stage


@pytest.mark.parametrize(
    ("variant", "bounds"),
    [
        ("tresnet_m", {"activations": 0.49, "expansions": 0.34}),
        pytest.param("tresnet_xl", {"activations": 0.50, "expansions": 0.34}, marks=pytest.mark.thorough),
        ("tresnet_v2_l", {"activations": 0.52, "expansions": 0.34}),
    ],
)
def test_variant_keeps_a_fraction_of_what_the_builtin_network_keeps(variant, bounds):
    import timm.models.tresnet

    x = torch.empty(1, 3, 224, 224, device="meta")
    with torch.device("meta"):
        model = timm.create_model(variant)
        builtin = getattr(timm.models.tresnet, variant)()
    whole = saved_bytes(builtin, x)
    for setting, bound in bounds.items():
        model.set_recompute(setting)
        assert saved_bytes(model, x) <= bound * whole
    model.set_recompute("none")
    assert saved_bytes(model, x) == whole


def test_paper_network_keeps_less_than_half_in_megabytes():
    with torch.device("meta"):
        model = timm.create_model("tresnet_m")
    x = torch.empty(2, 3, 224, 224, device="meta")
    assert saved_bytes(model, x) / 2e6 <= 34.5
    model.set_recompute("expansions")
    assert saved_bytes(model, x) / 2e6 <= 26


@pytest.mark.parametrize(
    "variant",
    [
        "tresnet_m",
        "tresnet_v2_l",
        pytest.param("tresnet_xl", marks=pytest.mark.thorough),
    ],
)
def test_checkpointing_keeps_the_output_of_every_second_block_and_little_else(variant):
    x = torch.empty(1, 3, 224, 224, device="meta")
    with torch.device("meta"):
        model = timm.create_model(variant, recompute="none")
    whole = saved_bytes(model, x)
    outputs, handles = [], []
    for stage in model.body[-4:]:
        for block in list(stage)[::-2]:
            handles.append(
                block.register_forward_hook(lambda module, inputs, y: outputs.append(y.untyped_storage().nbytes()))
            )
    model(x)
    for handle in handles:
        handle.remove()
    least = sum(outputs)
    model.set_recompute("activations")
    model.set_grad_checkpointing()
    assert least <= saved_bytes(model, x) <= 0.17 * whole


@each_setting
def test_stochastic_depth_keeps_no_more(setting):
    plain = saved_bytes(make_model(setting), images())
    assert saved_bytes(make_model(setting, drop_path_rate=0.2), images()) <= 1.01 * plain


def test_checkpointing_runs_blocks_with_other_norms_again():
    model = make_model("checkpointing", norm_layer="groupnorm1")
    assert saved_bytes(model, images()) < saved_bytes(make_model(norm_layer="groupnorm1"), images()) / 3


@pytest.mark.parametrize("setting", ["activations", "expansions"])
def test_grad_checkpointing_composes_with_recomputing(setting):
    def run(model):
        if model.recompute == setting:
            model.set_grad_checkpointing()
        return train_step(model, images())

    compare(run, setting)


@each_setting
def test_training_traced_by_torchscript_gives_the_same_numbers(setting):
    def run(model):
        with warnings.catch_warnings():  # PyTorch announces the end of TorchScript
            warnings.filterwarnings("ignore", message="`torch.jit.* is deprecated")
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # of torch.nn.functional.batch_norm
            return train_step(torch.jit.trace(model, images(), check_trace=False), images())

    compare(run, setting, layers=(1, 1, 2, 1))


@pytest.mark.parametrize("kwargs", [{"recompute": "none"}, {"norm_layer": "groupnorm1"}], ids=["none", "other_norm"])
def test_checkpoints_run_again_in_each_backward_of_a_retained_graph_and_count_once(kwargs):
    def run(checkpointing):
        torch.manual_seed(0)
        model = TResNet(**{**SMALL, **kwargs})
        model.set_grad_checkpointing(checkpointing)
        loss = model(images()).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        return collect(model, loss)

    assert_same(run(True), run(False))


def test_slices_of_the_body_keep_its_settings():
    model = make_model("expansions")
    model.set_grad_checkpointing()
    model.body.layer3[1].eval()
    part, stage = model.body[:4], model.body.layer3[2:]
    assert (type(part), part.recompute, part.layer1.grad_checkpointing) == (type(model.body), "expansions", True)
    assert (type(stage), stage.recompute, stage.grad_checkpointing) == (Stage, "expansions", True)
    assert part.training
    assert not model.body.layer3[:2][1].training

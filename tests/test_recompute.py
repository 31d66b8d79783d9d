import contextlib
import copy
import gc
import pickle
import threading
import warnings

import pytest
import torch
from comparing import (
    RECOMPUTING,
    assert_same,
    collect,
    compare,
    images,
    make_model,
    saved_bytes,
    train_step,
)
from torch import nn

from timm_tresnet.models.layers import ActivatedBatchNorm2d
from timm_tresnet.recompute.run import Run
from timm_tresnet.recompute.saved import Recomputed

# Checkpointing, too, has its tests by default in the files tests/test_recompute_*.py.
each_setting = pytest.mark.parametrize(
    "setting", [pytest.param(each, marks=[] if each == "activations" else pytest.mark.thorough) for each in RECOMPUTING]
)


@each_setting
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.thorough)], ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"v2": True},
        {"stem": "conv7x7"},
        {"aa_layer": False, "use_se": True},
        {"output_stride": 8},
        {"drop_path_rate": 0.3},
        {"norm_layer": "groupnorm1"},
    ],
    ids=["m", "v2", "conv7x7", "strided", "dilated", "drop_path", "other_norm"],
)
def test_recomputing_changes_no_number(setting, dtype, kwargs):
    compare(lambda model: train_step(model, images(dtype=dtype)), setting, dtype=dtype, **kwargs)


@pytest.mark.parametrize(
    "act_layer",
    [
        *("leaky_relu", "silu", "prelu"),
        *(
            pytest.param(name, marks=pytest.mark.thorough)
            for name in ("relu", "gelu", "mish", "elu", "hard_swish", "hard_sigmoid", "relu6", "tanh", "selu")
        ),
    ],
)
def test_any_activation_can_be_recomputed(act_layer):
    compare(lambda model: train_step(model, images()), "activations", act_layer=act_layer)


def test_channels_last_and_half_precision_change_no_loss():
    for make in (
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: model.bfloat16(),
    ):
        compare(
            lambda model, make=make: train_step(make(model), images().to(next(model.parameters()).dtype)), "activations"
        )


@each_setting
def test_autocast_changes_no_loss(setting):
    def run(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(images()).float().square().mean()
        loss.backward()
        return collect(model, loss)

    results = [run(make_model(each)) for each in (setting, "none")]
    assert_same(*results)


@pytest.fixture
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic_algorithms")
def test_seeded_training_with_deterministic_algorithms_gives_identical_weights():
    def train(setting):
        model = make_model(setting, drop_path_rate=0.3, drop_rate=0.2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        generator = torch.Generator().manual_seed(3)
        torch.manual_seed(4)
        for _ in range(3):
            x, labels = torch.randn(4, 3, 64, 64, generator=generator), torch.randint(10, (4,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
        return model.state_dict()

    first, *others = [train(setting) for setting in ["none", "none", *RECOMPUTING, "activations"]]
    assert not torch.equal(first["head.fc.weight"], make_model().state_dict()["head.fc.weight"])
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


@each_setting
def test_hooks_around_the_network_win(setting):
    from torch.utils.checkpoint import checkpoint

    model = make_model(setting)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: seen.append(tensor.shape) or tensor, lambda tensor: tensor
    ):
        model(images())
    assert (2, 16, 16, 16) in seen

    def run(model):
        logits = checkpoint(
            model.forward_head, checkpoint(model.body, images(), use_reentrant=False), use_reentrant=False
        )
        logits.square().mean().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    torch.testing.assert_close(run(model), run(make_model("none")), rtol=0, atol=0)
    whole, checkpointed = nn.Sequential(model), nn.Sequential(make_model("none"))
    checkpointed.forward = lambda x: checkpoint(checkpointed[0], x, use_reentrant=False)
    assert saved_bytes(checkpointed, images()) < saved_bytes(whole, images()) / 2


@each_setting
def test_hooks_that_replace_or_edit_outputs_are_respected(setting):
    def run(model):
        model.body.layer1[0].conv1.bn.register_forward_hook(lambda module, inputs, output: output * 1.5)
        model.body.layer2[0].register_forward_hook(lambda module, inputs, output: output + 0.1)
        model.body.layer3[1].conv1.register_forward_hook(lambda module, inputs, output: output.clone().mul_(0.5))
        model.body.layer3[2].conv2.conv.register_forward_hook(lambda module, inputs, output: output.add_(0.2))
        model.body.layer3[3].se.register_forward_hook(lambda module, inputs, output: output.flip(1))
        model.body.layer3[4].conv3.conv.register_forward_hook(lambda module, inputs, output: output * 1.1)
        model.body.layer3[4].conv2.conv.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.9,))
        model.body.layer3[5].conv1.bn.act.register_forward_hook(lambda module, inputs, output: output - 0.1)
        model.body.layer3[5].act.register_forward_hook(lambda module, inputs, output: output * 1.2)
        return train_step(model, images())

    compare(run, setting)


@each_setting
def test_modules_of_users_between_ours_are_respected(setting):
    def run(model):
        layer = model.body.layer3[1]
        layer.conv1 = nn.Sequential(layer.conv1, nn.Softplus(), nn.Dropout(0.2))
        model.body.layer3[2].act = nn.LeakyReLU(0.1, inplace=True)
        model.body.layer3[4].conv3.conv = nn.utils.parametrizations.weight_norm(model.body.layer3[4].conv3.conv)
        model.body.layer2.append(nn.Conv2d(32, 32, 3, padding=1, device="cpu"))
        nn.init.ones_(model.body.layer2[-1].weight)
        nn.init.zeros_(model.body.layer2[-1].bias)
        return train_step(model, images())

    compare(run, setting)


@each_setting
def test_edit_of_a_needed_activation_is_an_error(setting):
    model = make_model(setting)
    kept = []
    model.body.layer3[1].conv1.conv.register_forward_hook(lambda module, inputs, output: kept.append(output))
    loss = model(images()).sum()
    kept[0].data.add_(0)  # unseen by autograd
    with torch.no_grad():
        kept[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_setting
def test_two_forwards_before_one_backward(setting):
    def run(model):
        loss = model(images()).square().mean() + model(images().flip(0, 3)).square().mean()
        loss.backward()
        return collect(model, loss)

    compare(run, setting)


@each_setting
def test_two_networks_trained_in_turns(setting):
    def run(model):
        other = make_model(setting, seed=9)
        x = images()
        first, second = model(x), other(x)
        loss = (first * second.detach()).mean() + (
            model(second.detach()[:, :3, None, None].expand(-1, -1, 32, 32))
        ).mean()
        second.sum().backward()
        loss.backward()
        return collect(model, loss)

    compare(run, setting)


@each_setting
def test_backward_twice_through_a_retained_graph(setting):
    def run(model):
        loss = model(images()).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        return collect(model, loss)

    compare(run, setting)


@each_setting
def test_loss_on_intermediate_features(setting):
    def run(model):
        final, features = model.forward_intermediates(images())
        loss = sum(feature.square().mean() for feature in features) + final.mean()
        loss.backward()
        return collect(model, loss)

    compare(run, setting)


@each_setting
def test_gradients_of_some_parameters_only(setting):
    def run(model):
        output = model(images())
        wanted = [model.body.layer2[0].conv1.bn.weight, model.body.conv1.conv.weight]
        grads = torch.autograd.grad(output.sum(), wanted)
        return {"loss": output.detach(), "grad of some": torch.cat([grad.flatten() for grad in grads])}

    compare(run, setting)


@each_setting
def test_accumulated_gradients(setting):
    def run(model):
        train_step(model, images())
        return train_step(model, images().flip(2))

    compare(run, setting)


@each_setting
@pytest.mark.parametrize("freeze", ["eval", "weights", "timm", "stem"])
def test_frozen_parts(setting, freeze):
    from timm.layers import freeze_batch_norm_2d

    def run(model):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and freeze == "eval":
                module.eval()
            if isinstance(module, nn.BatchNorm2d) and freeze == "weights":
                module.requires_grad_(False)
        if freeze == "timm":
            model.body.layer1 = freeze_batch_norm_2d(model.body.layer1)
        if freeze == "stem":
            model.body[:3].requires_grad_(False)
        return train_step(model, images())

    compare(run, setting)


@each_setting
@pytest.mark.parametrize("settings", [{"momentum": None}, {"track_running_stats": False}, {"affine": False}], ids=str)
def test_other_settings_of_batch_norm(setting, settings):
    def run(model):
        block = model.body.layer3[1]
        old = block.conv1.bn
        block.conv1.bn = ActivatedBatchNorm2d(old.num_features, act_layer=nn.LeakyReLU, **settings)
        return train_step(model, images())

    compare(run, setting)


@each_setting
def test_functional_call_and_copies_in_the_middle_of_training(setting):
    def run(model):
        output = model(images())
        twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        output.sum().backward()
        parameters = {name: parameter.detach().clone().requires_grad_() for name, parameter in twin.named_parameters()}
        loss = torch.func.functional_call(twin, parameters, images()).square().mean()
        loss.backward()
        grads = {f"grad of {name} by call": parameter.grad for name, parameter in parameters.items()}
        return {**train_step(thawed, images()), **grads}

    compare(run, setting)


@each_setting
def test_no_grad_and_inference_mode_record_nothing(setting):
    model, plain = make_model(setting), make_model("none")
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(model(images()), plain(images()), rtol=0, atol=0)


@each_setting
def test_threads_do_not_share_tapes(setting):
    models = [make_model(setting, seed=seed) for seed in range(4)]
    expected = [train_step(copy.deepcopy(model), images()) for model in models]
    actual = [None] * 4

    def work(index):
        actual[index] = train_step(models[index], images())

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(actual, expected, strict=True):
        assert_same(got, want)


def live_bytes():
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def count_recomputed():
    return sum(type(thing) in (Recomputed, Run) for thing in gc.get_objects())


@each_setting
def test_memory_returns_after_a_step_a_lost_forward_and_an_exception(setting):
    gc.collect()
    gc.freeze()  # so that nothing is counted that other tests have left
    model = make_model(setting)
    x = images()
    train_step(model, x)
    level = live_bytes()
    recomputed = count_recomputed()
    train_step(model, x)
    assert live_bytes() <= level
    model(x)  # no backward
    assert live_bytes() <= level
    handle = model.body.layer3[2].register_forward_hook(lambda *_: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):  # pytest.raises would keep the frames and what is in them
        model(x)
        pytest.fail("the hook did not run")
    handle.remove()
    assert live_bytes() <= level
    assert count_recomputed() <= recomputed
    assert train_step(model, x)["loss"].isfinite()


@each_setting
@pytest.mark.parametrize(
    "kwargs",
    [{}, *(pytest.param(each, marks=pytest.mark.thorough) for each in ({"aa_layer": False}, {"act_layer": "silu"}))],
    ids=["blurred", "strided", "silu"],
)
def test_double_backward_is_right(setting, kwargs):
    def run(model):
        x = images(dtype=torch.float64).requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        loss = grad.square().sum()
        loss.backward()
        return {
            **collect(model, loss),
            "loss": grad.detach().new_zeros(()),
            "grad of loss": loss.detach(),
            "grad": grad.detach(),
        }

    compare(run, setting, dtype=torch.float64, **kwargs)


@pytest.mark.parametrize("aa_layer", [True, False])
def test_forward_mode_is_right(aa_layer):
    from torch.autograd import forward_ad

    def run(model):
        with forward_ad.dual_level(), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="`torch.jit", category=FutureWarning
            )  # PyTorch's own, in its rules
            output = model(forward_ad.make_dual(images(), torch.ones(2, 3, 64, 64)))
            return forward_ad.unpack_dual(output).tangent

    models = [make_model(setting, aa_layer=aa_layer) for setting in ("activations", "none")]
    torch.testing.assert_close(*map(run, models), rtol=0, atol=0)


@each_setting
def test_split_batch_norm_gives_the_same_numbers(setting):
    from timm.layers import convert_splitbn_model

    compare(lambda model: train_step(convert_splitbn_model(model, 2), images(4)), setting)

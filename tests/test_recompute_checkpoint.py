"""User-defined checkpoints and saved-tensor hooks, in and around the network."""

import contextlib
import functools

import torch
from comparing import collect, train_step
from torch import nn
from torch.utils.checkpoint import checkpoint
from users import (
    inputs,
    same_as_plain,
)

from timm_tresnet.models.blocks import BasicBlock, ResidualBlock
from timm_tresnet.models.layers import ActivatedBatchNorm2d, ConvNormAct
from timm_tresnet.recompute.stage import Stage


def _checkpoint_wrapped(kinds):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    def apply(model):
        apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, kinds))

    return apply


def wrap_units(model):
    _checkpoint_wrapped(ConvNormAct)(model)


def wrap_blocks(model):

    _checkpoint_wrapped(ResidualBlock)(model)


def wrap_stages(model):
    _checkpoint_wrapped(Stage)(model)


def wrap_norms(model):
    _checkpoint_wrapped(ActivatedBatchNorm2d)(model)


def wrap_convs(model):
    _checkpoint_wrapped(nn.Conv2d)(model)


def wrap_body(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.body = checkpoint_wrapper(model.body)


def wrap_some_blocks(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for i in (1, 3):
        model.body.layer3[i] = checkpoint_wrapper(model.body.layer3[i])


def wrap_reentrant_blocks(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

    for i in (1, 3):
        model.body.layer3[i] = checkpoint_wrapper(model.body.layer3[i], CheckpointImpl.REENTRANT)


def offload_blocks(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import offload_wrapper

    for i in (1, 3):
        model.body.layer3[i] = offload_wrapper(model.body.layer3[i])
        model.body.layer2[i // 3].conv1 = offload_wrapper(model.body.layer2[i // 3].conv1)


def composable(kind):
    def apply(model):
        from torch.distributed._composable import checkpoint as composable_checkpoint

        for m in list(model.modules()):
            if isinstance(m, kind):
                composable_checkpoint(m)

    apply.__name__ = f"composable_{kind.__name__}"
    return apply


def composable_some_blocks(model):
    from torch.distributed._composable import checkpoint as composable_checkpoint

    for i in (1, 3):
        composable_checkpoint(model.body.layer3[i])


def forward_in_checkpoint(kind, reentrant):
    def apply(model):
        for m in list(model.modules()):
            if isinstance(m, kind):
                m.forward = functools.partial(checkpoint, m.forward, use_reentrant=reentrant)

    apply.__name__ = f"forward_{kind.__name__}_{'reentrant' if reentrant else 'not'}"
    return apply


WRAPPERS = [wrap_units, wrap_blocks, wrap_stages, wrap_norms, wrap_convs, wrap_body, wrap_some_blocks,
            wrap_reentrant_blocks, offload_blocks, composable(ConvNormAct), composable(BasicBlock), composable(Stage),
            composable(ActivatedBatchNorm2d), composable_some_blocks, *(forward_in_checkpoint(k, r) for k in
            (ConvNormAct, BasicBlock, Stage, ActivatedBatchNorm2d) for r in (True, False))]  # fmt: skip


# Around a checkpoint of ours, theirs count statistics as often as they run it: plain PyTorch counts more often.
NOT_CHECKPOINTING = ["activations", "expansions"]


@same_as_plain(*WRAPPERS, settings=NOT_CHECKPOINTING)
def test_checkpoint_of_others(wrap, model):
    wrap(model)
    return train_step(model, inputs())


@same_as_plain(
    *(wrap for wrap in WRAPPERS if "composable" not in wrap.__name__), settings=NOT_CHECKPOINTING, in_turn=True
)  # those run backward once
def test_checkpoint_of_others_twice(wrap, model):
    wrap(model)
    x = inputs().requires_grad_()
    loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    return {**collect(model, loss), "image": x.grad}


@same_as_plain(True, False)
def test_checkpoint_around(reentrant, model):
    x = inputs().requires_grad_()
    loss = checkpoint(model, x, use_reentrant=reentrant).square().mean()
    loss.backward()
    return collect(model, loss)


@same_as_plain(True, False, settings=NOT_CHECKPOINTING)
def test_checkpoint_sequential(reentrant, model):
    x = torch.utils.checkpoint.checkpoint_sequential(model.body, 3, inputs().requires_grad_(), use_reentrant=reentrant)
    loss = x.square().mean()
    loss.backward()
    return collect(model, loss)


@same_as_plain("identity", "clone", "cpu", "disabled", "disabled_inside", "mutation")
def test_saved_hooks_around(kind, model):
    contexts = {
        "identity": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        "clone": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
        "cpu": torch.autograd.graph.save_on_cpu,
        "disabled": lambda: torch.autograd.graph.disable_saved_tensors_hooks("no hooks"),
        "disabled_inside": contextlib.nullcontext,
        "mutation": torch.autograd.graph.allow_mutation_on_saved_tensors,
    }
    if kind == "disabled_inside":
        inner = model.body.layer3[2].forward

        def forward(x):
            with torch.autograd.graph.disable_saved_tensors_hooks("no hooks"):
                return inner(x)

        model.body.layer3[2].forward = forward
    with contexts[kind]():
        return train_step(model, inputs())


@same_as_plain(True, False)
def test_saved_hooks_disabled(training, model):
    model.train(training)
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks"):
        return train_step(model, inputs())


@same_as_plain()
def test_eval_mode(model):
    model.eval()
    return train_step(model, inputs())

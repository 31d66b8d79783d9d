"""User-defined hooks on modules and tensors, and edits of the tensors that hooks have received."""

import torch
from comparing import RECOMPUTING, collect, train_step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from users import EDITS, FREED, MODIFIED, Steeper, edit_data, inputs, same_as_plain, step_after


def kept(y):
    return y


def targets(model):
    block = model.body.layer3[2]
    return {
        "conv": block.conv1.conv,
        "conv3": block.conv3.conv,
        "norm": block.conv1.bn,
        "norm3": block.conv3.bn,
        "act": block.conv1.bn.act,
        "drop": block.conv1.bn.drop,
        "unit": block.conv1,
        "unit3": block.conv3,
        "se": block.se,
        "sum_act": block.act,
        "shortcut": model.body.layer3[0].downsample,
        "block": block,
        "last_block": model.body.layer3[-1],
        "first_block": model.body.layer3[0],
        "basic": model.body.layer2[0],
        "blur": model.body.layer2[0].conv1.aa,
        "pool": model.body.layer3[0].downsample[0],
        "stage": model.body.layer3,
        "stage1": model.body.layer1,
        "stem": model.body.conv1,
        "body": model.body,
    }


TARGETS = [
    "unit3",
    "block",
    "norm",
    "stage",
    "conv",
    "conv3",
    "norm3",
    "act",
    "unit",
    "se",
    "sum_act",
    "shortcut",
    "last_block",
    "first_block",
    "basic",
    "blur",
    "pool",
    "stage1",
    "stem",
    "body",
]


def out_of_place(model):
    """Turn off in-place activations, which PyTorch refuses after backward hooks."""
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False


def hook_returns(m, a, y):
    return y * 1.5


def hook_edits(m, a, y):
    y.mul_(1.5)


def hook_edits_no_grad(m, a, y):
    with torch.no_grad():
        y.mul_(1.5)


def hook_edits_detached(m, a, y):
    y.detach().mul_(1.5)


def hook_edits_data(m, a, y):
    y.data.mul_(-1.5)


def hook_edits_data_returns(m, a, y):
    y.data.mul_(-1.5)
    return y + 0


def hook_edits_no_grad_returns(m, a, y):
    with torch.no_grad():
        y.mul_(-1.5)
    return y + 0


def hook_edits_input_data(m, a, y):
    a[0].data.mul_(-1.5)


def hook_edits_input_no_grad(m, a, y):
    with torch.no_grad():
        a[0].mul_(-1.5)


def hook_clones(m, a, y):
    return y.clone()


def hook_detaches(m, a, y):
    return y.detach().requires_grad_()


def hook_tensor_hook(m, a, y):
    y.register_hook(lambda g: g * 2)


def hook_backward(m, a, y):
    y.square().mean().backward(retain_graph=True)


def hook_backward_local(m, a, y):
    y.square().mean().backward()
    return y.detach().requires_grad_()


HOOKS = [
    hook_returns,
    hook_edits,
    hook_edits_no_grad,
    hook_edits_detached,
    hook_edits_data,
    hook_edits_data_returns,
    hook_edits_no_grad_returns,
    hook_edits_input_data,
    hook_edits_input_no_grad,
    hook_clones,
    hook_detaches,
    hook_tensor_hook,
    hook_backward,
    hook_backward_local,
]


EDITING = (hook_edits, hook_edits_no_grad, hook_edits_detached, hook_edits_no_grad_returns)
IN_A_BLOCK = ("unit3", "norm", "conv", "conv3", "norm3", "act", "unit", "se", "blur", "pool", "shortcut")
ACTIVATED = ("block", "norm", "stage", "act", "unit", "sum_act", "last_block", "first_block", "basic", "stage1", "stem")
ACTIVATED += ("body",)  # what comes out is what an activation has saved


def is_refused(hook, target):
    """Whether plain PyTorch sees what the hook does, and needs what it has changed or freed."""
    if hook is hook_backward_local:
        return target in IN_A_BLOCK
    if hook is hook_edits_input_no_grad:
        return target != "body"  # whose input are the images
    return hook in EDITING and target in ACTIVATED


@same_as_plain(
    *((hook, target) for target in TARGETS for hook in HOOKS),
    few=len(HOOKS),
    in_turn=True,
    raises=f"{MODIFIED}|{FREED}",
    when=is_refused,
)
def test_forward_hook(hook, target, model):
    targets(model)[target].register_forward_hook(hook)
    return train_step(model, inputs())


@same_as_plain(
    *((edit, target) for target in TARGETS for edit in EDITS[:2]),
    few=4,
    in_turn=True,
    raises=MODIFIED,
    when=lambda edit, target: edit is not edit_data and target not in ("unit3", "norm3", "shortcut"),
)
def test_seen_and_edited_later(edit, target, model):
    seen = []
    targets(model)[target].register_forward_hook(lambda m, a, y: seen.append(y))
    return step_after(model, lambda _: edit(seen))


@same_as_plain(
    *((keep, target) for target in ("conv", "conv3") for keep in (kept, torch.Tensor.detach, torch.Tensor.flatten)),
    few=6,
)
def test_output_of_a_convolution_that_is_kept_and_edited_later(keep, target, model):
    """By its data, which PyTorch does not see: nothing may be recomputed from memory that user code has."""
    seen = []
    targets(model)[target].register_forward_hook(lambda m, a, y: seen.append(keep(y)))
    return step_after(model, lambda _: edit_data(seen))


@same_as_plain(
    *((edit, target) for target in ("stage", "block", "norm", "body", "stage1") for edit in EDITS[:2]),
    raises=MODIFIED,
    when=lambda edit, target: edit is not edit_data,
)
def test_seen_replaced_and_edited_later(edit, target, model):
    seen = []

    def hook(m, a, y):
        seen.append(y)
        return y * 1.5

    targets(model)[target].register_forward_hook(hook)
    return step_after(model, lambda _: edit(seen))


@same_as_plain(
    *((edit, target) for target in ("stage", "block", "norm", "conv", "unit3", "stage1") for edit in EDITS[:2]),
    raises=MODIFIED,
    when=lambda edit, target: edit is not edit_data,
)
def test_input_seen_and_edited_later(edit, target, model):
    seen = []
    targets(model)[target].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    return step_after(model, lambda _: edit(seen))


@same_as_plain(
    *(
        (kind, target)
        for target in ("conv", "norm", "unit", "block", "stage", "act")
        for kind in ("returns", "no_grad", "data")
    ),
    raises=MODIFIED,
    when=lambda name, target: name == "no_grad" and target not in ("norm", "act"),
)
def test_pre_hook(name, target, model):
    def hook(m, a):
        if name == "returns":
            return (a[0] * 1.5,)
        if name == "no_grad":
            a[0].detach().mul_(1.5)
        else:
            a[0].data.mul_(1.5)

    targets(model)[target].register_forward_pre_hook(hook)
    return train_step(model, inputs())


@same_as_plain(*((kind, target) for target in ["drop", *TARGETS] for kind in ("full", "full_pre", "old")), in_turn=True)
def test_backward_hook(name, target, model):
    out_of_place(model)
    calls = []
    m = targets(model)[target]

    def double(m, grads, *_):
        calls.append(1)
        return tuple(None if g is None else g * 2 for g in grads)

    if name == "full":
        m.register_full_backward_hook(double)
    elif name == "full_pre":
        m.register_full_backward_pre_hook(double)
    else:
        m.register_backward_hook(lambda m, gi, go: calls.append(1))
    return {**train_step(model, inputs()), "calls": torch.tensor(len(calls))}


@same_as_plain("forward", "pre", "backward", "backward_pre")
def test_global_hooks(kind, model):
    out_of_place(model)
    calls = []
    g = nn.modules.module
    if kind == "forward":
        handle = g.register_module_forward_hook(lambda m, a, y: calls.append(type(m).__name__))
    elif kind == "pre":
        handle = g.register_module_forward_pre_hook(lambda m, a: calls.append(type(m).__name__))
    elif kind == "backward":
        handle = g.register_module_full_backward_hook(lambda m, gi, go: calls.append(type(m).__name__))
    else:
        handle = g.register_module_full_backward_pre_hook(lambda m, go: calls.append(type(m).__name__))
    try:
        return {**train_step(model, inputs()), "calls": torch.tensor(len(calls))}
    finally:
        handle.remove()


@same_as_plain(settings=RECOMPUTING)
def test_hooks_are_called_as_often(model):
    calls = []
    for name, m in model.named_modules():
        if "layer3.2" in name or "layer1.1" in name or name in ("body", "body.layer2"):
            m.register_forward_hook(lambda m, a, y: calls.append(1))
    return {**train_step(model, inputs()), "calls": torch.tensor(len(calls))}


@same_as_plain("parameter", "accumulate", "grad_fn")
def test_tensor_hooks(kind, model):
    handles = []
    for p in model.parameters():
        if kind == "parameter":
            p.register_hook(lambda g: g * 2)
        elif kind == "accumulate":
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad * 2))
    y = model(inputs())
    if kind == "grad_fn":
        node, seen = y.grad_fn, 0
        while node is not None and seen < 200:
            handles.append(node.register_hook(lambda gi, go: None))
            node = next((n for n, _ in node.next_functions if n is not None), None)
            seen += 1
    loss = y.square().mean()
    loss.backward()
    return collect(model, loss)


@same_as_plain(torch.optim.SGD, torch.optim.AdamW)
def test_optimizer_in_backward(cls, model):
    optimizers = {p: cls([p], lr=0.01) for p in model.parameters()}

    def update(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update)
    train_step(model, inputs())
    result = train_step(model, inputs())
    return {**result, **{k: v.clone() for k, v in model.state_dict().items()}}


@same_as_plain(*EDITS, raises=MODIFIED, when=lambda edit: edit is not edit_data)
def test_identity_in_hooked_stage(edit, model):
    model.body.layer3.append(nn.Identity())
    seen = []
    model.body.layer3.register_forward_hook(lambda m, a, y: seen.append(y))
    return step_after(model, lambda _: edit(seen))


class SteeperBelow(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.leaky_relu.default:
            return function(args[0], 0.3)
        return function(*args, **(kwargs or {}))


class GlobalHook:
    def __enter__(self):
        self.handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, y: y * 1.5 if type(module) is nn.Conv2d else None
        )

    def __exit__(self, *exception):
        self.handle.remove()


def negated():
    return torch.autograd.graph.saved_tensors_hooks(torch.neg, torch.neg)


OPENED = [
    (opened, *where)
    for where in (("layer1", "layer4"), ("layer3.1", "layer3.3"))
    for opened in (Steeper, SteeperBelow, GlobalHook, negated)
]


@same_as_plain(*OPENED, few=8)
def test_what_one_hook_opens_and_another_closes(opened, first, last, model):
    context = opened()

    def enter(*_):
        context.__enter__()

    def leave(*_):
        context.__exit__(None, None, None)

    model.body.get_submodule(first).register_forward_pre_hook(enter)
    model.body.get_submodule(last).register_forward_hook(leave)
    calls = torch.zeros(())
    model.body.layer3[4].register_forward_hook(lambda *_: calls.add_(1) and None)
    return {**train_step(model, inputs()), "calls": calls}

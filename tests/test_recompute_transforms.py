"""Transforms of torch.func, derivatives of derivatives, forward mode and the compiler."""

import torch
import torch.nn.functional as F
from comparing import collect, train_step
from torch import nn
from users import another, inputs, same_as_plain, units

# A derivative of a derivative adds up what it recomputes in another order than plain PyTorch does.
DOUBLE = 1e-6


def parameters(model):
    return {k: v.detach() for k, v in model.named_parameters()}, {k: v.clone() for k, v in model.named_buffers()}


def call(model, p, b, x):
    return torch.func.functional_call(model, (p, {k: v.clone() for k, v in b.items()}), (x,))


@same_as_plain(
    "grad", "vjp", "per_sample", "jvp", "jacrev", "hessian", "linearize", "vmap", "grad_eval", "per_sample_eval"
)
def test_func(kind, model):
    if kind in ("per_sample", "vmap"):
        model = another(model, norm_layer="groupnorm1")
    if kind in ("jvp", "hessian", "linearize"):
        model = another(model, aa_layer=False, layers=(1, 1, 1, 1))
    if kind.endswith("_eval"):
        model.eval()
    p, b = parameters(model)
    x = inputs()

    def loss(p, x):
        return call(model, p, b, x).square().mean()

    if kind.startswith("grad"):
        return torch.func.grad(loss)(p, x)
    if kind == "vjp":
        y, pull = torch.func.vjp(lambda p: call(model, p, b, x), p)
        return {**pull(torch.ones_like(y))[0], "y": y.detach()}
    if kind.startswith("per_sample"):
        return torch.func.vmap(torch.func.grad(lambda p, x: loss(p, x[None])), (None, 0), randomness="different")(p, x)
    if kind == "vmap":
        return {"y": torch.func.vmap(lambda x: call(model, p, b, x[None]), randomness="different")(x).detach()}
    if kind == "jvp":
        y, t = torch.func.jvp(lambda x: call(model, p, b, x), (x,), (torch.ones_like(x),))
        return {"y": y.detach(), "t": t.detach()}
    if kind == "jacrev":
        w = "head.fc.bias"
        return {"j": torch.func.jacrev(lambda v: call(model, {**p, w: v}, b, x))(p[w])}
    if kind == "hessian":
        w = "body.layer4.0.conv1.bn.bias"
        v = torch.func.grad(lambda v: torch.func.grad(lambda v: loss({**p, w: v}, x))(v).sum())(p[w])
        return {"h": v}
    y, t = torch.func.linearize(lambda x: call(model, p, b, x), x)
    return {"y": y.detach(), "t": t(torch.ones_like(x)).detach()}


@same_as_plain()
def test_func_ensemble(model):
    models = [another(model, norm_layer="groupnorm1", seed=s) for s in range(2)]
    p, b = torch.func.stack_module_state(models)
    y = torch.func.vmap(lambda p, b: call(models[0], p, b, inputs()), randomness="different")(p, b)
    y.square().mean().backward()
    return {"y": y.detach(), **{k: v.grad for k, v in p.items()}}


@same_as_plain()
def test_functional_call_of_leaves(model):
    p, b = parameters(model)
    p = {k: v.clone().requires_grad_() for k, v in p.items()}
    loss = call(model, p, b, inputs()).square().mean()
    loss.backward()
    return {"loss": loss.detach(), **{k: v.grad for k, v in p.items()}, **b}


@same_as_plain({}, {"aa_layer": False}, {"norm_layer": "groupnorm1"}, {"act_layer": "silu"})
def test_grads_batched(kwargs, model):
    model = another(model, **kwargs)
    y = model(inputs())
    p = [model.body.layer2[0].conv1.bn.weight, model.body.layer3[2].conv2.conv.weight]
    grads = torch.autograd.grad(y, p, torch.randn(3, *y.shape), is_grads_batched=True)
    return {"y": y.detach(), **{str(i): g for i, g in enumerate(grads)}}


@same_as_plain(*((v, t) for v in (True, False) for t in (True, False)))
def test_jacobian(vectorize, training, model):
    model = another(model, layers=(1, 1, 3, 1)).train(training)
    j = torch.autograd.functional.jacobian(lambda x: model(x)[:, :3], inputs(2, 32),
                                           vectorize=vectorize)  # fmt: skip
    return {"j": j}


@same_as_plain(
    {},
    {"aa_layer": False},
    {"aa_layer": False, "act_layer": "silu"},
    {"aa_layer": False, "use_se": False},
    tolerance=DOUBLE,
)
def test_double_backward(kwargs, model):
    model = another(model, **kwargs)
    x = inputs().requires_grad_()
    loss = model(x).square().mean()
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + g.square().sum()).backward()
    return {**collect(model, loss), "x": x.grad}


@same_as_plain(
    {},
    {"aa_layer": False},
    tolerance=DOUBLE,
)
def test_double_backward_of_parameters(kwargs, model):
    model = another(model, **kwargs)
    loss = model(inputs()).square().mean()
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    sum(g.square().sum() for g in grads).backward()
    return collect(model, loss)


@same_as_plain(
    "weight",
    "bias",
    "conv",
    tolerance=DOUBLE,
)
def test_double_backward_of_one_kind(kind, model):
    model = another(model, aa_layer=False)
    loss = model(inputs()).square().mean()
    wanted = [u.conv.weight if kind == "conv" else getattr(u.bn, kind) for u in units(model)]
    grads = torch.autograd.grad(loss, wanted, create_graph=True)
    sum(g.square().sum() for g in grads).backward()
    return {**collect(model, loss), **{f"g{i}": g.detach() for i, g in enumerate(grads)}}


@same_as_plain(
    "weight",
    "bias",
    "conv",
    "all",
    tolerance=DOUBLE,
)
def test_double_backward_with_frozen(kind, model):
    model = another(model, aa_layer=False)
    for u in units(model):
        for p in u.parameters() if kind == "all" else [u.conv.weight if kind == "conv" else getattr(u.bn, kind)]:
            p.requires_grad_(False)
    x = inputs().requires_grad_()
    loss = model(x).square().mean()
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + g.square().sum()).backward()
    return {**collect(model, loss), "x": x.grad}


@same_as_plain(
    "hvp",
    "vhp",
    "jvp",
    "vjp",
    tolerance=DOUBLE,
)
def test_autograd_functional(kind, model):
    model = another(model, aa_layer=False)
    x = inputs()
    if kind in ("hvp", "vhp"):
        a, b = getattr(torch.autograd.functional, kind)(lambda x: model(x).square().mean(), x, torch.ones_like(x))
    else:
        a, b = getattr(torch.autograd.functional, kind)(model, x, torch.ones_like(x if kind == "jvp" else model(x)))
    return {"a": a, "b": b}


@same_as_plain({}, {"aa_layer": False})
def test_forward_mode(kwargs, model):
    from torch.autograd import forward_ad

    model = another(model, **kwargs)
    with forward_ad.dual_level():
        y = model(forward_ad.make_dual(inputs(), torch.ones_like(inputs())))
        return {"t": forward_ad.unpack_dual(y).tangent.detach()}


def compiler_of(model):
    """Arguments of the compiler, made anew; plain PyTorch runs without it, in half the time."""
    torch.compiler.reset()
    return {"backend": "aot_eager", "disable": model.recompute == "none"}


def train_step_by_name(model):
    return {name.replace("_orig_mod.", ""): value for name, value in train_step(model, inputs()).items()}


@same_as_plain("in_place_block", "block", "stage", few=0, in_turn=True, tolerance=1e-4)
def test_compiled(what, model):
    """Networks: tests/test_compiled.py."""
    kwargs = compiler_of(model)
    model = another(model, layers=(1, 1, 2, 1))
    if what == "stage":
        model.body.layer3.compile(**kwargs)
    elif what == "block":
        model.body.layer3[1] = torch.compile(model.body.layer3[1], **kwargs)
    else:
        model.body.layer3[1].compile(**kwargs)
    return train_step_by_name(model)


class Breaks(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return F.silu(x)


def put_break(where, model):
    """Put a module at which the compiler breaks its graph into the third stage."""
    model = another(model, layers=(1, 1, 2, 1))
    if where == "act":
        model.body.layer3[1].conv1.bn.act = Breaks()
    else:
        model.body.layer3.append(Breaks())
    return model


@same_as_plain("act", "module", few=0, in_turn=True, tolerance=1e-4)
def test_compiled_stage_with_graph_break(where, model):
    model = put_break(where, model)
    model.body.layer3.compile(**compiler_of(model))
    return train_step(model, inputs())

"""Backward passes: several, partial ones, failing ones, in threads, inside each other."""

import threading

import torch
from comparing import collect, train_step
from users import FREED, another, inputs, same_as_plain


@same_as_plain()
def test_features_first_then_output(model):
    y, features = model.forward_intermediates(inputs())
    features[2].square().mean().backward()
    grads = torch.autograd.grad(y.square().mean(), list(model.body.layer4.parameters()))
    return {**collect(model, y.mean()), "later": torch.cat([g.flatten() for g in grads])}


@same_as_plain(raises=FREED)
def test_features_first_then_output_through_freed_part(model):
    y, features = model.forward_intermediates(inputs())
    features[2].square().mean().backward()
    y.square().mean().backward()
    return collect(model, y.mean())


@same_as_plain()
def test_output_first_then_features(model):
    y, features = model.forward_intermediates(inputs())
    torch.autograd.grad(y.square().mean(), list(model.body.layer4.parameters()))
    features[-2].square().mean().backward()
    return collect(model, y.mean())


@same_as_plain(True, False, raises=FREED, when=lambda retain: not retain)
def test_partial_then_full(retain, model):
    loss = model(inputs()).square().mean()
    some = torch.autograd.grad(loss, [model.body.layer3[4].conv2.conv.weight], retain_graph=retain)
    loss.backward()
    return {**collect(model, loss), "some": some[0]}


@same_as_plain(1, 2, 3)
def test_backward_again(times, model):
    return _step_again(times, model)


def _step_again(times, model):
    loss = model(inputs()).square().mean()
    for _ in range(times):
        loss.backward(retain_graph=True)
    loss.backward()
    return collect(model, loss)


@same_as_plain("groupnorm1", "layernorm2d")
def test_backward_again_other_norms(norm, model):
    return _step_again(1, another(model, norm_layer=norm))


@same_as_plain(raises=FREED)
def test_backward_again_freed(model):
    loss = model(inputs()).square().mean()
    loss.backward()
    loss.backward()
    return collect(model, loss)


@same_as_plain()
def test_backward_inputs(model):
    loss = model(inputs()).square().mean()
    loss.backward(inputs=[model.body.layer2[0].conv1.bn.bias, model.body.layer1[0].conv2.bn.weight])
    return collect(model, loss)


@same_as_plain("groupnorm1", "batchnorm2d")
def test_backward_inside_a_hook_of_a_stage(norm, model):
    model = another(model, norm_layer=norm)
    model.body.layer2.register_forward_hook(lambda module, args, y: y.square().mean().backward(retain_graph=True))
    return train_step(model, inputs())


@same_as_plain(2, 4)
def test_threads_on_one_graph(count, model):
    loss = model(inputs()).square().mean()
    wanted = list(model.parameters())
    results = [None] * count

    def work(i):
        try:
            results[i] = torch.autograd.grad(loss, wanted, retain_graph=True)
        except Exception as error:
            results[i] = error

    for _ in range(3):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        for r in results:
            if isinstance(r, Exception):
                raise r
    return {**collect(model, loss), **{f"{i}.{j}": g for i, r in enumerate(results) for j, g in enumerate(r)}}


@same_as_plain()
def test_forward_in_one_thread_backward_in_another(model):
    loss = model(inputs()).square().mean()
    errors = []

    def work():
        try:
            loss.backward()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return collect(model, loss)


@same_as_plain()
def test_reentrant_backward(model):
    """Backward inside backward, through the same graph."""
    y = model(inputs())
    w = model.body.layer3[2].conv2.conv.weight
    inner = []
    z, total = y * 1, y.sum()
    z.register_hook(lambda g: inner.append(torch.autograd.grad(total, w, retain_graph=True)[0]))
    loss = z.square().mean()
    loss.backward()
    return {**collect(model, loss), "inner": inner[0]}


@same_as_plain()
def test_reentrant_backward_in_the_middle(model):
    y = model(inputs())
    w = model.body.layer2[0].conv2.conv.weight
    inner, total = [], y.sum()
    handle = model.body.layer3[2].conv1.bn.weight.register_hook(
        lambda g: inner.append(torch.autograd.grad(total, w, retain_graph=True)[0])
    )
    loss = y.square().mean()
    loss.backward(retain_graph=True)
    handle.remove()  # which holds the graph, which holds the weight: nobody would ever free them
    return {**collect(model, loss), "inner": inner[0]}


@same_as_plain()
def test_gradient_of_recomputed_values_twice_in_one_pass(model):
    """Two outputs of one graph in one backward."""
    y, features = model.forward_intermediates(inputs())
    torch.autograd.backward([y.square().mean(), *(f.square().mean() for f in features)])
    return collect(model, y.mean())


@same_as_plain()
def test_two_losses_in_turns(model):
    x = inputs()
    a, b = model(x), model(x.flip(3))
    a.square().mean().backward()
    loss = b.square().mean()
    loss.backward()
    return collect(model, loss)


@same_as_plain()
def test_backward_in_no_grad_and_inference_mode(model):
    loss = model(inputs()).square().mean()
    with torch.no_grad():
        loss.backward()
    return collect(model, loss)


@same_as_plain()
def test_anomaly_mode(model):
    with torch.autograd.set_detect_anomaly(True):
        return train_step(model, inputs())


@same_as_plain()
def test_deterministic(model):
    torch.use_deterministic_algorithms(True)
    try:
        return train_step(model, inputs())
    finally:
        torch.use_deterministic_algorithms(False)


@same_as_plain({}, {"aa_layer": False})
def test_create_graph_alone(kwargs, model):
    model = another(model, **kwargs)
    loss = model(inputs()).square().mean()
    loss.backward(create_graph=True)
    result = {k: None if v is None else v.detach() for k, v in collect(model, loss).items()}
    model.zero_grad()
    return result


@same_as_plain(3)
def test_training(steps, model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for i in range(steps):
        optimizer.zero_grad()
        result = train_step(model, inputs(4).roll(i, 0))
        optimizer.step()
    return result

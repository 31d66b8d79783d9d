"""Autocast, dtypes, layouts, and inputs at the limits."""

import contextlib

import torch
from comparing import collect, train_step
from users import (
    BEFORE_2_11,
    another,
    inputs,
    same_as_plain,
    units,
)


@same_as_plain(
    *(
        (forward, backward)
        for forward in (torch.bfloat16, None, torch.float16)
        for backward in (None, torch.bfloat16, torch.float16)
        if (forward, backward) != (torch.float16, torch.bfloat16)  # which autocast refuses
    )
)
def test_autocast_in_forward_and_backward(forward, backward, model):
    return _autocast_step(forward, backward, model)


def _autocast_step(forward, backward, model):
    with torch.autocast("cpu", dtype=forward) if forward else contextlib.nullcontext():
        y = model(inputs())
    loss = y.float().square().mean()
    with torch.autocast("cpu", dtype=backward) if backward else contextlib.nullcontext():
        loss.backward()
    return collect(model, loss)


@same_as_plain("silu", "gelu", "mish", "prelu")
def test_autocast_backward_other_acts(act, model):
    return _autocast_step(None, torch.bfloat16, another(model, act_layer=act))


@same_as_plain(
    *(torch.float16, torch.bfloat16, torch.float64),
    raises="not implemented for 'Half'" if BEFORE_2_11 else None,
    when=lambda dtype: dtype is torch.float16,
)
def test_dtypes(dtype, model):
    model.to(dtype)
    return train_step(model, inputs().to(dtype))


@same_as_plain(torch.bfloat16, torch.float32)
def test_channels_last(dtype, model):
    model.to(dtype=dtype, memory_format=torch.channels_last)
    return train_step(model, inputs().to(dtype).to(memory_format=torch.channels_last))


@same_as_plain(torch.bfloat16)
def test_dtypes_with_norms_in_single(dtype, model):
    for u in units(model):
        u.conv.to(dtype)
        u.conv.register_forward_hook(lambda m, a, y: y.float())
        u.conv.register_forward_pre_hook(lambda m, a: (a[0].to(dtype),))
    return train_step(model, inputs())


@same_as_plain()
def test_grad_scaler(model):
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(inputs()).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return {**collect(model, loss), **{k: v.clone() for k, v in model.state_dict().items()}}


@same_as_plain("nan", "inf")
def test_bad_inputs(value, model):
    x = inputs()
    x[0, 0, 3, 3] = float(value)
    return train_step(model, x)


@same_as_plain("nan", "inf", "-inf", "1e38", "1e-40")
def test_bad_norm_weights(value, model):
    for u in units(model.body.layer3):
        u.bn.weight.data[1] = float(value)
    return train_step(model, inputs())


@same_as_plain("nan", "inf", "-inf")
def test_bad_inputs_eval_norms(value, model):
    for u in units(model):
        u.bn.eval()
    x = inputs()
    x[0, 0, 3, 3] = float(value)
    return train_step(model, x)


@same_as_plain("zeros", "constant", "large", "tiny")
def test_odd_inputs(kind, model):
    x = {"zeros": 0 * inputs(), "constant": 0 * inputs() + 3, "large": inputs() * 1e20, "tiny": inputs() * 1e-30}[kind]
    return train_step(model, x)


@same_as_plain(72, 68, 132)
def test_odd_sizes(size, model):
    return train_step(model, inputs(2, size))


@same_as_plain(0, 1, raises="more than 1 value per channel", when=lambda size: size == 1)
def test_batch_of(size, model):
    return train_step(model, inputs(size, 32 if size else 64))


@same_as_plain()
def test_image_gradients(model):
    x = inputs().requires_grad_()
    result = train_step(model, x)
    return {**result, "image": x.grad}


@same_as_plain()
def test_expanded_images(model):
    return train_step(model, inputs(1).expand(3, -1, -1, -1).requires_grad_())


@same_as_plain()
def test_inference_tensors(model):
    with torch.inference_mode():
        x = inputs()
    return train_step(model, x)


@same_as_plain(raises="Inference tensors cannot be saved")
def test_inference_tensor_in_a_stage(model):
    with torch.inference_mode():
        x = model.body[:2](inputs())
    loss = model.body[2:](x).square().mean()
    loss.backward()
    return collect(model, loss)

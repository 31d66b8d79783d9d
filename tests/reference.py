"""Slow, obvious implementations, written from the paper and the official code's key names."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def space_to_depth(x, block=4):
    """SpaceToDepth with a loop over pixels of a patch; channels run over (row, column, image channel)."""
    pixels = [x[:, :, row::block, column::block] for row in range(block) for column in range(block)]
    return torch.cat(pixels, dim=1)


def blur_pool(x, stride=2, dilation=1):
    """Weighted mean of nine shifted copies, borders reflected, then every stride-th pixel."""
    height, width = x.shape[-2:]

    def reflect(index, size):
        index = abs(index)
        return 2 * (size - 1) - index if index >= size else index

    total = torch.zeros_like(x)
    for row, row_weight in ((-dilation, 1), (0, 2), (dilation, 1)):
        for column, column_weight in ((-dilation, 1), (0, 2), (dilation, 1)):
            rows = [reflect(i + row, height) for i in range(height)]
            columns = [reflect(j + column, width) for j in range(width)]
            total += row_weight * column_weight * x[:, :, rows][:, :, :, columns]
    return (total / 16)[:, :, ::stride, ::stride]


def average_pool(x, stride, dilation=1):
    """Mean over the taps of a 2x2 window that lie inside the image."""
    height, width = x.shape[-2:]
    output = x.new_zeros(*x.shape[:2], len(range(0, height, stride)), len(range(0, width, stride)))
    for i, row in enumerate(range(0, height, stride)):
        for j, column in enumerate(range(0, width, stride)):
            output[:, :, i, j] = x[
                :, :, row : row + dilation + 1 : dilation, column : column + dilation + 1 : dilation
            ].mean((2, 3))
    return output


def squeeze_excite(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    """Gate each channel by two fully connected layers on the channel means (arXiv:1709.01507, eq. 2-4)."""
    squeezed = x.mean((2, 3))
    hidden = (squeezed @ fc1_weight.flatten(1).T + fc1_bias).relu()
    gate = (hidden @ fc2_weight.flatten(1).T + fc2_bias).sigmoid()
    return x * gate[:, :, None, None]


def depthwise(x, kernel):
    """Sum of nine shifted copies of each channel, zeros beyond the borders, each times its tap of (C, 1, 3, 3)."""
    height, width = x.shape[-2:]
    padded = x.new_zeros(*x.shape[:2], height + 2, width + 2)
    padded[:, :, 1:-1, 1:-1] = x
    total = torch.zeros_like(x)
    for row in range(3):
        for column in range(3):
            tap = kernel[:, 0, row, column][:, None, None]
            total = total + tap * padded[:, :, row : row + height, column : column + width]
    return total


def frelu(x, kernel, weight, bias, mean, var):
    """max(x, T(x)) with T a depthwise convolution and a batch norm (arXiv:2007.11824, eq. 1 and 2)."""
    scale = weight / (var + 1e-5).sqrt()
    funnel = depthwise(x, kernel) * scale[:, None, None] + (bias - mean * scale)[:, None, None]
    return torch.where(x > funnel, x, funnel)


def official_state_dict(
    layers,
    planes=64,
    bottlenecks=(False, False, True, True),
    num_classes=10,
    blur_buffers=False,
    blurred=True,
    counters=False,
    head="linear",
    head_features=512,
    num_groups=100,
    decoder_embedding=768,
    zero_shot=False,
    frelu=False,
):
    """Random tensors under the names and shapes of the official code, In-Place ABN included.

    With frelu those of 7eu7d7/ML-Danbooru's `tresnet_f.py`, which has batch norm and FReLU instead. Weights of the
    norms are negative in part and near zero in part. The head is "linear", "bottleneck" (ASL),
    "ml_decoder", "query2label", with the names that its backbone has there, or "none".
    """
    tensors = {}

    def conv_abn(name, in_channels, out_channels, kernel_size, acts=False):
        fan_in = in_channels * kernel_size**2
        tensors[f"{name}.0.weight"] = torch.randn(out_channels, in_channels, kernel_size, kernel_size) / fan_in**0.5
        weight = torch.randn(out_channels)
        weight[::8] = 1e-6
        tensors[f"{name}.1.weight"] = weight
        tensors[f"{name}.1.bias"] = torch.randn(out_channels) / 4
        tensors[f"{name}.1.running_mean"] = torch.randn(out_channels) / 4
        tensors[f"{name}.1.running_var"] = torch.rand(out_channels) + 0.5
        if counters:
            tensors[f"{name}.1.num_batches_tracked"] = torch.tensor(7)
        if acts and frelu:
            conv_abn(f"{name}.2.depthwise_conv_bn", 1, out_channels, 3)

    def linear(name, in_features, out_features):
        tensors[f"{name}.weight"] = torch.randn(out_features, in_features) / in_features**0.5
        tensors[f"{name}.bias"] = torch.randn(out_features)

    def squeeze_excite_tensors(name, channels, reduced):
        for layer, rows, columns in (("fc1", reduced, channels), ("fc2", channels, reduced)):
            tensors[f"{name}.{layer}.weight"] = torch.randn(rows, columns, 1, 1) / columns**0.5
            tensors[f"{name}.{layer}.bias"] = torch.randn(rows) / 4

    conv_abn("body.conv1", 48, planes, 3, acts=True)
    in_channels = planes
    for stage in range(4):
        width = planes * 2**stage
        expansion = 4 if bottlenecks[stage] else 1
        for index in range(layers[stage]):
            block = f"body.layer{stage + 1}.{index}"
            strides = stage > 0 and index == 0
            if bottlenecks[stage]:
                conv_abn(f"{block}.conv1", in_channels, width, 1, acts=True)
                strided, strided_in = f"{block}.conv2", width
            else:
                strided, strided_in = f"{block}.conv1", in_channels
            conv_abn(f"{strided}.0" if strides and blurred else strided, strided_in, width, 3, acts=True)
            if strides and blur_buffers:
                tensors[f"{strided}.1.op.filt"] = torch.rand(width, 1, 3, 3)
            if bottlenecks[stage]:
                conv_abn(f"{block}.conv3", width, width * 4, 1)
            else:
                conv_abn(f"{block}.conv2", width, width, 3)
            if frelu:
                conv_abn(f"{block}.relu.depthwise_conv_bn", 1, width * expansion, 3)
            if stage < 3:
                reduced = max(width * expansion // (8 if bottlenecks[stage] else 4), 64)
                squeeze_excite_tensors(f"{block}.se", width, reduced)
            if strides:
                conv_abn(f"{block}.downsample.1", in_channels, width * expansion, 1)
            elif in_channels != width * expansion:
                conv_abn(f"{block}.downsample.0", in_channels, width * expansion, 1)
            in_channels = width * expansion
    if head == "linear":
        linear("head.fc", in_channels, num_classes)
    elif head == "bottleneck":
        linear("head.fc.embedding_generator.0", in_channels, head_features)
        linear("head.fc.FC", head_features, num_classes)
    elif head == "ml_decoder":
        tensors |= ml_decoder_state_dict(in_channels, num_classes, num_groups, decoder_embedding, zero_shot)
    elif head == "query2label":
        tensors = {f"module.backbone.0.body.{name}": tensor for name, tensor in tensors.items()}
        transformer = query2label_state_dict(in_channels, num_classes, head_features)
        tensors |= {f"module.{name}": tensor for name, tensor in transformer.items()}
    return tensors


def query2label_state_dict(in_channels, num_classes, hidden=512, width=None, side=2):
    """Random tensors under the names and shapes of the official Query2Label, its backbone aside."""
    width, projects = width or in_channels, width is not None
    shapes = {"query_embed.weight": (num_classes, width), "fc.W": (1, num_classes, width), "fc.b": (1, num_classes)}
    if projects:
        shapes |= {"input_proj.weight": (width, in_channels, 1, 1), "input_proj.bias": (width,)}
    layers = {"encoder.layers.0": ("self_attn", 1), "decoder.layers.0": ("multihead_attn", 2)}
    layers["decoder.layers.1"] = layers["decoder.layers.0"]
    for layer, (attention, norm) in layers.items():
        matrices = {f"{attention}.in_proj_": (3 * width, width), f"{attention}.out_proj.": (width, width)}
        matrices |= {"linear1.": (hidden, width), "linear2.": (width, hidden)}
        for name, shape in matrices.items():
            shapes |= {f"transformer.{layer}.{name}weight": shape, f"transformer.{layer}.{name}bias": shape[:1]}
        for name in (f"norm{norm}", f"norm{norm + 1}"):
            shapes |= {f"transformer.{layer}.{name}.{kind}": (width,) for kind in ("weight", "bias")}
    shapes |= {f"transformer.decoder.norm.{kind}": (width,) for kind in ("weight", "bias")}
    tensors = {name: torch.randn(shape) / (shape[1] if len(shape) > 1 else 1) ** 0.5 for name, shape in shapes.items()}
    return {**tensors, "backbone.1.pe": torch.randn(1, width, side, side)}


def position(height, width, channels):
    """Sines and cosines of each pixel's row and column, a number at a time (arXiv:2005.12872, code of DETR)."""
    encoded = torch.zeros(height, width, channels, dtype=torch.float64)
    each = channels // 2
    for axis, size in ((0, height), (1, width)):
        for place in range(size):
            for index in range(each):
                angle = (place + 1) / (size + 1e-6) * 2 * math.pi / 10000 ** (index // 2 * 2 / each)
                value = math.cos(angle) if index % 2 else math.sin(angle)
                encoded.select(axis, place)[..., axis * each + index] = value
    return encoded.flatten(0, 1).float()


def query2label(tensors, x, num_heads=4):
    """Logits of the official Query2Label in eval mode on a feature map, an image and a head at a time."""

    def linear(name, x):
        return x @ tensors[f"{name}weight"].flatten(1).T + tensors[f"{name}bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def layer(name, attention, first, x, x_position, memory, memory_position):
        weights, biases = (
            tensors[f"{name}{attention}.in_proj_weight"].chunk(3),
            tensors[f"{name}{attention}.in_proj_bias"].chunk(3),
        )
        inputs = (x + x_position, memory + memory_position, memory)
        query, key, value = (
            given @ weight.T + bias for given, weight, bias in zip(inputs, weights, biases, strict=True)
        )
        width = query.shape[1] // num_heads
        heads = []
        for head in range(num_heads):
            part = slice(head * width, (head + 1) * width)
            heads.append((query[:, part] @ key[:, part].T / width**0.5).softmax(1) @ value[:, part])
        x = norm(f"{name}norm{first}", x + linear(f"{name}{attention}.out_proj.", torch.cat(heads, 1)))
        return norm(f"{name}norm{first + 1}", x + linear(f"{name}linear2.", linear(f"{name}linear1.", x).relu()))

    logits = []
    for image in x:
        memory = image.flatten(1).T
        if "input_proj.weight" in tensors:
            memory = linear("input_proj.", memory)
        places = position(*image.shape[1:], memory.shape[1])
        memory = layer("transformer.encoder.layers.0.", "self_attn", 1, memory, places, memory, places)
        queries = tensors["query_embed.weight"]
        x = torch.zeros_like(queries)
        for index in range(2):
            x = layer(f"transformer.decoder.layers.{index}.", "multihead_attn", 2, x, queries, memory, places)
        x = norm("transformer.decoder.norm", x)
        logits.append((x * tensors["fc.W"][0]).sum(1) + tensors["fc.b"][0])
    return torch.stack(logits)


def ml_decoder_state_dict(in_channels, num_classes, num_groups=100, width=768, zero_shot=False):
    """Random tensors under the names and shapes of the official ML-Decoder, behind "head."."""
    groups = 1 if zero_shot else min(num_groups, num_classes)
    shapes = {
        "decoder.embed_standart.weight": (width, in_channels),
        "decoder.query_embed.weight": (groups, width),
        "decoder.duplicate_pooling": (width, 1) if zero_shot else (groups, width, -(-num_classes // groups)),
        "decoder.duplicate_pooling_bias": (1 if zero_shot else num_classes,),
        "wordvec_proj.weight": (width, 300),
    }
    layer = "decoder.layers.0"
    matrices = {"multihead_attn.in_proj_": (3, 1), "multihead_attn.out_proj.": (1, 1)}
    matrices |= {"linear1.": (2048 / width, 1), "linear2.": (1, 2048 / width)}
    for name, (rows, columns) in matrices.items():
        shapes[f"{layer}.{name}weight"] = (round(rows * width), round(columns * width))
    for name in ("decoder.embed_standart.", "wordvec_proj.", *(f"{layer}.{name}" for name in matrices)):
        shapes[f"{name}bias"] = shapes[f"{name}weight"][:1]
    for name in ("norm1", "norm2", "norm3"):
        shapes |= dict.fromkeys((f"{layer}.{name}.weight", f"{layer}.{name}.bias"), (width,))
    left_out = "decoder.query_embed." if zero_shot else "wordvec_proj."
    return {
        f"head.{name}": torch.randn(shape) / (shape[1] if len(shape) > 1 else 1) ** 0.5
        for name, shape in shapes.items()
        if not name.startswith(left_out)
    }


def ml_decoder(tensors, x, word_vectors=None, num_heads=8):
    """Logits of the official ML-Decoder in eval mode on a feature map, an image, a query and a head at a time."""

    def linear(name, x):
        return x @ tensors[f"{name}weight"].T + tensors[f"{name}bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * tensors[f"head.decoder.layers.0.{name}.weight"] + tensors[f"head.decoder.layers.0.{name}.bias"]

    tensors = {name.replace("in_proj_", "in_proj."): tensor for name, tensor in tensors.items()}
    layer = "head.decoder.layers.0"
    if word_vectors is None:
        queries = tensors["head.decoder.query_embed.weight"]
    else:
        queries = linear("head.wordvec_proj.", word_vectors).relu()
    weight, bias = tensors["head.decoder.duplicate_pooling"], tensors["head.decoder.duplicate_pooling_bias"]
    logits = []
    for image in x:
        pixels = image.flatten(1).T
        memory = linear("head.decoder.embed_standart.", pixels).relu()
        row = []
        for index, query in enumerate(queries):
            query = norm("norm1", query + query)  # what dropout leaves of it, added to itself
            width = len(query)
            asked = linear(f"{layer}.multihead_attn.in_proj.", query)[:width]
            key, value = linear(f"{layer}.multihead_attn.in_proj.", memory)[:, width:].split(width, 1)
            heads = []
            for head in range(num_heads):
                part = slice(head * width // num_heads, (head + 1) * width // num_heads)
                share = (key[:, part] @ asked[part] / (width // num_heads) ** 0.5).softmax(0)
                heads.append(share @ value[:, part])
            query = norm("norm2", query + linear(f"{layer}.multihead_attn.out_proj.", torch.cat(heads)))
            hidden = linear(f"{layer}.linear1.", query).relu()
            query = norm("norm3", query + linear(f"{layer}.linear2.", hidden))
            row.append(query @ (weight if weight.ndim == 2 else weight[index]))
        logits.append(torch.cat(row)[: len(bias)] + bias if word_vectors is None else torch.cat(row) + bias)
    return torch.stack(logits)


def official_forward(tensors, x, slope=1e-3, stem_slope=1e-2, word_vectors=None):
    """Logits of the official network in eval mode, straight from its state dict.

    Without a head the means of the feature map. Queries of ML-Decoder's may be made of word vectors.
    """

    has_frelu = any("depthwise_conv_bn" in name for name in tensors)

    def maximum_of_neighbours(name, x):
        norm = (tensors[f"{name}.1.{part}"] for part in ("weight", "bias", "running_mean", "running_var"))
        return frelu(x, tensors[f"{name}.0.weight"], *norm)

    def conv_abn(name, x, activation_slope=None, stride=1):
        kernel = tensors[f"{name}.0.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        weight = tensors[f"{name}.1.weight"]
        weight = weight if has_frelu else weight.abs() + 1e-5  # In-Place ABN
        scale = weight / (tensors[f"{name}.1.running_var"] + 1e-5).sqrt()
        shift = tensors[f"{name}.1.bias"] - tensors[f"{name}.1.running_mean"] * scale
        x = x * scale[:, None, None] + shift[:, None, None]
        if has_frelu and activation_slope is not None:
            return maximum_of_neighbours(f"{name}.2.depthwise_conv_bn", x)
        return x if activation_slope is None else torch.where(x > 0, x, activation_slope * x)

    def maybe_blurred(name, x, stride):
        if f"{name}.0.0.weight" in tensors:
            return blur_pool(conv_abn(f"{name}.0", x, slope))
        return conv_abn(name, x, slope, stride)

    x = conv_abn("body.conv1", space_to_depth(x), stem_slope)
    for stage in range(1, 5):
        index = 0
        while (
            f"body.layer{stage}.{index}.conv1.0.weight" in tensors
            or f"body.layer{stage}.{index}.conv1.0.0.weight" in tensors
        ):
            block = f"body.layer{stage}.{index}"
            shortcut = x
            stride = 2 if stage > 1 and index == 0 else 1
            if f"{block}.downsample.1.0.weight" in tensors:
                shortcut = conv_abn(f"{block}.downsample.1", average_pool(x, stride=2))
            elif f"{block}.downsample.0.0.weight" in tensors:
                shortcut = conv_abn(f"{block}.downsample.0", x)
            se = [tensors.get(f"{block}.se.{name}") for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")]
            if f"{block}.conv3.0.weight" in tensors:
                x = conv_abn(f"{block}.conv1", x, slope)
                x = maybe_blurred(f"{block}.conv2", x, stride)
                x = squeeze_excite(x, *se) if se[0] is not None else x
                x = conv_abn(f"{block}.conv3", x)
            else:
                x = maybe_blurred(f"{block}.conv1", x, stride)
                x = conv_abn(f"{block}.conv2", x)
                x = squeeze_excite(x, *se) if se[0] is not None else x
            x = x + shortcut
            x = maximum_of_neighbours(f"{block}.relu.depthwise_conv_bn", x) if has_frelu else x.relu()
            index += 1
    if "head.decoder.duplicate_pooling" in tensors:
        return ml_decoder(tensors, x, word_vectors)
    if "fc.W" in tensors:
        return query2label(tensors, x)
    x = x.mean((2, 3))
    for name in ("head.fc.embedding_generator.0", "head.fc.FC", "head.fc"):
        if f"{name}.weight" in tensors:
            x = x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
    return x


def randomise(model):
    """Give every batch norm weights of both signs, some near zero, and statistics of a trained network."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, std=0.5)
            module.weight.data[::8] = 1e-6
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()

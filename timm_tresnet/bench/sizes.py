"""Compute a TResNet's parameters and multiply-adds by arithmetic, without PyTorch or a network."""

import math
from collections.abc import Mapping
from typing import Any

_HEAD_WIDTHS = {"bottleneck": 512, "ml_decoder": 768}  # defaults of head_features and decoder_embedding
_DECODER_GROUPS, _DECODER_HIDDEN = 100, 2048
_TRANSFORMER_HIDDEN = 8192


class _Count:
    """Sums parameters and multiply-adds of layers."""

    def __init__(self, has_frelu: bool) -> None:
        self.has_frelu = has_frelu
        self.params = self.macs = 0

    def conv(self, in_channels: int, out_channels: int, kernel: int, side: int) -> None:
        """Add a convolution without bias and its norm; side is the output's, in pixels."""
        weights = in_channels * out_channels * kernel**2
        self.params += weights + 2 * out_channels
        self.macs += weights * side**2

    def act(self, channels: int, side: int) -> None:
        """Add an activation, which with FReLU is a depthwise convolution and a norm."""
        if self.has_frelu:
            self.conv(1, channels, 3, side)

    def linear(self, in_features: int, out_features: int, rows: int = 1) -> None:
        self.params += (in_features + 1) * out_features
        self.macs += in_features * out_features * rows


def count_size(arguments: Mapping[str, Any], image_size: int, num_classes: int, in_chans: int = 3) -> tuple[int, int]:
    """Count a variant's parameters and multiply-adds, for one image in eval mode.

    Multiply-adds are those of convolutions, linear layers and attention, as in PyTorch's `FlopCounterMode`.

    Args:
        arguments: arguments of `TResNet`: layers, width_factor, v2, block, act_layer, head, head_features, num_groups,
            decoder_embedding and learn_queries.
        image_size: side of the image, in pixels; a multiple of 4.
        num_classes: number of classes; 0 for no classifier.
        in_chans: channels of the image.

    Returns:
        Number of parameters and of multiply-adds.
    """
    count = _Count(arguments.get("act_layer") == "frelu")
    planes = int(64 * arguments.get("width_factor", 1.0))
    if arguments.get("v2"):
        planes = planes // 8 * 8
    side = image_size // 4
    count.conv(16 * in_chans, planes, 3, side)  # of the space-to-depth stem
    count.act(planes, side)
    channels = planes
    for stage, blocks in enumerate(arguments["layers"]):
        bottleneck = arguments.get("block") == "bottleneck" or bool(arguments.get("v2")) or stage >= 2
        for block in range(blocks):
            halves = stage > 0 and block == 0
            channels, side = _count_block(count, channels, planes << stage, side, halves, bottleneck, use_se=stage < 3)
    _count_head(count, arguments, channels, side, num_classes)
    return count.params, count.macs


def _count_block(
    count: _Count, in_channels: int, planes: int, side: int, halves: bool, bottleneck: bool, use_se: bool
) -> tuple[int, int]:
    """Count a block; returns its channels and the side of its output."""
    smaller = math.ceil(side / 2) if halves else side
    out_channels = planes * (4 if bottleneck else 1)
    if halves or in_channels != out_channels:
        count.conv(in_channels, out_channels, 1, smaller)  # shortcut, after its pooling
    if bottleneck:
        count.conv(in_channels, planes, 1, side)
        count.act(planes, side)
    count.conv(planes if bottleneck else in_channels, planes, 3, side)  # a blur does the downsampling, after it
    count.act(planes, side)
    if halves:
        count.macs += 9 * planes * smaller**2  # the blur, which has no parameters
    count.conv(planes, out_channels, 1 if bottleneck else 3, smaller)
    count.act(out_channels, smaller)  # after the sum
    if use_se:
        reduced = max(planes // (2 if bottleneck else 4), 64)
        count.linear(planes, reduced)
        count.linear(reduced, planes)
    return out_channels, smaller


def _count_head(count: _Count, arguments: Mapping[str, Any], features: int, side: int, num_classes: int) -> None:
    head = arguments.get("head", "linear")
    if head == "ml_decoder":
        width = arguments.get("decoder_embedding") or _HEAD_WIDTHS[head]
        groups: int = arguments.get("num_groups") or _DECODER_GROUPS
        groups = min(groups, num_classes or groups)
        pixels = side**2
        count.linear(features, width, pixels)
        count.linear(width, width, groups)  # queries
        count.linear(width, 2 * width, pixels)  # keys and values
        count.macs += 2 * groups * pixels * width  # attention
        count.linear(width, width, groups)
        count.linear(width, _DECODER_HIDDEN, groups)
        count.linear(_DECODER_HIDDEN, width, groups)
        count.params += 3 * 2 * width  # norms
        if arguments.get("learn_queries"):
            count.params += groups * width
        if num_classes:
            weights = groups * width * math.ceil(num_classes / groups)
            count.params += weights + num_classes
            count.macs += weights
        return
    if head == "query2label":
        width = arguments.get("decoder_embedding") or features
        hidden: int = arguments.get("head_features") or _TRANSFORMER_HIDDEN
        pixels = side**2
        if width != features:
            count.linear(features, width, pixels)
        _count_attention(count, width, hidden, pixels, pixels)
        if num_classes:
            for _ in range(2):
                _count_attention(count, width, hidden, num_classes, pixels)
            count.params += (2 * width + 1) * num_classes + 2 * width  # queries, last layer, norm
        return
    if head == "bottleneck":
        width = arguments.get("head_features") or _HEAD_WIDTHS[head]
        count.linear(features, width)
        features = width
    if num_classes:
        count.linear(features, num_classes)


def _count_attention(count: _Count, width: int, hidden: int, queries: int, pixels: int) -> None:
    """Count a layer of a transformer whose queries attend to pixels."""
    for rows in (queries, pixels, pixels, queries):
        count.linear(width, width, rows)
    count.macs += 2 * queries * pixels * width
    count.linear(width, hidden, queries)
    count.linear(hidden, width, queries)
    count.params += 2 * 2 * width  # norms

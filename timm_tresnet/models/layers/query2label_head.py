"""Query2Label, a transformer as classifier head (arXiv:2107.10834)."""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp, SelectAdaptivePool2d
from torch import Tensor, nn

_HEADS = 4  # this and the following as in the official code's README.md and main_mlc.py
_HIDDEN_FEATURES = 8192
_DECODER_LAYERS = 2
_DROPOUT = 0.1


def encode_position(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Encode each pixel's row, then its column, as sines and cosines, normalised as in DETR (arXiv:2005.12872).

    Args:
        height: rows of pixels.
        width: columns of pixels.
        channels: a multiple of 4, half of them for the row and half for the column.
        like: a tensor with the device and dtype of the result.

    Returns:
        (height * width, channels), computed in single precision.
    """
    each = channels // 2
    index = torch.arange(each, dtype=torch.float32, device=like.device)
    periods = torch.pow(10_000.0, 2 * torch.div(index, 2, rounding_mode="floor") / each)
    rows = _encode(height, periods)[:, None].expand(height, width, each)
    columns = _encode(width, periods)[None].expand(height, width, each)
    return torch.cat([rows, columns], dim=2).flatten(0, 1).to(like.dtype)


def _encode(size: int, periods: Tensor) -> Tensor:
    """Return sines at even channels and cosines at odd ones, (size, channels)."""
    position = torch.arange(1, size + 1, dtype=torch.float32, device=periods.device) / (size + 1e-6) * (2 * math.pi)
    angles = position[:, None] / periods
    return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=2).flatten(1)


class Attention(nn.Module):
    """Attention with separate inputs for queries, keys and values (arXiv:1706.03762, "Multi-Head Attention").

    Args:
        embed_dim: width, E, a multiple of num_heads.
        num_heads: attention heads.
        dropout: dropout of the attention.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - query: (N, Q, E)
        - key, value: (N, L, E)
        - output: (N, Q, E)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = _HEADS,
        dropout: float = _DROPOUT,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        linear = functools.partial(nn.Linear, embed_dim, embed_dim, device=device, dtype=dtype)
        self.q, self.k, self.v = linear(), linear(), linear()
        self.drop = nn.Dropout(dropout)
        self.proj = linear()

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(
            self._split(self.q(query)),
            self._split(self.k(key)),
            self._split(self.v(value)),
            dropout_p=self.drop.p if self.training else 0.0,
        )
        return self.proj(x.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """Split into attention heads, (N, L, E) -> (N, heads, L, E / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class AttentionLayer(nn.Module):
    """Transformer layer: attention and an MLP, each added to its input and normalised.

    An encoder layer if memory is x itself; else a decoder layer without self-attention. Positions are added to queries
    and keys, not to values.

    Args:
        embed_dim: width, E.
        hidden_features: width inside the MLP.
        dropout: dropout of the attention, of its output and of the MLP.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - x, x_position: (N, Q, E)
        - memory, memory_position: (N, L, E)
        - output: (N, Q, E)
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_features: int = _HIDDEN_FEATURES,
        dropout: float = _DROPOUT,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attn = Attention(embed_dim, dropout=dropout, **factory_kwargs)
        self.drop = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(embed_dim, **factory_kwargs)
        self.mlp = Mlp(embed_dim, hidden_features, act_layer=nn.ReLU, drop=dropout, **factory_kwargs)
        self.norm2 = nn.LayerNorm(embed_dim, **factory_kwargs)

    def forward(self, x: Tensor, x_position: Tensor, memory: Tensor, memory_position: Tensor) -> Tensor:
        x = self.norm1(x + self.drop(self.attn(x + x_position, memory + memory_position, memory)))
        return self.norm2(x + self.mlp(x))


class LabelQueries(nn.Module):
    """A trained query for each label.

    Args:
        num_classes: number of labels, K.
        embed_dim: width, E.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - output: (K, E)
    """

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(num_classes, embed_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw from N(0, 1)."""
        nn.init.normal_(self.vectors)

    def forward(self) -> Tensor:
        return self.vectors


class LabelLinear(nn.Module):
    """A linear layer with one output for each label ("GroupWiseLinear" of the official code).

    Args:
        in_features: width of each label's embedding, E.
        num_classes: number of labels, K.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - input: (N, K, E)
        - output: (N, K)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw uniformly, as the official code does."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum(-1) + self.bias


class Query2LabelHead(nn.Module):
    """Query2Label: a query for each label attends to the encoded feature map (arXiv:2107.10834).

    A transformer replaces global pooling: one encoder layer, two decoder layers without self-attention, and a linear
    layer for each label, as in SlongLiu/query2labels, lib/models/query2label.py and transformer.py, commit 55eb050.

    Args:
        in_features: number of input channels, C.
        num_classes: number of labels, K; 0 to return the mean of the encoder's output over the pixels.
        pool_type: with num_classes 0, "" to return the input unchanged, as other heads do. All other values are the
            same, since this head does not pool.
        decoder_embedding: width of the transformer, E, a multiple of 4; None for C, without an embedding layer.
        hidden_features: width inside the transformer's MLPs.
        drop_rate: dropout before the last layer.
        dropout: dropout inside the transformer.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - input: (N, C, H, W)
        - output: (N, K); (N, E) without classes or with pre_logits; the input without classes and pooling

    Raises:
        ValueError: if decoder_embedding is not a multiple of 4.
    """

    __constants__ = ["encodes", "decodes"]  # lets TorchScript skip missing parts

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "avg",
        decoder_embedding: int | None = None,
        hidden_features: int = _HIDDEN_FEATURES,
        drop_rate: float = 0.0,
        dropout: float = _DROPOUT,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if decoder_embedding is not None and (decoder_embedding < 1 or decoder_embedding % _HEADS):
            raise ValueError(
                f"Query2LabelHead needs decoder_embedding in multiples of {_HEADS}, for as many attention heads, got "
                f"{decoder_embedding}"
            )
        self.in_features = in_features
        self.decoder_embedding = decoder_embedding or in_features
        self.hidden_features = hidden_features
        self.dropout = dropout
        self.drop = nn.Dropout(drop_rate)
        self.embedding: nn.Module = nn.Identity()
        self.encoder: nn.Module = nn.Identity()
        self.queries: nn.Module = nn.Identity()
        self.decoder = nn.ModuleList()
        self.norm: nn.Module = nn.Identity()
        self.fc: nn.Module = nn.Identity()
        self._build(num_classes, pool_type, device=device, dtype=dtype)

    def _build(self, num_classes: int, pool_type: str, **factory_kwargs: Any) -> None:
        SelectAdaptivePool2d(pool_type=pool_type)  # refuses an unknown pooling
        width = self.decoder_embedding
        layer = functools.partial(AttentionLayer, width, self.hidden_features, self.dropout, **factory_kwargs)
        self.num_classes = num_classes
        self.pool_type = pool_type
        self.decodes = num_classes > 0
        self.encodes = self.decodes or bool(pool_type)
        self.num_features = width if self.encodes else self.in_features
        if not self.encodes:
            self.embedding, self.encoder = nn.Identity(), nn.Identity()
        elif isinstance(self.encoder, nn.Identity):
            self.encoder = layer()
        if self.encodes and self.in_features != width and getattr(self.embedding, "in_features", 0) != self.in_features:
            self.embedding = nn.Linear(self.in_features, width, **factory_kwargs)
        if not self.decodes:
            self.queries, self.norm, self.fc = (nn.Identity() for _ in range(3))
            self.decoder = nn.ModuleList()
            return
        self.queries = LabelQueries(num_classes, width, **factory_kwargs)
        self.fc = LabelLinear(width, num_classes, **factory_kwargs)
        if not len(self.decoder):
            self.decoder = nn.ModuleList(layer() for _ in range(_DECODER_LAYERS))
            self.norm = nn.LayerNorm(width, **factory_kwargs)

    def draw_weights(self) -> None:
        """Initialise every weight; the transformer's matrices by Glorot's rule, as in the official code."""
        for module in self.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()
        for part in (self.encoder, self.decoder):
            for parameter in part.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the queries and the last layer; the encoder is kept, and the decoder unless num_classes is 0.

        Args:
            num_classes: number of classes; 0 for none.
            pool_type: as in the constructor; None to keep it.
        """
        self._build(num_classes, self.pool_type if pool_type is None else pool_type)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if not self.encodes:
            return x
        batch_size, _, height, width = x.shape
        memory = self.embedding(x.flatten(2).transpose(1, 2))  # (N, H * W, E)
        position = encode_position(height, width, self.decoder_embedding, memory)
        memory = self.encoder(memory, position, memory, position)
        if pre_logits or not self.decodes:
            return memory.mean(1)
        queries = self.queries()
        x = torch.zeros_like(queries).expand(batch_size, self.num_classes, self.decoder_embedding)
        for layer in self.decoder:
            x = layer(x, queries, memory, position)
        return self.fc(self.drop(self.norm(x)))

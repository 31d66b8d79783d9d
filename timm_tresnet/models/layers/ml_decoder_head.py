"""Classifier head whose classes ask for what they need: ML-Decoder (arXiv:2111.12933)."""

import copy
import functools
import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp, SelectAdaptivePool2d
from torch import Tensor, nn

from timm_tresnet.models.layers.observed import is_observed

_GROUPS = 100  # at most, unless asked for; this and the others as in the official code, `MLDecoder`
_HEADS = 8
_HIDDEN_FEATURES = 2048
_DROPOUT = 0.1


class GroupLinear(nn.Module):
    """A linear layer for each group, which gives the classes of that group ("Group-decoding", arXiv:2111.12933).

    Groups have ceil(num_classes / num_groups) outputs each, in order; those beyond the last class are cut off.

    Args:
        num_groups: number of groups, G.
        in_features: width of each group's embedding, E.
        num_classes: number of classes.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - input: (N, G, E)
        - output: (N, num_classes)
    """

    def __init__(
        self,
        num_groups: int,
        in_features: int,
        num_classes: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.in_features = in_features
        self.num_classes = num_classes
        shape = (num_groups, in_features, math.ceil(num_classes / num_groups))
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as the official code does, by Glorot's rule for a convolution of the weight's shape."""
        nn.init.xavier_normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.matmul(x.transpose(0, 1), self.weight)  # (G, N, classes of a group)
        return x.transpose(0, 1).flatten(1)[:, : self.num_classes] + self.bias

    def extra_repr(self) -> str:
        return f"num_groups={self.num_groups}, in_features={self.in_features}, num_classes={self.num_classes}"


class ClassQueries(nn.Module):
    """What the decoder is asked, once for each group of classes or for each label, and all that depends on it alone.

    Queries of groups are drawn once and never trained, hence a buffer, unless they are to be learnt, as in
    7eu7d7/ML-Danbooru (`learn_query` in src_files/ml_decoder/ml_decoder.py, commit bd0e61e). Those of labels are made
    of word embeddings, by a linear layer and ReLU, so that classes can be asked for that were not trained
    ("zero-shot"). In training each image has dropout of its own; what is left is added to the query, which in eval mode
    is so doubled.

    Args:
        num_queries: number of groups or labels, G; 0 for labels that are to come.
        embed_dim: width of a query, E.
        label_embedding: width of word embeddings, D; None for queries of groups.
        learned: whether the queries are trained, hence a parameter.
        dropout: of the queries.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - vectors: queries, (G, E), or word embeddings, (G, D), drawn from N(0, 1)
        - input: the number of images, N
        - output: normalised queries, and these projected for the attention: each (N, G, E), in eval mode (G, E)

    Raises:
        ValueError: in `forward`, if there are no labels.
    """

    vectors: Tensor

    def __init__(
        self,
        num_queries: int,
        embed_dim: int,
        label_embedding: int | None = None,
        learned: bool = False,
        dropout: float = _DROPOUT,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        vectors = torch.empty(num_queries, label_embedding or embed_dim, **factory_kwargs)
        if learned:
            self.vectors = nn.Parameter(vectors)
        else:
            self.register_buffer("vectors", vectors)
        self.embed: nn.Module = nn.Identity()
        if label_embedding:
            self.embed = nn.Sequential(OrderedDict(fc=nn.Linear(label_embedding, embed_dim, **factory_kwargs)))
            self.embed.add_module("act", nn.ReLU())
        self.drop = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(embed_dim, **factory_kwargs)
        self.proj = nn.Linear(embed_dim, embed_dim, **factory_kwargs)
        self.draw_weights()

    def draw_weights(self) -> None:
        """Draw vectors from N(0, 1), the projection as `torch.nn.MultiheadAttention` does, the rest as PyTorch does."""
        nn.init.normal_(self.vectors)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.reset_parameters()
        _draw_projection(self.proj)

    @torch.jit.ignore
    def set_vectors(self, vectors: Tensor) -> None:
        """Put in other vectors, on the device and in the dtype of those that were there."""
        with torch.inference_mode(False):  # what is made inside that mode can never be trained with
            vectors = vectors.detach().to(self.vectors, copy=True)
            learned = isinstance(self.vectors, nn.Parameter)
            self.vectors = nn.Parameter(vectors, self.vectors.requires_grad) if learned else vectors

    def forward(self, batch_size: int) -> tuple[Tensor, Tensor]:
        if self.vectors.shape[0] == 0:
            raise ValueError("This network has no labels yet; give it some by set_label_embeddings(names, vectors)")
        queries = self.embed(self.vectors)
        if self.training:
            queries = queries.expand(batch_size, queries.shape[0], queries.shape[1])
        queries = self.norm(queries + self.drop(queries))
        return queries, self.proj(queries)

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Compute queries once, as in eval mode; with hooks or patched methods, return self.

        The name under which `timm.utils.reparameterize_model` looks for this; the result refuses to run in training
        mode.
        """
        if is_observed(*self.modules()):
            return self
        with torch.no_grad():
            folded = FoldedQueries(*copy.deepcopy(self).eval()(1))
        return folded.train(self.training)


class FoldedQueries(nn.Module):
    """Constant queries: what `ClassQueries.fuse` returns.

    Args:
        queries: normalised queries, (G, E).
        projected: what they ask, (G, E).

    Raises:
        ValueError: in `forward`, if in training mode.
    """

    queries: Tensor
    projected: Tensor

    def __init__(self, queries: Tensor, projected: Tensor) -> None:
        super().__init__()
        self.register_buffer("queries", queries)
        self.register_buffer("projected", projected)

    def forward(self, batch_size: int) -> tuple[Tensor, Tensor]:
        if self.training:
            raise ValueError(
                "This network's queries are folded, which computes what they do in eval mode; call eval() before "
                "running it, and train the network as it was before folding"
            )
        return self.queries, self.projected

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Return self: nothing is left to fold."""
        return self


class DecoderLayer(nn.Module):
    """Transformer decoder without self-attention: queries look at an image, then each goes through a small network.

    Args:
        embed_dim: width of queries and image, E.
        num_heads: heads of the attention.
        hidden_features: width inside the small network.
        dropout: of the attention, of its output and of the small network.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - queries, projected: (N, G, E) or (G, E), as `ClassQueries` gives them
        - memory: the image, (N, L, E)
        - output: (N, G, E)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = _HEADS,
        hidden_features: int = _HIDDEN_FEATURES,
        dropout: float = _DROPOUT,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.kv = nn.Linear(embed_dim, 2 * embed_dim, **factory_kwargs)
        self.attn_drop = nn.Dropout(dropout)
        self.proj = nn.Linear(embed_dim, embed_dim, **factory_kwargs)
        self.proj_drop = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(embed_dim, **factory_kwargs)
        self.mlp = Mlp(embed_dim, hidden_features, act_layer=nn.ReLU, drop=dropout, **factory_kwargs)
        self.norm3 = nn.LayerNorm(embed_dim, **factory_kwargs)
        self.draw_weights()

    def draw_weights(self) -> None:
        """Draw the attention as `torch.nn.MultiheadAttention` does, the rest as PyTorch does."""
        for module in (self.proj, self.norm2, self.mlp.fc1, self.mlp.fc2, self.norm3):
            module.reset_parameters()
        nn.init.zeros_(self.proj.bias)
        _draw_projection(self.kv)

    def forward(self, queries: Tensor, projected: Tensor, memory: Tensor) -> Tensor:
        batch_size, (num_queries, embed_dim) = memory.shape[0], queries.shape[-2:]
        q = projected.expand(batch_size, num_queries, embed_dim)
        k, v = self.kv(memory).chunk(2, dim=-1)
        x = F.scaled_dot_product_attention(
            self._split(q), self._split(k), self._split(v), dropout_p=self.attn_drop.p if self.training else 0.0
        )
        x = x.transpose(1, 2).flatten(2)  # (N, G, E)
        x = self.norm2(queries + self.proj_drop(self.proj(x)))
        return self.norm3(x + self.mlp(x))

    def _split(self, x: Tensor) -> Tensor:
        """A part for each head of the attention, (N, L, E) -> (N, heads, L, E / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _draw_projection(linear: nn.Linear) -> None:
    """Glorot's rule for the queries', keys' and values' projections as one matrix, (3 * E, E)."""
    bound = math.sqrt(6 / (4 * linear.in_features))
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)


class MLDecoderHead(nn.Module):
    """Classes, in groups, look for themselves in the feature map: ML-Decoder (arXiv:2111.12933).

    A transformer decoder without self-attention in place of global pooling: queries of groups ("group-decoding") attend
    to the embedded pixels of the last feature map, and a linear layer a group gives the logits of its classes. For
    zero-shot, there is a query for each label, of its word embedding, and one linear layer for all.

    Args:
        in_features: number of input channels, C.
        num_classes: number of classes; 0 to hand out the mean of what the decoder says of the groups.
        pool_type: "" to hand out the input as it is where there are no classes, as the other heads do. Nothing else is
            pooled, whatever it is.
        num_groups: number of groups, G; None for 100. Never more than there are classes.
        decoder_embedding: width of the decoder, E, a multiple of 8.
        label_embedding: width of word embeddings, D, for zero-shot; None for groups.
        learn_queries: train the queries of groups too.
        drop_rate: dropout before the last layer.
        dropout: dropout inside the decoder.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - input: (N, C, H, W)
        - output: (N, num_classes); without classes or with pre_logits (N, E); without classes and pooling the input

    Raises:
        ValueError: if an argument is not one of the above.
    """

    __constants__ = ["decodes"]  # so that TorchScript does not look at a decoder that is not there

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "avg",
        num_groups: int | None = None,
        decoder_embedding: int = 768,
        label_embedding: int | None = None,
        learn_queries: bool = False,
        drop_rate: float = 0.0,
        dropout: float = _DROPOUT,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_groups", num_groups), ("label_embedding", label_embedding)):
            if value is not None and (isinstance(value, bool) or value < 1):
                raise ValueError(f"MLDecoderHead needs {name} to be at least 1 or None, got {value}")
        if learn_queries and label_embedding is not None:
            raise ValueError(
                "MLDecoderHead needs learn_queries or label_embedding, not both: each label has a query of its own"
            )
        if decoder_embedding < 1 or decoder_embedding % _HEADS:
            raise ValueError(
                f"MLDecoderHead needs decoder_embedding in multiples of {_HEADS}, for as many attention heads, got "
                f"{decoder_embedding}"
            )
        self.in_features = in_features
        self.num_groups = num_groups or _GROUPS
        self.decoder_embedding = decoder_embedding
        self.label_embedding = label_embedding
        self.learn_queries = learn_queries
        self.dropout = dropout
        self.drop = nn.Dropout(drop_rate)
        self.embedding: nn.Module = nn.Identity()
        self.queries: nn.Module = nn.Identity()
        self.decoder: nn.Module = nn.Identity()
        self.fc: nn.Module = nn.Identity()
        self._build(num_classes, pool_type, device=device, dtype=dtype)

    def _build(self, num_classes: int, pool_type: str, **factory_kwargs: Any) -> None:
        SelectAdaptivePool2d(pool_type=pool_type)  # refuses what is none
        width = self.decoder_embedding
        self.num_classes = num_classes
        self.pool_type = pool_type
        self.decodes = num_classes > 0 or bool(pool_type)
        self.num_features = width if self.decodes else self.in_features
        if not self.decodes:
            self.embedding, self.queries, self.decoder, self.fc = (nn.Identity() for _ in range(4))
            return
        if self.label_embedding:
            num_queries = num_classes
            if not isinstance(self.fc, nn.Linear):  # it serves all labels, so other ones keep it
                self.fc = nn.Linear(width, 1, **factory_kwargs)
                self._draw_classifier()
        else:
            num_queries = min(self.num_groups, num_classes or self.num_groups)
            grouped = functools.partial(GroupLinear, num_queries, width, num_classes, **factory_kwargs)
            self.fc = grouped() if num_classes > 0 else nn.Identity()
        if getattr(self.embedding, "in_features", None) != self.in_features:
            self.embedding = nn.Linear(self.in_features, width, **factory_kwargs)
        if isinstance(self.decoder, nn.Identity):
            self.queries = ClassQueries(
                num_queries, width, self.label_embedding, self.learn_queries, self.dropout, **factory_kwargs
            )
            self.decoder = DecoderLayer(width, dropout=self.dropout, **factory_kwargs)
        elif num_classes > 0 and isinstance(self.queries, ClassQueries):  # not folded: `reset` asks
            self.queries.set_vectors(torch.randn(num_queries, self.queries.vectors.shape[1]))

    def _draw_classifier(self) -> None:
        if isinstance(self.fc, nn.Linear):
            nn.init.xavier_normal_(self.fc.weight)
            nn.init.zeros_(self.fc.bias)

    def draw_weights(self) -> None:
        """Draw every weight, as for a new head."""
        for module in self.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()
        for module in self.modules():
            if isinstance(module, ClassQueries | DecoderLayer):
                module.draw_weights()
        self._draw_classifier()

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Put in new queries, unless there are no classes, and for groups a new last layer; the decoder stays.

        That of labels serves whatever labels there are, and stays too. All is new after a feature map was handed out.

        Args:
            num_classes: number of classes; 0 for none.
            pool_type: as above; None to leave it as it is.

        Raises:
            ValueError: if the queries are folded.
        """
        if isinstance(self.queries, FoldedQueries):
            raise ValueError("MLDecoderHead needs queries that are not folded to be reset; reset it before folding")
        self._build(num_classes, self.pool_type if pool_type is None else pool_type)

    @torch.jit.ignore
    def set_label_embeddings(self, vectors: Tensor) -> None:
        """Ask for these labels from now on, for zero-shot; nothing else changes.

        Args:
            vectors: a word embedding for each label, (num_classes, D).

        Raises:
            ValueError: if the head has groups instead of labels, or its queries are folded, or it hands out the feature
                map, or vectors are not numbers of that shape that are finite in the dtype of the head.
        """
        if self.label_embedding is not None and not self.decodes:
            raise ValueError(
                "set_label_embeddings needs a decoder, and this network hands out its feature map; call "
                "reset_classifier(1, 'avg') before, or make the network with a global_pool other than ''"
            )
        if not isinstance(self.queries, ClassQueries) or self.label_embedding is None:
            raise ValueError(
                "set_label_embeddings needs a head that makes queries of word embeddings, not folded; make the network "
                "with head='ml_decoder' and label_embedding=WIDTH"
            )
        if vectors.layout != torch.strided:
            raise ValueError(f"set_label_embeddings needs dense vectors, got {vectors.layout}; call to_dense() on them")
        shape = tuple(vectors.shape)
        if len(shape) != 2 or shape[0] < 1 or shape[1] != self.label_embedding or not vectors.is_floating_point():
            raise ValueError(
                f"set_label_embeddings needs vectors of shape (labels, {self.label_embedding}) in floating point, got "
                f"{shape} in {vectors.dtype}"
            )
        dtype = self.queries.vectors.dtype
        if not torch.isfinite(vectors.to(dtype)).all():
            raise ValueError(
                f"set_label_embeddings needs vectors of finite numbers, got some that are NaN or infinite in {dtype}"
            )
        self.queries.set_vectors(vectors)
        self.num_classes = shape[0]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Without classes, as many queries as the state dict has, such as it is behind `reset(0)`."""
        vectors = state_dict.get(f"{prefix}queries.vectors")
        if self.num_classes == 0 and isinstance(self.queries, ClassQueries) and vectors is not None:
            if vectors.shape[1:] == self.queries.vectors.shape[1:]:
                self.queries.set_vectors(vectors)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if not self.decodes:
            return x
        memory = F.relu(self.embedding(x.flatten(2).transpose(1, 2)))  # (N, H * W, E)
        queries, projected = self.queries(x.shape[0])
        x = self.drop(self.decoder(queries, projected, memory))  # (N, G, E)
        if pre_logits or self.num_classes == 0:
            return x.mean(1)
        return self.fc(x).flatten(1)

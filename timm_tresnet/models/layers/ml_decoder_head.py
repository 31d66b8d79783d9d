"""ML-Decoder, a classifier head with attention in place of pooling (arXiv:2111.12933)."""

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

_GROUPS = 100  # default; this and the following as in the official code, `MLDecoder`
_HEADS = 8
_HIDDEN_FEATURES = 2048
_DROPOUT = 0.1


class GroupLinear(nn.Module):
    """A linear layer for each group, which returns the logits of its classes ("Group-decoding", arXiv:2111.12933).

    Each group has ceil(num_classes / num_groups) outputs, in order; outputs beyond the last class are cut off.

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
        """Draw the weight as the official code does: Glorot normal, with fans as for a convolution's weight."""
        nn.init.xavier_normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.matmul(x.transpose(0, 1), self.weight)  # (G, N, classes of a group)
        return x.transpose(0, 1).flatten(1)[:, : self.num_classes] + self.bias

    def extra_repr(self) -> str:
        return f"num_groups={self.num_groups}, in_features={self.in_features}, num_classes={self.num_classes}"


class ClassQueries(nn.Module):
    """The decoder's queries, one for each group of classes or for each label, normalised and projected.

    Queries of groups are random and constant, hence a buffer; or they are trained, as in 7eu7d7/ML-Danbooru
    (`learn_query` in src_files/ml_decoder/ml_decoder.py, commit bd0e61e). Queries of labels are computed from word
    embeddings by a linear layer and ReLU, so that new labels can be added without training ("zero-shot"). The query is
    norm(q + dropout(q)), as in the official code; dropout differs for each image, and in eval mode q is doubled.

    Args:
        num_queries: number of groups or labels, G; 0 if the labels are set later.
        embed_dim: width of a query, E.
        label_embedding: width of word embeddings, D; None for queries of groups.
        learned: whether the queries are trained, hence a parameter.
        dropout: dropout of the queries.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - vectors: queries, (G, E), or word embeddings, (G, D), initially from N(0, 1)
        - input: the number of images, N
        - output: normalised queries, and the same projected for the attention: each (N, G, E), in eval mode (G, E)

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
        """Replace the vectors; device and dtype stay."""
        with torch.inference_mode(False):  # tensors from inference mode cannot be trained
            vectors = vectors.detach().to(self.vectors, copy=True)
            learned = isinstance(self.vectors, nn.Parameter)
            self.vectors = nn.Parameter(vectors, self.vectors.requires_grad) if learned else vectors

    def forward(self, batch_size: int) -> tuple[Tensor, Tensor]:
        if self.vectors.shape[0] == 0:
            raise ValueError("This network has no labels yet; call set_label_embeddings(names, vectors) first")
        queries = self.embed(self.vectors)
        if self.training:
            queries = queries.expand(batch_size, queries.shape[0], queries.shape[1])
        queries = self.norm(queries + self.drop(queries))
        return queries, self.proj(queries)

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Compute the queries of eval mode once; with hooks or patched methods, return self.

        `timm.utils.reparameterize_model` calls this name. The result refuses to run in training mode.
        """
        if is_observed(*self.modules()):
            return self
        with torch.no_grad():
            folded = FoldedQueries(*copy.deepcopy(self).eval()(1))
        return folded.train(self.training)


class FoldedQueries(nn.Module):
    """Constant queries; returned by `ClassQueries.fuse`.

    Args:
        queries: normalised queries, (G, E).
        projected: the queries projected for the attention, (G, E).

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
                "This network's queries are folded, so it needs eval mode, got training mode; call eval() before "
                "running it, and train the network that was not folded"
            )
        return self.queries, self.projected

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Return self: nothing is left to fold."""
        return self


class DecoderLayer(nn.Module):
    """Transformer decoder layer without self-attention: cross-attention from queries to an image, then an MLP.

    Args:
        embed_dim: width of queries and image, E.
        num_heads: attention heads.
        hidden_features: width inside the MLP.
        dropout: dropout of the attention, of its output and of the MLP.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - queries, projected: (N, G, E) or (G, E), from `ClassQueries`
        - memory: the image's L pixels, (N, L, E)
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
        """Split into attention heads, (N, L, E) -> (N, heads, L, E / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _draw_projection(linear: nn.Linear) -> None:
    """Draw by Glorot's rule for the joint projection of queries, keys and values, a matrix (3 * E, E)."""
    bound = math.sqrt(6 / (4 * linear.in_features))
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)


class MLDecoderHead(nn.Module):
    """ML-Decoder: groups of classes attend to the feature map (arXiv:2111.12933).

    A transformer decoder without self-attention replaces global pooling. Queries of groups ("group-decoding") attend to
    the embedded pixels of the last feature map, and a linear layer for each group returns the logits of its classes.
    For zero-shot, each label has a query computed from its word embedding, and all labels share one linear layer.

    Args:
        in_features: number of input channels, C.
        num_classes: number of classes; 0 to return the mean of the decoder's output over the groups.
        pool_type: with num_classes 0, "" to return the input unchanged, as other heads do. All other values are the
            same, since this head does not pool.
        num_groups: number of groups, G, at most num_classes; None for 100.
        decoder_embedding: width of the decoder, E, a multiple of 8.
        label_embedding: width of word embeddings, D, for zero-shot; None for groups.
        learn_queries: whether the queries of groups are trained.
        drop_rate: dropout before the last layer.
        dropout: dropout inside the decoder.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - input: (N, C, H, W)
        - output: (N, num_classes); (N, E) without classes or with pre_logits; the input without classes and pooling

    Raises:
        ValueError: if an argument has another value than these.
    """

    __constants__ = ["decodes"]  # lets TorchScript skip a missing decoder

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
                "MLDecoderHead needs learn_queries or label_embedding, not both: queries of labels are computed from "
                "their embeddings"
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
        SelectAdaptivePool2d(pool_type=pool_type)  # refuses an unknown pooling
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
            if not isinstance(self.fc, nn.Linear):  # shared by all labels, so it is kept for new ones
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
        elif num_classes > 0 and isinstance(self.queries, ClassQueries):  # never folded here, `reset` checks
            self.queries.set_vectors(torch.randn(num_queries, self.queries.vectors.shape[1]))

    def _draw_classifier(self) -> None:
        if isinstance(self.fc, nn.Linear):
            nn.init.xavier_normal_(self.fc.weight)
            nn.init.zeros_(self.fc.bias)

    def draw_weights(self) -> None:
        """Initialise every weight."""
        for module in self.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()
        for module in self.modules():
            if isinstance(module, ClassQueries | DecoderLayer):
                module.draw_weights()
        self._draw_classifier()

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the queries and, for groups, the last layer; the decoder is kept.

        The last layer of labels is shared by all labels and kept too. Without classes, the queries are kept. If the
        head had no decoder, because it returned its input, everything is new.

        Args:
            num_classes: number of classes; 0 for none.
            pool_type: as in the constructor; None to keep it.

        Raises:
            ValueError: if the queries are folded.
        """
        if isinstance(self.queries, FoldedQueries):
            raise ValueError("MLDecoderHead cannot be reset once its queries are folded; reset it before folding")
        self._build(num_classes, self.pool_type if pool_type is None else pool_type)

    @torch.jit.ignore
    def set_label_embeddings(self, vectors: Tensor) -> None:
        """Set the labels for zero-shot; nothing else changes.

        Args:
            vectors: a word embedding for each label, (num_classes, D).

        Raises:
            ValueError: if the head has groups instead of labels, its queries are folded, or it has no decoder; or if
                vectors have another shape or are not finite in the head's dtype.
        """
        if self.label_embedding is not None and not self.decodes:
            raise ValueError(
                "set_label_embeddings needs a decoder, but this network returns its feature map; call "
                "reset_classifier(1, 'avg') before, or make the network with a global_pool other than ''"
            )
        if not isinstance(self.queries, ClassQueries) or self.label_embedding is None:
            raise ValueError(
                "set_label_embeddings needs a head with label embeddings that is not folded; make the network "
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
        """Load a state dict; without classes, the number of queries is taken from it, as after `reset(0)`."""
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

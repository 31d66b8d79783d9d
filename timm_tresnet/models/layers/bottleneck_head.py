"""Classifier head with two linear layers."""

import functools

import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn


class BottleneckHead(nn.Module):
    """Pooling and two linear layers, embedding and classifier, without an activation between them.

    Needs fewer weights for thousands of classes; the official code's `bottleneck_head` (Alibaba-MIIL/ASL). Without
    pooling, every pixel of the feature map is classified.

    Args:
        in_features: number of input channels, C.
        hidden_features: width of the embedding.
        num_classes: number of classes; 0 to return the embedding, or the input if there is no pooling either.
        pool_type: pooling, a name of `timm.layers.SelectAdaptivePool2d`; "" for none.
        drop_rate: dropout before the embedding.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - input: (N, C, H, W)
        - output: (N, num_classes); (N, hidden_features) without classes or with pre_logits; without pooling also
          height and width, (N, num_classes, H, W)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        num_classes: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.drop = nn.Dropout(drop_rate)
        self._build(num_classes, pool_type, device, dtype)

    def _build(
        self,
        num_classes: int,
        pool_type: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        linear = functools.partial(nn.Linear, device=device, dtype=dtype)
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        pooled_features = self.in_features * self.global_pool.feat_mult()
        embeds = num_classes > 0 or bool(pool_type)
        self.num_features = self.hidden_features if embeds else pooled_features
        self.embedding = linear(pooled_features, self.hidden_features) if embeds else nn.Identity()
        self.fc = linear(self.hidden_features, num_classes) if num_classes > 0 else nn.Identity()

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the classifier; the embedding is kept unless the number of its inputs changes.

        Args:
            num_classes: number of classes; 0 for none.
            pool_type: pooling; None to keep it, "" for none.
        """
        embedding = self.embedding
        pool = self.global_pool
        self._build(num_classes, getattr(pool, "pool_type", "avg") if pool_type is None else pool_type)
        if pool_type is None and not hasattr(pool, "pool_type"):  # user-defined
            self.global_pool = pool
        if isinstance(embedding, nn.Linear) and isinstance(self.embedding, nn.Linear):
            if embedding.in_features == self.embedding.in_features:
                self.embedding = embedding

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.global_pool(x))
        unpooled = getattr(self.global_pool, "pool_type", "user-defined") == ""
        if unpooled:
            x = x.permute(0, 2, 3, 1)
        x = self.embedding(x)
        if not pre_logits:
            x = self.fc(x)
        return x.permute(0, 3, 1, 2) if unpooled else x

"""Classifier head of two linear layers."""

import functools

import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn


class BottleneckHead(nn.Module):
    """Pool, embed in fewer features, classify; no activation between the two linear layers.

    Saves weights where there are thousands of classes; the official code's `bottleneck_head` (Alibaba-MIIL/ASL).
    Without pooling there are neither embedding nor classes, and the input is handed out as it is.

    Args:
        in_features: number of input channels, C.
        hidden_features: width of the embedding.
        num_classes: number of classes; 0 to hand out the embedding.
        pool_type: pooling, as `timm.layers.SelectAdaptivePool2d` takes it; "" for none.
        drop_rate: dropout before the embedding.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - input: (N, C, H, W)
        - output: (N, num_classes); without classes (N, hidden_features)

    Raises:
        ValueError: if there are classes but no pooling.
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
        if num_classes > 0 and not pool_type:
            raise ValueError(f"BottleneckHead needs pooling to tell {num_classes} classes apart, got pool_type=''")
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        pooled_features = self.in_features * self.global_pool.feat_mult()
        self.num_features = self.hidden_features if pool_type else pooled_features
        self.embedding = linear(pooled_features, self.hidden_features) if pool_type else nn.Identity()
        self.fc = linear(self.hidden_features, num_classes) if num_classes > 0 else nn.Identity()

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Put in a new classifier; the embedding stays unless its input changes.

        Args:
            num_classes: number of classes; 0 for none.
            pool_type: pooling; None to leave it as it is, "" for none.
        """
        embedding = self.embedding
        self._build(num_classes, self.global_pool.pool_type if pool_type is None else pool_type)
        if isinstance(embedding, nn.Linear) and isinstance(self.embedding, nn.Linear):
            if embedding.in_features == self.embedding.in_features:
                self.embedding = embedding

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.embedding(self.drop(self.global_pool(x)))
        return x if pre_logits else self.fc(x)

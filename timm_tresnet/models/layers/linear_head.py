"""Classifier head with one linear layer."""

from typing import Any

import torch
from timm.layers import ClassifierHead, SelectAdaptivePool2d
from torch import Tensor


class LinearHead(ClassifierHead):
    """timm's classifier head: pooling and a linear layer; without pooling, every pixel is classified.

    Arguments are those of `timm.layers.ClassifierHead`. Its parts can be replaced by user-defined modules: the pooling
    or, without pooling, `fc` by a convolution.

    Shape:
        - input: (N, C, H, W)
        - output: (N, num_classes); without pooling (N, num_classes, H, W); without classes, the pooled input
    """

    @torch.jit.ignore
    def reset(self, num_classes: int, pool_type: str | None = None, **kwargs: Any) -> None:
        """Replace the classifier, see `timm.layers.ClassifierHead.reset`; a user-defined pooling is kept.

        Args:
            num_classes: number of classes; 0 for none.
            pool_type: pooling; None to keep it, "" for none.
            **kwargs: further arguments of `timm.layers.ClassifierHead.reset`.
        """
        pool = self.global_pool
        if hasattr(pool, "pool_type"):
            super().reset(num_classes, pool_type, **kwargs)
            return
        self.global_pool = SelectAdaptivePool2d(pool_type="avg")  # same number of features as a user-defined pooling
        super().reset(num_classes, pool_type, **kwargs)
        if pool_type is None:
            self.global_pool = pool

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.global_pool(x))
        if pre_logits:
            return self.flatten(x)
        if hasattr(self.fc, "in_features") and getattr(self.global_pool, "pool_type", "user-defined") == "":
            return self.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # a linear layer takes features last
        return self.flatten(self.fc(x))

"""Classifier head of one linear layer."""

from timm.layers import ClassifierHead
from torch import Tensor


class LinearHead(ClassifierHead):
    """Pool and classify, as timm's head does; without pooling, classify every pixel of the feature map.

    Arguments are those of `timm.layers.ClassifierHead`.

    Shape:
        - input: (N, C, H, W)
        - output: (N, num_classes); without pooling (N, num_classes, H, W); without classes the pooled input
    """

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.global_pool(x))
        if pre_logits:
            return x
        if self.global_pool.pool_type == "":
            return self.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.fc(x)

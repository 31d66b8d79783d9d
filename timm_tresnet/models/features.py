"""timm's feature extractors, with stages that still recompute and checkpoint."""

from typing import Any

from timm.layers import Format, get_notrace_functions, get_notrace_modules
from timm.models import FeatureDictNet, FeatureGraphNet, FeatureHookNet, FeatureInfo, FeatureListNet
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from timm_tresnet.recompute.stage import Stage


class _Checkpointing(nn.Module):
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn on the stages' own checkpointing; timm's would update running statistics twice a batch."""
        set_checkpointing(self, enable)


def set_checkpointing(network: nn.Module, enable: bool) -> None:
    """Turn the checkpointing of all stages of a network on or off."""
    for module in network.modules():
        if isinstance(module, Stage):
            module.grad_checkpointing = enable


class FeatureList(_Checkpointing, FeatureListNet):
    """Features by a list of modules (`feature_cls="list"`); arguments are those of `timm.models.FeatureListNet`."""


class FeatureDict(_Checkpointing, FeatureDictNet):
    """Features by name (`feature_cls="dict"`); arguments are those of `timm.models.FeatureDictNet`."""


class FeatureHook(_Checkpointing, FeatureHookNet):
    """Features by hooks (`feature_cls="hook"`); arguments are those of `timm.models.FeatureHookNet`."""


class FeatureGraph(_Checkpointing, FeatureGraphNet):
    """Features by a traced graph (`feature_cls="fx"`) that calls stages as a whole.

    Args:
        model: the network.
        out_indices: indices of the features to return.
        out_map: names of the features; None for the modules' names.
        output_fmt: "NCHW", the only supported layout.
        return_dict: return a dict by name instead of a list.
        flatten_sequential: ignored; timm 1.0.29 passes it to every class.
    """

    def __init__(
        self,
        model: Any,
        out_indices: tuple[int, ...],
        out_map: Any = None,
        output_fmt: str = "NCHW",
        return_dict: bool = False,
        flatten_sequential: bool = True,
    ) -> None:
        nn.Module.__init__(self)  # timm's constructor would trace into the stages
        self.feature_info = FeatureInfo(model.feature_info, out_indices)
        names = self.feature_info.module_name()
        leaves = {"leaf_modules": [*get_notrace_modules(), Stage], "autowrap_functions": [*get_notrace_functions()]}
        nodes = dict(zip(names, out_map or names, strict=True))
        self.graph_module = create_feature_extractor(model, nodes, tracer_kwargs=leaves)
        self.output_fmt = Format(output_fmt)
        self.return_dict = return_dict  # type: ignore[misc]  # final in timm's class, whose constructor this replaces


FEATURE_CLASSES = {  # replace timm's classes of these names
    "list": FeatureList,
    "dict": FeatureDict,
    "hook": FeatureHook,
    "fx": FeatureGraph,
}

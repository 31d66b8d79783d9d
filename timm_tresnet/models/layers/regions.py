"""Which modules run in regions of the compiler (`timm_tresnet.recompute.compiled`), where everything may run twice."""

import torch
from torch import nn

from timm_tresnet.models.layers.activated_batch_norm import ActivatedBatchNorm2d
from timm_tresnet.recompute.eligibility import is_untouched, is_user_defined


class RunsInRegion(nn.Module):
    """A module that a region can hold, unless something in it draws, counts or overwrites when it runs again.

    Hooks of FSDP, which free and gather weights, are among what no region can hold.
    """

    @torch.jit.unused
    def fits_region(self) -> bool:
        """Whether a region can hold this module as it is now."""
        return not is_user_defined(self, adapters=False) and all(_fits(part) for part in self.modules())


def _fits(part: nn.Module) -> bool:
    kind = type(part).__module__
    if not is_untouched(part) or isinstance(part, nn.RReLU):
        return False
    if kind == "timm.layers.drop" and type(part).__name__ != "DropPath":
        return False
    if isinstance(part, ActivatedBatchNorm2d):
        if not part.fits_region():
            return False
    elif isinstance(part, nn.modules.batchnorm._NormBase):
        return False
    is_norm = isinstance(part, ActivatedBatchNorm2d) or kind == "timm.layers.norm_act"
    for name, child in part.named_children():  # an activation may overwrite what a norm has returned
        if getattr(child, "inplace", False) and not (
            name == "act" and (is_norm or (type(child) is nn.ReLU and kind.startswith("timm_tresnet.")))
        ):
            return False
    return True

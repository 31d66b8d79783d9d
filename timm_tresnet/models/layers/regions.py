"""Which modules may be in regions of the compiler (`timm_tresnet.recompute.compiled`), where code may run twice."""

import torch
from torch import nn

from timm_tresnet.models.layers.activated_batch_norm import ActivatedBatchNorm2d
from timm_tresnet.recompute.eligibility import is_untouched, is_user_defined


class RunsInRegion(nn.Module):
    """A module that may be in a region, unless running it twice would draw, count or overwrite twice.

    FSDP's hooks, which free and gather weights, may not be in a region.
    """

    @torch.jit.unused
    def fits_region(self) -> bool:
        """Whether this module, in its present state, may be in a region."""
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
    for name, child in part.named_children():  # in place is allowed only for an activation on its norm's output
        if getattr(child, "inplace", False) and not (
            name == "act" and (is_norm or (type(child) is nn.ReLU and kind.startswith("timm_tresnet.")))
        ):
            return False
    return True

"""What the compiler keeps for backward: the policy of `timm_tresnet.recompute.rebuild`, told to `torch.compile`.

In eager mode a tape and hooks let tensors go. The compiler sees forward and backward as one graph and decides itself
what to keep. It keeps to `torch.utils.checkpoint` with a policy (selective checkpointing): in a *region*, a few blocks
that run one after the other, it saves the outputs of the operators that the policy names and the input of the region,
and computes all else again where backward needs it. Everything stays in one graph, and no hook is left in it.

=========================================  =============  ============  ==================
saved                                      "activations"  "expansions"  grad checkpointing
=========================================  =============  ============  ==================
convolution of feature maps, blur          yes            yes           no
1x1 convolution that widens fourfold       yes            no            no
the same, more than fourfold               no             yes           no
convolution in squeeze-and-excitation      yes            yes           yes
statistics of norms, means of channels     yes            yes           yes
random numbers                             yes            yes           yes
=========================================  =============  ============  ==================

A 1x1 convolution that widens fourfold is the last one of a bottleneck. One does more, on the shortcut into the first
bottleneck of TResNet-M: it makes much of little, but with "expansions" a step would peak higher without it. Regions end
where eager mode keeps an output (`stages`). `docs/measurements.md` has what was measured of other ends.
"""

import functools
import hashlib
import marshal
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_aten = torch.ops.aten
_SAVED = (
    _aten.mean.dim,
    _aten.var_mean.correction,
    _aten.copy_.default,  # into running statistics; a backend that runs Dynamo's graph as it is would do that twice
)

_in_region = False  # while the compiler traces one


def is_in_region() -> bool:
    """Whether the compiler is tracing a region, where nothing may work in place but on running statistics."""
    return _in_region and torch.compiler.is_compiling()


def run_region(modules: list[nn.Module], x: Tensor, setting: str) -> Tensor:
    """Run modules one after the other, of which backward rebuilds what the setting says.

    Args:
        modules: of the region.
        x: what the first of them takes.
        setting: "activations", "expansions", or "convolutions" for all of them to run again.
    """

    def run(x: Tensor) -> Tensor:
        for module in modules:
            x = module(x)
        return x

    global _in_region
    if not torch.compiler.is_compiling():  # it has given up, after too many versions of this function
        return run(x)
    _in_region = True
    try:
        return checkpoint(run, x, use_reentrant=False, context_fn=_CONTEXTS[setting])
    finally:
        _in_region = False


def _choose(setting: str, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What to do with the output of an operator, args being its arguments."""
    if operator is _aten.convolution.default:
        saves = _saves_convolution(setting, *args[:2])
    else:
        saves = operator in _SAVED or torch.Tag.nondeterministic_seeded in operator.tags
    return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE


def _saves_convolution(setting: str, x: Tensor, weight: Tensor) -> bool:
    if math.prod(x.shape[2:]) == 1:
        return True
    outputs, inputs, *kernel = weight.shape
    widening = outputs / inputs if kernel == [1, 1] else 0
    return {"activations": widening <= 4, "expansions": widening != 4, "convolutions": False}[setting]


# Of the code that decides, which may change without the version.
_POLICY_HASH = hashlib.sha256(marshal.dumps((_choose.__code__, _saves_convolution.__code__, str(_SAVED)))).hexdigest()


def _make_contexts(setting: str) -> functools.partial:
    make = functools.partial(
        create_selective_checkpoint_contexts,
        functools.partial(_choose, setting),
        allow_cache_entry_mutation=True,  # running statistics change again in the next forward
    )
    # Without this, the compiler does not look for graphs that it has cached on the disk.
    make.cache_hash = f"{setting} {_POLICY_HASH}"
    return make


_CONTEXTS = {setting: _make_contexts(setting) for setting in ("activations", "expansions", "convolutions")}

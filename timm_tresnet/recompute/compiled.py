"""What the compiler stores for backward: the policy, told to `torch.compile`.

The compiler sees forward and backward as one graph and decides itself what to store. It keeps to
`torch.utils.checkpoint` with a policy (selective checkpointing): in a *region*, a few blocks that run one after the
other, it stores the outputs of the operators that the policy names and the input of the region, and recomputes the
rest. Everything stays in one graph without hooks. Regions end where eager mode stores an output.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from timm_tresnet.recompute import policy
from timm_tresnet.recompute.eligibility import has_hooks, is_user_defined
from timm_tresnet.recompute.policy import RECOMPUTED_BY_COMPILER, classify_convolution

# A module, the key of the policy for it or "none", and whether its output is stored.
Step = tuple[nn.Module, str, bool]

_aten = torch.ops.aten
_STORED = (
    _aten.mean.dim,
    _aten.var_mean.correction,
    _aten.copy_.default,  # into running statistics; a backend that runs Dynamo's graph as it is would do that twice
)

_in_region = False  # while the compiler traces one


def is_in_region() -> bool:
    """Whether the compiler is tracing a region, where nothing may work in place but on running statistics."""
    return _in_region and torch.compiler.is_compiling()


def run_steps(steps: list[Step], x: Tensor) -> Tensor:
    """Run modules one after the other, in regions with one policy each, which end where an output is stored."""
    region: list[nn.Module] = []
    for index, (module, setting, stored) in enumerate(steps):
        if setting == "none":
            x = module(x)
            continue
        region.append(module)
        if stored or index + 1 == len(steps) or steps[index + 1][1] != setting:
            x = _run_region(region, x, setting)
            region = []
    return x


def _run_region(modules: list[nn.Module], x: Tensor, setting: str) -> Tensor:
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


def fits_region(module: nn.Module) -> bool:
    """Whether a region can hold a module: one of ours, and nothing in it draws, counts or overwrites if it runs again.

    Hooks of FSDP, which free and gather weights, are among what no region can hold.
    """
    if not getattr(module, "runs_in_region", False) or is_user_defined(module, adapters=False):
        return False
    part: Any  # a norm of ours has fits_region
    for part in module.modules():
        kind = type(part).__module__
        if has_hooks(part) or isinstance(part, nn.RReLU):
            return False
        if kind == "timm.layers.drop" and type(part).__name__ != "DropPath":
            return False
        is_norm = hasattr(part, "fits_region")
        if not part.fits_region() if is_norm else isinstance(part, nn.modules.batchnorm._NormBase):
            return False
        is_norm = is_norm or kind == "timm.layers.norm_act"
        for name, child in part.named_children():  # an activation may overwrite what a norm has returned
            if getattr(child, "inplace", False) and not (
                name == "act" and (is_norm or (type(child) is nn.ReLU and kind.startswith("timm_tresnet.")))
            ):
                return False
    return True


@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    """Whether a transform of torch.func is active while the compiler traces."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _choose(setting: str, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What to do with the output of an operator, args being its arguments."""
    if operator is _aten.convolution.default:
        kind = classify_convolution(args[0].shape, args[1].shape)
        stored = kind not in RECOMPUTED_BY_COMPILER[setting]
    else:
        stored = operator in _STORED or torch.Tag.nondeterministic_seeded in operator.tags
    return CheckpointPolicy.MUST_SAVE if stored else CheckpointPolicy.PREFER_RECOMPUTE


# Of the files that decide, which may change without the version.
_POLICY_HASH = hashlib.sha256(Path(__file__).read_bytes() + Path(policy.__file__).read_bytes()).hexdigest()


def _make_contexts(setting: str) -> functools.partial:
    make: Any = functools.partial(
        create_selective_checkpoint_contexts,
        functools.partial(_choose, setting),
        allow_cache_entry_mutation=True,  # running statistics change again in the next forward
    )
    # Without this, the compiler does not look for graphs that it has cached on the disk.
    make.cache_hash = f"{setting} {_POLICY_HASH}"
    return make


_CONTEXTS = {setting: _make_contexts(setting) for setting in RECOMPUTED_BY_COMPILER}

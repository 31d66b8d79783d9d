"""The policy for `torch.compile`: which tensors the compiler stores for backward.

The compiler sees forward and backward as one graph and follows `torch.utils.checkpoint` with a policy (selective
checkpointing). Of a *region*, a few consecutive blocks, it stores the input and the outputs of the operators in the
policy. It recomputes everything else, without hooks. Regions end where eager mode stores an output.
"""

import functools
import hashlib
import pkgutil
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from timm_tresnet.recompute.eligibility import is_autograd_compiled
from timm_tresnet.recompute.policy import RECOMPUTED_BY_COMPILER, classify_convolution

Step = tuple[nn.Module, str, bool]  # a module, its column of the policy or "none", whether its output is stored

_aten = torch.ops.aten
_STORED = (
    _aten.mean.dim,
    _aten.var_mean.correction,
    _aten.copy_.default,  # into running statistics; a backend that runs Dynamo's graph unchanged would repeat it
)

# The compilers of PyTorch 2.5 and 2.8 update running statistics again where they recompute.
COUNTS_ONCE = torch.__version__ >= "2.9"
_in_region = False  # while the compiler traces one


def is_in_region() -> bool:
    """Whether the compiler is tracing a region, where only running statistics may change in place."""
    return _in_region and torch.compiler.is_compiling()


def run_steps(steps: list[Step], x: Tensor) -> Tensor:
    """Run modules in order, in regions with one policy each. A region ends where an output is stored."""
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


def is_transformed() -> bool:
    """Whether a transform of torch.func is active while the compiler traces, or backward will be compiled by itself."""
    compiled_autograd = torch._dynamo.config.compiled_autograd or is_autograd_compiled()
    return compiled_autograd or torch._C._functorch.peek_interpreter_stack() is not None


def _choose(setting: str, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Return the policy for the output of an operator with arguments args."""
    if operator is _aten.convolution.default:
        kind = classify_convolution(args[0].shape, args[1].shape)
        stored = kind not in RECOMPUTED_BY_COMPILER[setting]
    else:
        stored = operator in _STORED or torch.Tag.nondeterministic_seeded in operator.tags
    return CheckpointPolicy.MUST_SAVE if stored else CheckpointPolicy.PREFER_RECOMPUTE


# Of the files that decide, which may change without the version.
_SOURCES = [pkgutil.get_data(__package__, name) or b"" for name in ("compiled.py", "policy.py")]  # from a zip too
_POLICY_HASH = hashlib.sha256(b"".join(_SOURCES)).hexdigest()


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

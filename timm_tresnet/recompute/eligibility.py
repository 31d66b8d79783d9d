"""Whether anything may be recomputed: asked once a forward, and of each module.

A tensor can be recomputed if no user code runs on it, which may edit it where autograd does not see it. Replaced
functions of PyTorch, such as `F.conv2d`, are not looked for; classes of modules whose `forward` was replaced are.
"""

import functools
import logging
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_KNOWN_MODULES = (
    *(f"torch.nn.modules.{name}" for name in ("activation", "batchnorm", "container", "conv", "linear", "pooling")),
    *(f"timm.layers.{name}" for name in ("activations", "drop", "norm", "norm_act", "split_batchnorm")),
)
_FSDP = ("torch.distributed.fsdp.", "torch.distributed._composable.fsdp.")
# They change weights, or add to what a convolution returns, and neither keep nor edit its input or output.
_ADAPTERS = ("torch.nn.utils.", "torch.nn.modules.dropout", "peft.tuners.")
_KNOWN = ("torch.", "timm.", "timm_tresnet.")
_METHODS = ("forward", "_conv_forward", "_call_impl", "_compiled_call_impl")

_find_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # missing in PyTorch 2.5
_methods: list[tuple[type, str, Any]] = []


def stand_for(kind: type, name: str = "forward") -> bool:
    """Record a method that a program replaces; False if it is no longer PyTorch's, timm's or ours."""
    _methods.append((kind, name, method := getattr(kind, name)))
    return all((each.__module__ or "").startswith(_KNOWN) for each in (kind, method))


def find_obstacle() -> str | None:
    """Why nothing may be recomputed in this forward; None if nothing forbids it."""
    for kind, name, method in _methods:
        if getattr(kind, name) is not method:
            return f"{kind.__name__}.{name} is replaced"
    if (reason := find_transform()) is not None:
        return reason
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]  # PyTorch's stubs lack it
        return "hooks on saved tensors are disabled"
    hooked = "hooks on all saved tensors are active, as of torch.utils.checkpoint or save_on_cpu"
    return hooked if _has_saved_tensor_hooks() else None


def find_transform() -> str | None:
    """Which transform, mode, compiled autograd or global hook is active."""
    if torch._C._len_torch_dispatch_stack() > 0 and not all(
        getattr(mode, "only_looks", False) for mode in _get_current_dispatch_mode_stack()
    ):
        return "a dispatch mode is active"
    if torch._C._len_torch_function_stack() > 0 and any(
        type(mode) is not DeviceContext for mode in torch.overrides._get_current_function_mode_stack()
    ):
        return "a function mode is active"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if is_autograd_compiled():
        return "compiled autograd is enabled"
    return "hooks on all modules are registered" if has_global_hooks() else None


def is_autograd_compiled() -> bool:
    """Whether compiled autograd is on, which would trace what unpacks saved tensors, at many times the cost."""
    state = sys.modules.get("torch._dynamo.compiled_autograd")
    return state is not None and (state.compiled_autograd_enabled or state.in_compiled_autograd_region)


def has_global_hooks() -> bool:
    """Whether hooks are registered that run in every module."""
    hooks = nn.modules.module
    forward = hooks._global_forward_hooks or hooks._global_forward_pre_hooks
    return bool(forward or hooks._global_backward_hooks or hooks._global_backward_pre_hooks)


def _has_saved_tensor_hooks() -> bool:
    if _find_top_hooks is not None:
        return _find_top_hooks(True) is not None
    # PyTorch refuses further hooks on tensors saved under such hooks.
    node: Any = torch.ones((), device="cpu", requires_grad=True).exp().grad_fn
    try:
        node._raw_saved_result.register_hooks(lambda tensor: tensor, lambda tensor: tensor)
    except RuntimeError:
        return True
    return False


def is_untouched(module: nn.Module) -> bool:
    """Whether a module has neither hooks nor methods of its own, nor tensors in place of its parameters."""
    fields = module.__dict__
    return not (
        fields["_forward_hooks"]
        or fields["_forward_pre_hooks"]
        or fields["_backward_hooks"]
        or fields["_backward_pre_hooks"]
        or "forward" in fields
        or "_call_impl" in fields
        or "_conv_forward" in fields
        or "_compiled_call_impl" in fields
        or "weight" in fields
        or "bias" in fields
    )


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 gathers and frees the module's weights, by hooks and a class of its own."""
    return type(module).__module__.startswith(_FSDP)


def original_class(module: nn.Module) -> type:
    """Class of a module before FSDP2 derived its own from it."""
    return type(module).__mro__[2] if is_sharded(module) else type(module)


def is_user_defined(module: nn.Module, adapters: bool = True) -> bool:
    """Whether user code can observe the module's input, output or internals: by a class, a method or a hook.

    Parametrizations and adapters of PyTorch and peft do not count, unless adapters is False.
    """
    return any(find_user_code(each, adapters) is not None for each in module.modules())


def find_user_code(module: nn.Module, adapters: bool = True) -> str | None:
    """What is user-defined in a module, the modules in it aside."""
    fields, kind = module.__dict__, type(module)
    known = _is_known if not torch.compiler.is_compiling() else _look_up
    if not known(kind.__module__, adapters):
        return f"{kind.__module__}.{kind.__qualname__}"
    for name in _METHODS:
        if name in fields and fields[name] is not None:
            return f"a replaced {name}" if name != "_compiled_call_impl" else "it is compiled"
    if fields["_backward_hooks"] or fields["_backward_pre_hooks"]:
        return "a backward hook"
    hooks = (*fields["_forward_hooks"].values(), *fields["_forward_pre_hooks"].values())
    known_hooks = (*_FSDP, *_ADAPTERS) if adapters else _FSDP
    if all((getattr(hook, "__module__", None) or "").startswith(known_hooks) for hook in hooks):
        return None
    return "a forward hook"


def _look_up(name: str, adapters: bool) -> bool:
    return name in _KNOWN_MODULES or name.startswith(("timm_tresnet.", *_FSDP, *(_ADAPTERS if adapters else ())))


_is_known = functools.cache(_look_up)  # the compiler cannot trace functools.cache


def is_plain(x: object) -> bool:
    """Whether something is a tensor of PyTorch's own classes."""
    return type(x) in (Tensor, nn.Parameter)


@functools.cache
def log_once(reason: str, what: str) -> None:
    """Log one INFO line for each reason why backward recomputes nothing of the whole network, or of a part."""
    line = f"Backward recomputes nothing of {what}: {reason}; explain_recompute(images) says more"
    logging.getLogger("timm_tresnet").info(line)

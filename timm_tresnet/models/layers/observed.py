"""Whether user code observes or changes what modules compute."""

from torch import nn

_METHODS = {"forward", "_conv_forward", "_call_impl", "__call__"}


def is_observed(*modules: nn.Module) -> bool:
    """Return whether a module has forward hooks or patched methods, which would be lost if it were replaced."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or _METHODS & vars(module).keys() for module in modules
    )

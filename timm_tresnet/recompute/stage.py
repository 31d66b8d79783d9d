"""Blocks in order: settings, and the loop that runs their programs."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from timm_tresnet.recompute.compiled import Step, fits_region, is_transformed, run_steps
from timm_tresnet.recompute.eligibility import (
    find_obstacle,
    find_transform,
    find_user_code,
    has_global_hooks,
    has_hooks,
    is_sharded,
    is_untouched,
    is_user_defined,
    log_once,
    original_class,
)
from timm_tresnet.recompute.operations import call_sharded
from timm_tresnet.recompute.policy import CHECKPOINTING, RECOMPUTED, keeps_output
from timm_tresnet.recompute.program import Unreadable, read_program
from timm_tresnet.recompute.run import Run, run_program
from timm_tresnet.recompute.saved import watch

# Called with each module that runs, and the reason why nothing in it is recomputed, or None.
observers: list[Callable[[nn.Module, str | None], None]] = []


class Body(nn.Sequential):
    """Modules in order, most of whose saved tensors backward recomputes."""

    def __init__(self, *modules: Any) -> None:
        super().__init__(*modules)
        self.recompute = "activations"

    def __getitem__(self, idx: slice | int) -> Any:  # a body of a slice, else a module
        part = super().__getitem__(idx)
        if isinstance(idx, slice):
            self._pass_settings(part)
        return part

    def _pass_settings(self, part: Any) -> None:
        part.recompute = self.recompute
        part.training = self.training

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            for module in self:
                x = module(x)
            return x
        return self._forward_eager(x)

    @torch.jit.unused
    def _forward_eager(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._forward_compiled(x)
        reason = self._find_obstacle(x)
        if reason is None:
            return self._run_all(x, Run(RECOMPUTED[self.recompute]))
        if reason:
            log_once(reason, "this network")
        for module in self:
            _observe(module, reason)
            x = self._run_plainly(module, x)
        return x

    def _find_obstacle(self, x: Any) -> str | None:
        """Why nothing is recomputed; empty if nobody has asked for it."""
        if self.recompute == "none" or not torch.is_grad_enabled() or torch.jit.is_tracing():
            return ""
        if isinstance(x, torch.fx.Proxy):  # the traced network calls the stages, which recompute
            return ""
        if not isinstance(x, Tensor):
            return f"the input is a {type(x).__qualname__}"
        if type(self).__iter__ is not nn.Sequential.__iter__:
            return f"{type(self).__qualname__} has its own __iter__"
        return find_obstacle()

    def _run_all(self, x: Tensor, run: Run) -> Tensor:
        for position, module in enumerate(self):
            x = self._run_one(position, module, x, run)
        return x

    def _run_one(self, position: int, module: nn.Module, x: Tensor, run: Run) -> Tensor:
        if not run.closed and original_class(module) is Stage:
            stage: Any = module
            if is_sharded(module) and find_user_code(module) is None:
                x = call_sharded(module, functools.partial(stage._run_all, run=run), x)
                run.store_if_lost()
                return x
            if is_untouched(module):
                return stage._run_all(x, run)
        return self._run_program(module, x, run)

    def _run_program(
        self,
        module: nn.Module,
        x: Tensor,
        run: Run,
        stored: bool = False,
        call: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        repeats = False
        if run.closed:
            reason = "user code before it has opened a mode or hooks, or has returned no plain tensor"
            log_once(reason, "a part of this network")
        elif type(x) is not Tensor or x.dim() != 4 or not x.numel():
            reason = f"its input is a {type(x).__name__} of shape {tuple(x.shape)}"
        else:
            try:
                program = read_program(module)
                if not self._repeats_all() or program.is_repeatable() or not _can_run_again(module):
                    _observe(module, None)
                    return run_program(program, x, run, stored)
                reason, repeats = "torch.utils.checkpoint runs it again", True
            except Unreadable as error:
                reason = str(error)
                log_once(f"{reason}, in a {type(module).__name__}", "a part of this network")
        _observe(module, reason)
        run.enter(shown=True)
        x = (_checkpoint if repeats else _call)(module, call or module, x)
        run.recheck(x)
        run.leave(x, None, stored)
        return x

    def _repeats_all(self) -> bool:
        """Whether backward runs everything again."""
        return False

    def _run_plainly(self, module: nn.Module, x: Tensor) -> Tensor:
        return module(x)

    def _forward_compiled(self, x: Tensor) -> Tensor:
        recomputes = self.training and torch.is_grad_enabled() and not _is_exporting() and not has_global_hooks()
        if not recomputes or is_transformed():
            for module in self:
                x = module(x)
            return x
        self._watch_weights()
        return run_steps(self._list_steps(), x)

    @torch.compiler.assume_constant_result
    def _watch_weights(self) -> None:
        """Watch the weights, once, when the compiler traces this: its regions use them again in backward."""
        watch(self.parameters())

    def _list_steps(self) -> list[Step]:
        steps: list[Step] = []
        for position, module in enumerate(self):
            if type(module) is Stage and not is_user_defined(module, deep=False) and not has_hooks(module):
                steps += module._list_steps()
            else:
                steps.append(self._make_step(position, module))
        return steps

    def _make_step(self, position: int, module: nn.Module) -> Step:
        return module, self.recompute if fits_region(module) else "none", False


class Stage(Body):
    """Residual blocks in order; with grad_checkpointing on, every second one stores its output and all run again."""

    def __init__(self, *blocks: Any) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def _pass_settings(self, part: Any) -> None:
        super()._pass_settings(part)
        part.grad_checkpointing = self.grad_checkpointing

    def _make_step(self, position: int, block: nn.Module) -> Step:
        if not fits_region(block):
            return block, "none", False
        setting = CHECKPOINTING if self.grad_checkpointing else self.recompute
        return block, setting, keeps_output(position, len(self), self.grad_checkpointing)

    def _run_all(self, x: Tensor, run: Run) -> Tensor:
        before = run.repeats
        run.repeats = RECOMPUTED[CHECKPOINTING if self.grad_checkpointing else self.recompute]
        x = super()._run_all(x, run)
        run.repeats = before
        return x

    def _run_one(self, position: int, block: nn.Module, x: Tensor, run: Run) -> Tensor:
        stored = keeps_output(position, len(self._modules), self.grad_checkpointing)
        if is_sharded(block) and not run.closed:  # its weights are gathered inside
            run_inside = functools.partial(self._run_program, block, run=run, stored=stored, call=block.forward)
            x = call_sharded(block, run_inside, x)
            run.store_if_lost()
            return x
        return self._run_program(block, x, run, stored)

    def _repeats_all(self) -> bool:
        return self.grad_checkpointing

    def _run_plainly(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_tracing():
            return _checkpoint(block, block, x)
        return block(x)


def _observe(module: nn.Module, reason: str | None) -> None:
    for observer in observers:
        observer(module, reason)


def _is_exporting() -> bool:
    """Whether torch.export traces; with PyTorch 2.11 `torch.compiler.is_exporting()` says so of torch.compile too."""
    return getattr(torch.compiler, "_is_exporting_flag", False)  # there since PyTorch 2.7


def _call(block: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return call(x)


def _checkpoint(block: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if find_transform() is not None or not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]  # PyTorch's stubs lack it
        return call(x)  # with which it does not work
    if not _can_run_again(block):
        return call(x)
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):  # else it may stop before a random mask is drawn
        return torch.utils.checkpoint.checkpoint(
            call, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _KeepRunningStatistics(block))
        )


def _can_run_again(block: nn.Module) -> bool:
    """Whether a block does the same a second time; user code may not, and spectral norm takes another step."""
    if is_user_defined(block):
        return False
    parts = [each for part in block.modules() for each in (part, *part._forward_pre_hooks.values())]
    return not any("SpectralNorm" in type(each).__name__ for each in parts)


class _KeepRunningStatistics:
    """Give a block that runs again copies of its running statistics to update, so that no batch counts twice."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._versions = [(parameter, parameter._version) for parameter in block.parameters()]
        watch(parameter for parameter, _ in self._versions)

    def __enter__(self) -> None:
        for parameter, version in self._versions:
            if parameter._version != version:
                raise RuntimeError(
                    f"A weight of shape {tuple(parameter.shape)}, of a block that backward runs again, has been "
                    f"modified by an inplace operation (version {parameter._version}, needed {version})"
                )
        self._originals = [
            (module, name, buffer)
            for module in self._block.modules()
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.training
            for name, buffer in module.named_buffers(recurse=False)
        ]
        for module, name, buffer in self._originals:
            setattr(module, name, buffer.clone())

    def __exit__(self, *exception: object) -> None:
        for module, name, buffer in self._originals:
            setattr(module, name, buffer)

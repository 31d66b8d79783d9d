"""A sequence of blocks: its settings, and the loop that runs the blocks' programs."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from timm_tresnet.recompute.checkpoint import can_run_again, run_checkpointed
from timm_tresnet.recompute.compiled import COUNTS_ONCE, Step, is_transformed, run_steps
from timm_tresnet.recompute.eligibility import (
    find_obstacle,
    find_user_code,
    has_global_hooks,
    is_sharded,
    is_untouched,
    log_once,
    original_class,
)
from timm_tresnet.recompute.policy import CHECKPOINTING, RECOMPUTED, keeps_output
from timm_tresnet.recompute.program import Unreadable, read_program
from timm_tresnet.recompute.run import Run, run_program
from timm_tresnet.recompute.saved import watch
from timm_tresnet.recompute.sharded import call_with_hooks, store_if_freed

_get_compiler = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)  # not in all releases
# Called with each module that runs, and the reason why nothing in it is recomputed, or None.
observers: list[Callable[[nn.Module, str | None], None]] = []


class Body(nn.Sequential):
    """A sequence of modules. Backward recomputes most tensors that autograd would save in them."""

    def __init__(self, *modules: Any) -> None:
        super().__init__(*modules)
        self.recompute = "activations"
        self.grad_checkpointing = False

    def __getitem__(self, idx: slice | int) -> Any:  # a body of a slice, else a module
        part: Any = super().__getitem__(idx)
        if isinstance(idx, slice):
            part.recompute, part.grad_checkpointing = self.recompute, self.grad_checkpointing
            part.training = self.training
        return part

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
        if reason is None:  # if the compiler has given up on this function, it must not compile the functions in it
            run_all = torch.compiler.disable(self._run_all) if _get_compiler() else self._run_all
            return run_all(x, Run(frozenset()))
        if reason:
            log_once(reason, "this network")
        for module in self:
            _observe(module, reason)
            checkpoints = self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_tracing()
            x = run_checkpointed(module, module, x) if checkpoints else module(x)
        return x

    def _find_obstacle(self, x: Any) -> str | None:
        """Why nothing is recomputed; None if something is, empty if recomputation is off."""
        if self.recompute == "none" or not torch.is_grad_enabled() or torch.jit.is_tracing():
            return ""
        if isinstance(x, torch.fx.Proxy):  # a body's graph may call stages, which recompute
            return "torch.fx traces its blocks, unless Stage is among the leaf modules" if type(self) is Stage else ""
        if not isinstance(x, Tensor):
            return f"the input is a {type(x).__qualname__}"
        if type(self).__iter__ is not nn.Sequential.__iter__:
            return f"{type(self).__qualname__} has its own __iter__"
        return find_obstacle()

    def _setting(self) -> str:
        """Column of the table in `timm_tresnet.recompute.policy`."""
        return CHECKPOINTING if self.grad_checkpointing else self.recompute

    def stores_output(self, position: int) -> bool:
        """Whether the output of the module at a position is stored."""
        return False

    def _run_all(self, x: Tensor, run: Run) -> Tensor:
        before, run.repeats = run.repeats, RECOMPUTED[self._setting()]
        for position, module in enumerate(self):
            x = self._run_one(module, x, run, self.stores_output(position))
        run.repeats = before
        return x

    def _run_one(self, module: nn.Module, x: Tensor, run: Run, stored: bool) -> Tensor:
        sharded = is_sharded(module) and not run.closed
        forward: Any = functools.partial(self._run_program, module, run=run, stored=stored, inside=sharded)
        stage: Any = module
        if original_class(module) is Stage and not run.closed:
            if find_user_code(module) is None if sharded else is_untouched(module):
                forward = functools.partial(stage._run_all, run=run)
        if not sharded:
            return forward(x)
        x = call_with_hooks(module, forward, x)
        run.source = store_if_freed(x, run.source, run)
        return x

    def _run_program(self, module: nn.Module, x: Tensor, run: Run, stored: bool, inside: bool) -> Tensor:
        """Run a module by its program, or as plain PyTorch; inside says whether the caller runs its hooks."""
        call: Callable[[Tensor], Tensor] = module.forward if inside else module
        if run.closed:
            reason = "user code before it has opened a mode or hooks, or has returned no plain tensor"
            log_once(reason, "a part of this network")
        elif type(x) is not Tensor or x.dim() != 4 or not x.numel():
            reason = f"its input is a {type(x).__name__} of shape {tuple(x.shape)}"
        else:
            try:
                program = read_program(module)
            except Unreadable as error:
                reason = str(error)
                log_once(f"{reason}, in a {type(module).__name__}", "a part of this network")
            else:
                if not self.grad_checkpointing or program.is_repeatable() or not can_run_again(module):
                    _observe(module, None)
                    return run_program(program, x, run, stored)
                reason = "torch.utils.checkpoint runs it again"
                call = functools.partial(run_checkpointed, module, call)
        _observe(module, reason)
        run.leave(x, None)
        x = call(x)
        run.recheck(x)
        run.leave(x, None)
        return x

    def _forward_compiled(self, x: Tensor) -> Tensor:
        exporting = getattr(torch.compiler, "_is_exporting_flag", False)  # is_exporting() means compiling too in 2.11
        recomputes = not exporting and self.training and torch.is_grad_enabled() and not has_global_hooks()
        return run_steps(self._list_steps(), x) if recomputes and self._allows_regions() else super().forward(x)

    @torch.compiler.assume_constant_result
    def _allows_regions(self) -> bool:
        """Whether the compiler may recompute, asked while it traces; backward of regions uses the weights again."""
        if not COUNTS_ONCE:
            log_once("under torch.compile that needs PyTorch 2.9", "this network")
        allowed = COUNTS_ONCE and not is_transformed()
        watch(self.parameters() if allowed else ())
        return allowed

    def _list_steps(self) -> list[Step]:
        steps: list[Step] = []
        module: Any
        for position, module in enumerate(self):
            if type(module) is Stage and is_untouched(module):
                steps += module._list_steps()
            elif hasattr(module, "fits_region") and module.fits_region():
                steps.append((module, self._setting(), self.stores_output(position)))
            else:
                steps.append((module, "none", False))
        return steps


class Stage(Body):
    """A sequence of residual blocks. With grad_checkpointing, every second one stores its output and all run again."""

    def stores_output(self, position: int) -> bool:
        return keeps_output(position, len(self._modules), self.grad_checkpointing)


def _observe(module: nn.Module, reason: str | None) -> None:
    for observer in observers:
        observer(module, reason)

"""Blocks in order, and which of their outputs are kept for backward: settings, grad checkpointing, compiling."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from timm_tresnet.models.blocks import BasicBlock, Bottleneck, ResidualBlock
from timm_tresnet.models.layers import ActivatedBatchNorm2d, ConvNormAct, ReLU, SpaceToDepth
from timm_tresnet.recompute.compiled import run_region
from timm_tresnet.recompute.plain_blocks import PlainBlock, can_take, is_patched, read_blocks, run_block
from timm_tresnet.recompute.rebuild import (
    close_tape,
    has_global_hooks,
    is_foreign,
    is_plain,
    is_transforming,
    must_step_aside,
    open_tape,
    pausing,
    recording,
    repeating_convolutions,
)
from timm_tresnet.recompute.tape import Tape

# A module, what the compiler is to rebuild of it ("none", "activations", "expansions", "convolutions"), and whether it
# keeps the output.
_Step = tuple[nn.Module, str, bool]
_iterate = nn.Sequential.__iter__  # another one may do something between modules


class Recorded(nn.Sequential):
    """Modules in order; `timm_tresnet.recompute.rebuild` decides what they keep for backward in training."""

    def __init__(self, *modules: Any) -> None:
        super().__init__(*modules)
        self.rebuild = "activations"

    def __getitem__(self, index: slice | int) -> nn.Module:
        part = super().__getitem__(index)
        if isinstance(index, slice):
            self._pass_settings(part)
        return part

    def _pass_settings(self, part: "Recorded") -> None:
        part.rebuild = self.rebuild
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
        if not self.training or open_tape() is not None or torch.jit.is_tracing():
            return self._run_all(x)
        if not isinstance(x, Tensor) or type(self).__iter__ is not _iterate or is_patched():
            return self._run_all(x)
        with recording(self.rebuild, x):
            return self._run_all(x)

    def _run_all(self, x: Tensor) -> Tensor:
        for position, module in enumerate(self):
            x = self._run(position, module, x)
        return x

    def _forward_compiled(self, x: Tensor) -> Tensor:
        rebuilds = self.training and torch.is_grad_enabled() and not _is_exporting() and not has_global_hooks()
        regions = _group(self._list_steps()) if rebuilds else [(list(self), "none")]
        for modules, setting in regions:
            if setting != "none":
                x = run_region(modules, x, setting)
            else:
                for module in modules:
                    x = module(x)
        return x

    def _list_steps(self) -> list[_Step]:
        steps: list[_Step] = []
        for position, module in enumerate(self):
            if type(module) is Stage and not is_foreign(module, deep=False) and not _has_hooks(module):
                steps += module._list_steps()
            else:
                steps.append(self._make_step(position, module))
        return steps

    def _make_step(self, position: int, module: nn.Module) -> _Step:
        return module, self.rebuild if _fits_region(module) else "none", False

    def _run(self, position: int, module: nn.Module, x: Tensor) -> Tensor:
        tape = open_tape()
        if tape is None:
            return self._run_plainly(module, x)
        if self._is_seen(position, module) or not is_plain(x):
            return self._run_seen(module, x)
        x = self._run_recorded(position, module, x)
        if tape.lost_weights():
            tape.keep_last()
        return x

    def _is_seen(self, position: int, module: nn.Module) -> bool:
        """Whether others see what goes into a module, what comes out, or what happens in it."""
        if isinstance(module, Stage):
            return is_foreign(module, deep=False)
        return position == len(self) - 1 or is_foreign(module)

    def _run_seen(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        tape = open_tape()
        tape.show(x)
        with pausing():
            x = run(x)
        if must_step_aside() or is_patched() or not is_plain(x):  # what ran has opened something, and left it
            close_tape()
        else:
            tape.show(x)
        return x

    def _run_plainly(self, module: nn.Module, x: Tensor) -> Tensor:
        return module(x)

    def _run_recorded(self, position: int, module: nn.Module, x: Tensor) -> Tensor:
        return module(x)


class Stage(Recorded):
    """Residual blocks in order; with grad_checkpointing on, every second one keeps its output and all run again."""

    def __init__(self, *blocks: Any) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def _pass_settings(self, part: "Stage") -> None:
        super()._pass_settings(part)
        part.grad_checkpointing = self.grad_checkpointing

    def _make_step(self, position: int, block: nn.Module) -> _Step:
        if not _fits_region(block):
            return block, "none", False
        return block, "convolutions" if self.grad_checkpointing else self.rebuild, self.keeps_output(position)

    def keeps_output(self, position: int) -> bool:
        # Where convolutions run again, longer chains keep less, but more of them is alive at once.
        if self.grad_checkpointing:
            return (len(self) - position) % 2 == 1
        find = _find_kept_outputs if torch.compiler.is_compiling() else _kept_outputs
        return position in find(len(self))

    def _is_seen(self, position: int, block: nn.Module) -> bool:
        return not isinstance(block, ResidualBlock) or not block.has_own_parts() or is_foreign(block)

    def _run_all(self, x: Tensor) -> Tensor:
        tape = open_tape()
        if tape is None:
            return super()._run_all(x)
        blocks = self._modules  # which run, whatever becomes of the attribute meanwhile
        ahead: list[PlainBlock] | None = None
        for position, block in enumerate(self):
            plain = None
            if can_take(x):
                if ahead is None and open_tape() is not None:  # several at once are read faster than one by one
                    ahead = read_blocks(list(blocks.values())[position:])
                plain = ahead.pop(0) if ahead else None
            if plain is not None:
                x = self._run_straight(position, plain, x, tape)
            else:
                x = self._run(position, block, x)
                ahead = None  # code of users may have changed what comes next
        return x

    def _run_straight(self, position: int, plain: PlainBlock, x: Tensor, tape: Tape) -> Tensor:
        tape.repeats_convolutions = self.grad_checkpointing
        try:
            x, terms = run_block(plain, x, tape)
        finally:
            tape.repeats_convolutions = False
        tape.add_sum(x, *terms, keeps=self.keeps_output(position))
        if tape.lost_weights():
            tape.keep_last()
        return x

    def _run_plainly(self, block: nn.Module, x: Tensor) -> Tensor:
        return _checkpoint(block, x) if self.grad_checkpointing and not torch.jit.is_tracing() else block(x)

    def _run_recorded(self, position: int, block: nn.Module, x: Tensor) -> Tensor:
        tape = open_tape()
        if self.grad_checkpointing and not _can_repeat(block):
            return self._run_seen(functools.partial(_checkpoint, block), x)
        with repeating_convolutions(self.grad_checkpointing):
            x = block(x)
            if x.grad_fn is None:
                return x
            tape.add_kept(x) if self.keeps_output(position) else tape.add_output(x)
        return x


def _is_exporting() -> bool:
    """Whether torch.export traces; with PyTorch 2.11 `torch.compiler.is_exporting()` says so of torch.compile too."""
    return getattr(torch.compiler, "_is_exporting_flag", False)  # there since PyTorch 2.7


def _find_kept_outputs(blocks: int) -> tuple[int, ...]:
    """Positions of the blocks in a stage whose output is kept for backward.

    Rebuilding an output needs the one before it, so between two kept ones a chain of tensors is alive for a moment. It
    is short at the end of the stage, where backward begins with everything else still in memory, and grows towards the
    front: 2, 3, 4, ... A stage of up to 4 blocks is one chain.
    """
    kept = []
    position, chain = blocks - 3, 3
    while blocks > 4 and position > 0:
        kept.append(position)
        position -= chain + 1
        chain += 1
    return tuple(kept)


_kept_outputs = functools.cache(_find_kept_outputs)  # into which the compiler cannot look


def _group(steps: list[_Step]) -> list[tuple[list[nn.Module], str]]:
    """Steps in regions with one setting each, which end where an output is kept."""
    regions: list[tuple[list[nn.Module], str]] = []
    ended = True
    for run, setting, keeps in steps:
        if ended or setting != regions[-1][1]:
            regions.append(([], setting))
        regions[-1][0].append(run)
        ended = keeps
    return regions


def _fits_region(module: nn.Module) -> bool:
    """Whether a region can hold a module: one of ours, and nothing in it draws, counts or overwrites if it runs again.

    Hooks of FSDP, which free and gather weights, are among what no region can hold.
    """
    if type(module) not in (BasicBlock, Bottleneck, ConvNormAct, SpaceToDepth) or is_foreign(module):
        return False
    for part in module.modules():
        if _has_hooks(part) or isinstance(part, nn.RReLU) or type(part).__module__ == "timm.layers.drop":
            return False
        if isinstance(part, ActivatedBatchNorm2d):
            if not part.fits_region():
                return False
        elif isinstance(part, nn.modules.batchnorm._NormBase):
            return False
        norm = type(part).__module__ == "timm.layers.norm_act" or isinstance(part, ActivatedBatchNorm2d)
        for name, child in part.named_children():  # an activation may overwrite what a norm has made
            if getattr(child, "inplace", False) and type(child) is not ReLU and not (norm and name == "act"):
                return False
    return True


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _can_repeat(block: nn.Module) -> bool:
    """Whether `timm_tresnet.recompute.rebuild` can make all that a block keeps from the block's input."""
    units = [module for module in block.modules() if isinstance(module, ConvNormAct)]
    return all(isinstance(unit.bn, ActivatedBatchNorm2d) for unit in units)


def _checkpoint(block: nn.Module, x: Tensor) -> Tensor:
    checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, block, x, use_reentrant=False)
    if is_transforming() or not torch._C._autograd._saved_tensors_hooks_is_enabled():  # which it cannot work with
        return block(x)
    if is_foreign(block) or is_patched():  # code of users may do something else the second time
        return block(x)
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):  # else it may stop before a random mask is drawn
        return checkpoint(context_fn=lambda: (nullcontext(), _KeepRunningStatistics(block)))


class _KeepRunningStatistics:
    """Give a block that runs again copies of its running statistics to update, so that no batch counts twice."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block

    def __enter__(self) -> None:
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

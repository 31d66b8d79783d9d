"""What backward recomputes: one table for eager mode and for the compiler.

Norms, activations, gates' products, sums and pools are always recomputed from what is stored, except where the
setting is "none". Statistics, gates and random masks are always stored; they are small.

================================================  =============  ============  ==================
operation                                         "activations"  "expansions"  grad checkpointing
================================================  =============  ============  ==================
convolution                                       stored         stored        recomputed
expansion: 1x1, widens fourfold                   stored         recomputed    recomputed
wider expansion: 1x1, widens more than fourfold   stored         stored        recomputed
blur                                              stored         stored        recomputed
convolution on a single pixel (gate)              stored         stored        stored
================================================  =============  ============  ==================

An expansion is the last convolution of a bottleneck. A wider one is on the shortcut into the first bottleneck of
TResNet-M: it makes much of little, so the compiler recomputes it with "activations"; with "expansions" a compiled step
would peak higher without it (docs/measurements.md).
"""

import functools
import math
from collections.abc import Sequence

import torch

SETTINGS = ("none", "activations", "expansions")
CHECKPOINTING = "checkpointing"  # set_grad_checkpointing, whatever the setting is

CONVOLUTION, EXPANSION, WIDER_EXPANSION, BLUR, GATE = "convolution", "expansion", "wider expansion", "blur", "gate"

RECOMPUTED = {
    "activations": frozenset(),
    "expansions": frozenset({EXPANSION}),
    CHECKPOINTING: frozenset({CONVOLUTION, EXPANSION, WIDER_EXPANSION, BLUR}),
}
RECOMPUTED_BY_COMPILER = {**RECOMPUTED, "activations": frozenset({WIDER_EXPANSION})}


def classify_convolution(input_shape: Sequence[int], weight_shape: Sequence[int]) -> str:
    """Row of the table, by shapes alone, for the compiler."""
    if math.prod(input_shape[2:]) == 1:
        return GATE
    outputs, inputs, *kernel = weight_shape
    widening = outputs / inputs if kernel == [1, 1] else 0
    return CONVOLUTION if widening < 4 else EXPANSION if widening == 4 else WIDER_EXPANSION


def keeps_output(position: int, blocks: int, checkpointing: bool) -> bool:
    """Whether the output of a block is stored.

    Args:
        position: of the block in its stage.
        blocks: number of blocks in the stage.
        checkpointing: whether convolutions run again; longer chains then store less, but more is alive at once.
    """
    if checkpointing:
        return (blocks - position) % 2 == 1
    find = find_kept_outputs if torch.compiler.is_compiling() else _kept_outputs
    return position in find(blocks)


def find_kept_outputs(blocks: int) -> tuple[int, ...]:
    """Positions of the blocks in a stage whose output is stored.

    Recomputing an output needs the one before it, so between two stored ones a chain of tensors is alive for a moment.
    It is short at the end of the stage, where backward begins with everything else still in memory, and grows towards
    the front: 2, 3, 4, ... A stage of up to 4 blocks is one chain.
    """
    kept = []
    position, chain = blocks - 3, 3
    while blocks > 4 and position > 0:
        kept.append(position)
        position -= chain + 1
        chain += 1
    return tuple(kept)


_kept_outputs = functools.cache(find_kept_outputs)  # which the compiler cannot trace

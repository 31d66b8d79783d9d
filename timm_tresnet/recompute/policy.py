"""The operations that backward recomputes: one table for eager mode and for the compiler.

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

An expansion ends a bottleneck. A wider one is on the shortcut into TResNet-M's first bottleneck. Its output is many
times its input, so the compiler recomputes it with "activations"; with "expansions" a step would peak higher.
"""

import math
from collections.abc import Sequence

SETTINGS = ("none", "activations", "expansions")
CHECKPOINTING = "checkpointing"  # set_grad_checkpointing, regardless of the setting

CONVOLUTION, EXPANSION, WIDER_EXPANSION, BLUR, GATE = "convolution", "expansion", "wider expansion", "blur", "gate"

RECOMPUTED = {
    "activations": frozenset(),
    "expansions": frozenset({EXPANSION}),
    CHECKPOINTING: frozenset({CONVOLUTION, EXPANSION, WIDER_EXPANSION, BLUR}),
}
RECOMPUTED_BY_COMPILER = {**RECOMPUTED, "activations": frozenset({WIDER_EXPANSION})}


def classify_convolution(input_shape: Sequence[int], weight_shape: Sequence[int]) -> str:
    """Return the table's row by shapes alone, for the compiler."""
    if math.prod(input_shape[2:]) == 1:
        return GATE
    outputs, inputs, *kernel = weight_shape
    widening = outputs / inputs if kernel == [1, 1] else 0
    return CONVOLUTION if widening < 4 else EXPANSION if widening == 4 else WIDER_EXPANSION


def keeps_output(position: int, blocks: int, checkpointing: bool) -> bool:
    """Whether the output of the block at this position is stored, in a stage of so many blocks.

    Recomputing an output needs the one before it, so between two stored ones a chain of tensors is alive for a moment.
    It is short at the end of the stage, where backward begins with everything else still in memory, and grows towards
    the front: 2, 3, 4, ... A stage of up to 4 blocks is one chain. With checkpointing, more would be alive in a chain.
    """
    from_end = blocks - position
    if checkpointing:
        return from_end % 2 == 1
    return position > 0 and blocks > 4 and from_end in _STORED_FROM_END


_STORED_FROM_END = tuple(chains * (chains + 5) // 2 for chains in range(1, 50))  # 3, 7, 12, 18, ...

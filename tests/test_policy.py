import pytest

from timm_tresnet.recompute.policy import (
    CONVOLUTION,
    EXPANSION,
    GATE,
    RECOMPUTED,
    RECOMPUTED_BY_COMPILER,
    WIDER_EXPANSION,
    classify_convolution,
    keeps_output,
)


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        ((64, 64, 3, 3), CONVOLUTION),
        ((64, 256, 1, 1), CONVOLUTION),
        ((256, 64, 1, 1), EXPANSION),
        ((1024, 128, 1, 1), WIDER_EXPANSION),
        ((256, 64, 3, 3), CONVOLUTION),
    ],
)
def test_convolutions_are_classified_by_their_shapes(weight, kind):
    assert classify_convolution((2, weight[1], 8, 8), weight) == kind
    assert classify_convolution((2, weight[1], 1, 1), weight) == GATE


def test_each_setting_recomputes_what_the_one_before_does():
    activations, expansions, checkpointing = RECOMPUTED.values()
    assert activations < expansions < checkpointing
    assert all(RECOMPUTED[setting] <= kinds for setting, kinds in RECOMPUTED_BY_COMPILER.items())
    assert not any(GATE in kinds for kinds in RECOMPUTED_BY_COMPILER.values())


@pytest.mark.parametrize("blocks", [1, 3, 4, 5, 11, 18, 24])
def test_chains_between_kept_outputs_grow_away_from_the_end(blocks):
    kept = [position for position in reversed(range(blocks)) if keeps_output(position, blocks, False)]
    ends = [blocks, *kept]
    chains = [later - earlier - 1 for later, earlier in zip(ends, kept, strict=False)]
    assert chains == list(range(2, 2 + len(kept)))
    assert bool(kept) == (blocks > 4)


def test_checkpointing_keeps_every_second_output_and_the_last():
    assert [keeps_output(position, 5, True) for position in range(5)] == [True, False, True, False, True]

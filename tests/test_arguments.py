import pytest
from timm.layers import get_act_layer
from torch import nn

from timm_tresnet.models.arguments import STRIDES_AND_DILATIONS, choose, per_stage, resolve_activation, resolve_indices


def test_value_is_looked_up_or_the_choices_are_named():
    assert choose("aa_layer", "blur", {"blur": True, "": False}) is True
    with pytest.raises(ValueError, match="TResNet needs stem to be one of 'a', 'b', got 'c'"):
        choose("stem", "c", {"a": 1, "b": 2})


@pytest.mark.parametrize(("value", "expected"), [("x", ["x"] * 4), (True, [True] * 4), ((1, 2, 3, 4), [1, 2, 3, 4])])
def test_one_value_is_for_every_stage(value, expected):
    assert per_stage("block", value) == expected


@pytest.mark.parametrize("value", [(1, 2, 3), 5, None, (1, 2, 3, 4, 5)])
def test_other_numbers_of_stages_are_refused(value):
    with pytest.raises(ValueError, match="one entry for each of its 4 stages"):
        per_stage("layers", value)


def test_slope_is_of_leaky_relu_alone():
    assert resolve_activation("leaky_relu", 0.25)().negative_slope == 0.25
    assert resolve_activation("silu", 0.25) is get_act_layer("silu")
    assert resolve_activation(nn.Mish, 0.25) is nn.Mish
    with pytest.raises(ValueError, match="act_layer to be an activation of timm, or 'frelu', got 'no_such'"):
        resolve_activation("no_such", 0.25)


@pytest.mark.parametrize(
    ("indices", "expected"), [(None, [0, 1, 2, 3, 4]), (2, [3, 4]), ([0, -1], [0, 4]), ((2, 2), [2, 2]), ([], [])]
)
def test_indices_are_counted_from_the_front(indices, expected):
    assert resolve_indices(indices, 5) == expected


@pytest.mark.parametrize("indices", [0, 6, [5], [-6]])
def test_features_that_are_not_there_are_refused(indices):
    with pytest.raises(ValueError, match="TResNet has 5 features, (got|cannot return)"):
        resolve_indices(indices, 5)


@pytest.mark.parametrize("output_stride", STRIDES_AND_DILATIONS)
def test_stages_that_are_not_strided_are_dilated(output_stride):
    strides, dilations = STRIDES_AND_DILATIONS[output_stride]
    total, dilation = 4, 1
    for stride, (before, after), plain in zip(strides, dilations, (1, 2, 2, 2), strict=True):
        total *= stride
        assert before == dilation
        dilation *= plain // stride
        assert after == dilation
    assert total == output_stride

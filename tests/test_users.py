"""What `same_as_plain` lets pass, and what it does not: a test that cannot fail proves nothing."""

import pytest
import torch
from users import same_as_plain

SETTING = ["activations"]


def fail(error, model):
    if error:
        raise error
    return {"y": torch.zeros(1)}


def run_all(test):
    (mark,) = test.pytestmark
    for case in mark.args[1]:
        test(*case.values)


def test_error_that_a_variant_is_meant_to_raise_passes():
    run_all(same_as_plain(None, RuntimeError("as said"), settings=SETTING, raises="as said", when=bool)(fail))


@pytest.mark.parametrize(
    ("variants", "options", "message"),
    [
        ([RuntimeError("by mistake")], {}, "by mistake.*and the test does not say so"),
        ([None, RuntimeError("as said")], {"raises": "as said"}, "raises nothing, for as said"),
        ([RuntimeError("otherwise")], {"raises": "as said"}, "otherwise"),
        ([None, RuntimeError("as said")], {"raises": "as said", "when": lambda error: not error}, "raises nothing"),
    ],
    ids=["unsaid", "one_of_two", "other_message", "the_other"],
)
def test_error_that_is_not_as_said_fails(variants, options, message):
    with pytest.raises(AssertionError, match=message):
        run_all(same_as_plain(*variants, settings=SETTING, **options)(fail))


@pytest.mark.parametrize("kind", [AttributeError, ImportError, NameError, TypeError])
def test_mistake_of_the_test_itself_never_counts_as_agreement(kind):
    with pytest.raises(kind, match="of the test"):
        run_all(same_as_plain(kind("of the test"), settings=SETTING, raises="of the test")(fail))


def test_error_that_no_variant_raises_is_no_test():
    with pytest.raises(AssertionError, match="no variant of fail raises as said"):
        same_as_plain(None, raises="as said", when=bool)(fail)


def test_what_differs_fails():
    def say_setting(model):
        return {"y": torch.tensor(float(model.recompute == "none"))}

    with pytest.raises(AssertionError, match="1 of 2 differ"):
        run_all(same_as_plain(settings=SETTING)(say_setting))

import pytest

from timm_tresnet.utils.errors import summarise


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("needs a\n  number"), "needs a number"),
        (OSError("no such file"), "no such file"),
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError(), "ValueError"),
        (AttributeError("  "), "AttributeError"),
    ],
    ids=["lines", "explains_itself", "type_says_more", "no_text", "blank"],
)
def test_error_is_said_in_one_line(error, text):
    assert summarise(error) == text


def test_long_error_is_cut():
    text = summarise(ValueError("x" * 10_000))
    assert len(text) < 700
    assert text.endswith("...")

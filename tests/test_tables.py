import pytest

from timm_tresnet.utils.tables import format_bar, format_columns, format_markdown


def test_markdown_has_titles_a_rule_and_a_line_for_each_row():
    assert format_markdown(["model", "ms"], [["tresnet_m", 7], ["resnet50", None]]) == (
        "| model | ms |\n| --- | --- |\n| tresnet_m | 7 |\n| resnet50 | None |"
    )


@pytest.mark.parametrize(("row", "line"), [(["a"], "| a |  |"), ([], "|  |  |"), (["", "b"], "|  | b |")])
def test_a_row_of_markdown_has_every_column_even_if_it_ends_early(row, line):
    assert format_markdown(["x", "y"], [row]).splitlines()[2:] == [line]


def test_markdown_without_rows_is_its_head():
    assert format_markdown(["x", "y"], []) == "| x | y |\n| --- | --- |"


def test_a_bar_in_a_cell_of_markdown_starts_no_column():
    assert format_markdown(["|w|"], [["a|b"]]).splitlines() == [r"| \|w\| |", "| --- |", r"| a\|b |"]


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [["model", "ms", "on"], ["tresnet_m", "7", "cpu"], ["r", "10.25", "cuda"]]
    assert format_columns(rows).splitlines() == [
        "model      ms     on",
        "tresnet_m  7      cpu",
        "r          10.25  cuda",
    ]


def test_rows_may_end_early_and_no_line_ends_in_spaces():
    rows = [["a"], ["long", "b", "c"], [], ["d", "", ""]]
    assert format_columns(rows).split("\n") == ["a", "long  b  c", "", "d"]


@pytest.mark.parametrize("rows", [[], [[]], [[""]]], ids=["no_row", "no_cell", "empty_cell"])
def test_nothing_in_columns_is_an_empty_text(rows):
    assert format_columns(rows) == ""


def test_markdown_rows_stay_rows_whatever_is_in_them():
    assert format_markdown(["a"], [["1\n| 2 |\r\n# 3"]]).splitlines()[2:] == [r"| 1 \| 2 \| # 3 |"]


@pytest.mark.parametrize(
    ("share", "bar"),
    [(0, ""), (1e-6, "▏"), (0.25, "█"), (0.34, "█▍"), (1, "████")],
    ids=["0", "tiny", "1", "odd", "all"],
)
def test_bar_is_as_long_as_the_share_and_shows_what_is_more_than_nothing(share, bar):
    assert format_bar(share, 4) == bar


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "no such encoding"])
def test_bar_where_block_characters_cannot_be_written_is_of_number_signs(encoding):
    assert format_bar(0.35, 4, encoding) == "##"
    assert format_bar(0, 4, encoding) == ""

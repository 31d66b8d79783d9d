from timm_tresnet.tables import format_columns, format_markdown


def test_markdown_has_a_line_under_its_titles():
    table = format_markdown(["", "top-1, %"], [["ours", 81.5], ["", None]])
    assert table == "|  | top-1, % |\n| --- | --- |\n| ours | 81.5 |\n|  | None |"


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [["model", "weights"], ["tresnet_m", "cached"], ["a"], []]
    assert format_columns(rows) == "model      weights\ntresnet_m  cached\na\n"

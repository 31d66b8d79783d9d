import json
import math
import os

import pytest

from timm_tresnet.utils.schema import (
    FLAG,
    TEXT,
    Table,
    choice,
    find_fault,
    format_value,
    integer,
    list_of,
    map_of,
    number,
    read_json,
)


@pytest.mark.parametrize(
    ("make", "good", "bad"),
    [  # made in the test, which mutants of these functions would not reach otherwise
        (lambda: integer(0, 9), [0, 9], [-1, 10, 1.0, True, "1", None, [1], 10**400]),
        (lambda: number(0, 1), [0, 1, 0.5], [-0.1, 1.1, math.nan, math.inf, -math.inf, True, "0.5", None, 10**400]),
        (lambda: number(0, 1, above=True), [1, 1e-9], [0, 0.0, -1]),
        (lambda: choice("a", 1, None, False), ["a", 1, None, False], [True, 0, 1.0, "b", [], {}]),
        (lambda: FLAG, [True, False], [0, 1, "true", None]),
        (lambda: TEXT, ["", "naïve 模型", "👩‍💻"], ["a\nb", "\x1b[31m", "\ud800", 1, None, ["a"]]),
        (
            lambda: list_of(integer(1, 9), 2, 3),
            [[1, 2], [1, 2, 3]],
            [[1], [1, 2, 3, 4], [1, "2"], "12", {"0": 1}, None],
        ),
        (lambda: map_of(TEXT), [{}, {"a": "b"}], [{"a": 1}, {"\n": "b"}, ["a"], None]),
        (lambda: FLAG.or_null(), [None, True], ["null", 0]),
        (lambda: FLAG.or_else(TEXT), [True, "a"], [1, None]),
    ],
    ids=["integer", "number", "above", "choice", "flag", "text", "list", "map", "or_null", "or_else"],
)
def test_kinds_take_what_they_say_and_nothing_else(make, good, bad):
    kind = make()
    assert [find_fault(value, kind, "x") for value in good] == [None] * len(good)
    for value in bad:
        fault = find_fault(value, kind, "x")
        assert fault.startswith(f"needs x to be {kind.description}, got ")
        assert fault.isprintable()


def test_kinds_say_what_they_take():
    said = {
        "an integer from 0 to 9": integer(0, 9),
        "a number from 0 to 1": number(0, 1),
        "a number above 0 and up to 1": number(0, 1, above=True),
        'one of "a", 1, null': choice("a", 1, None),
        '"a"': choice("a"),
        "a list of 2 to 3, each an integer from 1 to 9": list_of(integer(1, 9), 2, 3),
        "an object, each value text without control characters": map_of(TEXT),
        "an integer from 0 to 9 or null": integer(0, 9).or_null(),
        'an integer from 0 to 9 or "a"': integer(0, 9).or_else(choice("a")),
    }
    assert [kind.description for kind in said.values()] == list(said)


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"a": 1, "b": {"c": "d"}}, None),
        ({"b": {}, "other": 1}, None),
        ([], "needs its content to be an object, got []"),
        ({"a": 1}, "needs b, which is missing"),
        ({"b": {"c": 1}}, "needs b.c to be text without control characters, got 1"),
        ({"b": [1]}, "needs b to be an object, got [1]"),
        ({"b": {"e\n": 1}}, 'has "b.e\\n", which is not allowed'),
    ],
)
def test_tables_name_the_first_fault_and_where_it_is(value, fault):
    inner = Table({"c": TEXT}, unknown_reason="which is not allowed")
    assert find_fault(value, Table({"a": integer(0, 9), "b": inner}, required=("b",))) == fault


@pytest.mark.parametrize("value", ["a" * 10**6, "\x1b\ud800", list(range(10**5)), [[[]]], {"a": {}}, 1e300, None])
def test_values_are_shown_short_and_printable(value):
    assert len(format_value(value)) <= 63
    assert format_value(value).isprintable()
    assert format_value(value).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b'{"a": ', "is not JSON"),
        (b"[" * 10**6, "is not JSON"),
        (b"9" * 10**5, "is not JSON"),
        (None, "is not a file"),
    ],
    ids=["empty", "not_utf8", "cut", "deep", "long_number", "folder"],
)
def test_what_is_not_json_is_named(content, message, tmp_path):
    path = tmp_path / "config.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path} {message}"):
        read_json(path)
    with pytest.raises(ValueError, match=f"^the file {message}"):
        read_json(path, "the file")


def test_huge_files_and_pipes_are_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**26 + 1)  # sparse
    with pytest.raises(ValueError, match="at most 67108864 bytes long, got 67108865"):
        read_json(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is not a file"):
        read_json(path)
    path.unlink()
    with pytest.raises(OSError, match=r"config\.json"):
        read_json(path)
    path.write_text(json.dumps({"a": 1}))
    assert read_json(path) == {"a": 1}

import sys

import fuzz
import pytest

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="needs fork"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]


FEW = ("configs", "images", "checkpoints")  # the others open slowly, and have tests of their own


@pytest.mark.parametrize(
    ("door", "count"),
    [
        *((door, 3) for door in FEW),
        *(pytest.param(door, 12, marks=pytest.mark.thorough) for door in fuzz.DOORS),
    ],
)
def test_damaged_inputs_are_answered_refused_or_skipped(door, count, tmp_path):
    if door in ("annotations", "last.ckpt"):
        pytest.importorskip("lightning", reason="install the extra tagging")
    counts = fuzz.knock(door, count, 1, tmp_path / "kept")
    assert counts.total() == count
    reports = [path.read_text() for path in sorted(tmp_path.rglob("report.txt"))]
    assert not reports, reports[0]

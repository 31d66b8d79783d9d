import io
import sys
from collections import Counter
from pathlib import Path

import pytest

from timm_tresnet.cli.results import (
    Results,
    describe_written,
    print_errors,
    print_predictions,
    show_progress,
)

CAT = {"label": "cat", "index": 3, "probability": 0.75}
DOG = {"label": "dog", "index": 5, "probability": 0.25}
GOOD = (Path("a.jpg"), {"image": "a.jpg", "predictions": [CAT, DOG]})
BROKEN = (Path("b.jpg"), {"image": "b.jpg", "error": "not an image"})


class Recorder:
    """Records, in one list, what is written to a file or beside images."""

    def __init__(self, events, existing=()):
        self.events, self.existing = events, existing

    def write(self, *arguments):
        self.events.append(arguments)
        return arguments[0] not in self.existing


class Terminal(io.StringIO):
    encoding = "ascii"

    def isatty(self):
        return True


def test_results_without_an_output_are_kept_for_printing(capsys):
    results = Results(None, None)
    results.add([GOOD, BROKEN])
    results.add([GOOD])
    assert results.kept == [GOOD[1], BROKEN[1], GOOD[1]]
    assert results.tally == Counter(images=3, errors=1)
    assert capsys.readouterr() == ("", "")


def test_sidecars_are_written_before_the_line_that_says_that_the_image_is_done(capsys):
    events = []
    results = Results(Recorder(events), Recorder(events))
    results.add([GOOD, BROKEN])
    assert events == [(GOOD[0], ["cat", "dog"]), ([GOOD[1], BROKEN[1]],)]
    assert results.kept == []
    assert results.tally == Counter(images=2, errors=1, sidecars=1)
    assert capsys.readouterr() == ("", "")


def test_with_sidecars_alone_a_skipped_image_is_said_at_once(capsys):
    results = Results(None, Recorder([], existing=[GOOD[0]]))
    results.add([GOOD, BROKEN])
    assert results.tally == Counter(images=2, errors=1, sidecars_there=1)
    assert capsys.readouterr() == ("", "timm-tresnet: skipped b.jpg: not an image\n")


@pytest.mark.parametrize("shown", [False, True])
def test_progress_counts_images_and_passes_batches_on(shown, capsys):
    batches = [[1, 2, 3], [4]]
    assert list(show_progress(iter(batches), 4, shown)) == batches
    out, err = capsys.readouterr()
    assert out == ""
    assert ("4/4 images" in err) == shown


@pytest.mark.parametrize(
    ("tally", "output", "sidecar", "lines"),
    [
        ({"images": 3, "errors": 1}, "r.csv", False, ["r.csv: 3 images, 1 with errors"]),
        ({"images": 3, "there": 2}, "r.csv", False, ["r.csv: 5 images, 3 of them new, 0 with errors"]),
        ({"sidecars": 2}, None, True, ["2 text files written beside images"]),
        (
            {"images": 3, "sidecars": 2, "sidecars_there": 1},
            "a\nb.csv",
            True,
            [r"a\nb.csv: 3 images, 0 with errors", "2 text files written beside images, 1 were there already"],
        ),
    ],
)
def test_what_was_written_is_said_in_a_line_each(tally, output, sidecar, lines):
    assert describe_written(Counter(tally), output and Path(output), sidecar).splitlines() == lines


def test_errors_are_printed_without_the_images_that_went_well(capsys):
    print_errors([GOOD[1], BROKEN[1]])
    assert capsys.readouterr() == ("", "timm-tresnet: skipped b.jpg: not an image\n")


def test_predictions_are_a_line_for_each_image_in_a_file_and_bars_on_a_terminal(capsys, monkeypatch):
    shown = [GOOD[1], BROKEN[1], {"image": "long.jpg", "predictions": []}]
    print_predictions(shown)
    assert capsys.readouterr().out == "a.jpg     cat 75.0%  dog 25.0%\nlong.jpg\n"
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    print_predictions(shown)
    assert terminal.getvalue().splitlines() == [
        f"a.jpg      75.0%  {'#' * 15}       cat",
        f"           25.0%  {'#' * 5}                 dog",
        "long.jpg                                nothing probable enough",
    ]


def test_nothing_is_printed_if_every_image_was_skipped(capsys):
    print_predictions([BROKEN[1]])
    assert capsys.readouterr() == ("", "")

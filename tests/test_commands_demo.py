import importlib
import sys

import pytest

from timm_tresnet.cli import main as cli
from timm_tresnet.cli.commands import demo


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "timm_tresnet.demo.page", raising=False)
    assert cli.main(["demo"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("timm-tresnet: demo needs further packages (")
    assert error.endswith("; in the clone of timm-tresnet, run pip install '.[demo]'\n")


class Page:
    """Stands in for `timm_tresnet.demo.page` and records its calls; tests with a browser run the real page."""

    def __init__(self, embedded):
        self.list_weights = lambda: (embedded, ["on_the_hub"])
        self.asked = []

    def build_demo(self, weights, beside, keep_ratio):
        self.asked += [weights, beside, *["keep_ratio"] * keep_ratio]

    def serve_demo(self, page, host, port):
        self.asked += [host, port]
        if port == 1:
            raise OSError("Cannot find empty port in range: 1-1.")


@pytest.mark.parametrize(
    ("embedded", "options", "asked"),
    [
        (["a"], [], [["a", "on_the_hub"], None, "127.0.0.1", None]),
        (["a", "b"], [], [["a", "b", "on_the_hub"], None, "127.0.0.1", None]),
        (["a", "b"], ["--model", "c", "--port", "8000"], [["c"], None, "127.0.0.1", 8000]),
        (["a"], ["--model", "c", "--model", "d", "--host", "0.0.0.0"], [["c", "d"], "d", "0.0.0.0", None]),
        (["a"], ["--keep-ratio"], [["a", "on_the_hub"], None, "keep_ratio", "127.0.0.1", None]),
    ],
    ids=["one", "two", "chosen", "two_chosen", "keep_ratio"],
)
def test_nothing_is_downloaded_unasked_and_only_this_machine_is_served_unless_told(
    embedded, options, asked, monkeypatch
):
    page = Page(embedded)
    monkeypatch.setitem(sys.modules, "timm_tresnet.demo.page", page)
    assert cli.main(["demo", *options]) == 0
    assert page.asked == asked


def test_port_that_is_taken_is_a_message(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm_tresnet.demo.page", Page(["a"]))
    assert cli.main(["demo", "--port", "1"]) == 2
    assert "cannot serve the demo: Cannot find empty port" in capsys.readouterr().err


def test_importing_the_command_does_not_import_gradio(run_python):
    importlib.import_module(demo.__name__)
    run_python("-c", "import sys, timm_tresnet.cli.main; assert not {'gradio', 'captum', 'torch'} & {*sys.modules}")

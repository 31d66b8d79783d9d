"""The snippets of README.md and of docs/ do what they say."""

import pytest
import torch.distributed
from publishing import direct_client
from snippets import (
    NOT_RUN,
    PAGES,
    Missing,
    find_reason,
    make_stand_ins,
    read_commands,
    read_snippets,
    run_command,
    split_commands,
)

PARSED = [page for page in PAGES if page.stem != "photographs"]  # which tests/test_photographs.py really runs


@pytest.fixture
def stand_ins(request, hub, monkeypatch, tmp_path):
    """For the snippets of the test's page, if it has one."""
    direct_client(monkeypatch, hub, tmp_path / "cache")
    folder = tmp_path / "user"
    folder.mkdir()
    page = request.node.callspec.params.get("page")
    make_stand_ins(page.read_text(encoding="utf-8") if page else "", folder, hub, monkeypatch)


@pytest.fixture
def one_process():
    """A process group of one process, as FSDP2 needs it."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=pytest.mark.thorough if page.stem == "inference" else [])  # compiles
        for page in PARSED
    ],
)
@pytest.mark.usefixtures("stand_ins", "one_process")
def test_snippets_of_a_page_run_in_their_order(page):
    missing = {}
    for example in read_snippets(page):
        try:
            example.evaluate()
        except Missing as error:
            missing[f"{page.name}:{example.line}"] = str(error)
    if missing:
        pytest.skip("; ".join(f"{place}: {reason}" for place, reason in missing.items()) + "; the others ran")


def test_commands_that_are_not_run_are_in_a_page():
    used = {find_reason(words) for page in PAGES for words in read_commands(page)}
    assert set(NOT_RUN) - used == set()


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("rm -rf folder", "nobody knows how to test this"),
        ("timm-tresnet classify nowhere.jpg", "exit status 1"),
        ("pip install '.[nonsense]'", "no extras {'nonsense'}"),
    ],
    ids=["unknown", "failing", "extra"],
)
def test_a_command_that_does_not_work_fails(command, error):
    (words,) = split_commands(command)
    with pytest.raises(AssertionError, match=error):
        run_command(words)

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from timm_tresnet.cli import main as cli
from timm_tresnet.utils.images import SAMPLES

COMMAND = Path(sys.executable).parent / "timm-tresnet"
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def test_an_option_that_no_command_has_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["list", "--epochs", "5"])
    assert capsys.readouterr().err.splitlines() == [
        "timm-tresnet list: error: unrecognized arguments: --epochs 5",
        "example: timm-tresnet list --json",
        "`timm-tresnet list --help` lists the options",
    ]


@pytest.mark.parametrize("name", cli._COMMANDS)
def test_wrong_use_of_a_command_is_answered_with_an_example(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([name, "--nonsense=1"])
    assert f"\nexample: timm-tresnet {cli._COMMANDS[name].EXAMPLE}\n" in capsys.readouterr().err


@pytest.mark.thorough  # the next one starts it too
def test_installed_command_works_offline():
    process = subprocess.run(
        [COMMAND, "classify", SAMPLES / "cat.jpg"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cat.jpg" in process.stdout


@pytest.mark.parametrize("words", [[], ["--help"], ["list"]], ids=["no_command", "help", "list"])
def test_output_that_is_cut_off_ends_the_command_quietly(words):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([COMMAND, *words], env=BUFFERED, text=True, **pipes)
    process.stdout.close()  # as `head` does
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["--help"], ["list"]], ids=["help", "list"])
def test_output_to_a_full_disk_ends_in_a_sentence(words):
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [COMMAND, *words], env=BUFFERED, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert process.stderr == "timm-tresnet: the disk is full, no room for standard output\n"
    assert process.returncode == 2


def test_ctrl_c_ends_a_command_in_one_line(monkeypatch, capsys):
    def interrupt(words, **options):
        print("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(cli._COMMANDS["list"], "run", interrupt)
    assert cli.main(["list"]) == 130
    assert capsys.readouterr() == ("half\n", "timm-tresnet: interrupted\n")


def test_version_names_the_packages_that_matter(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    expected = f"timm-tresnet {version('timm-tresnet')}, timm {version('timm')}, torch {version('torch')}\n"
    assert capsys.readouterr().out == expected


def test_version_does_not_fail_where_a_package_was_not_installed(monkeypatch, capsys):
    def find(name):
        raise cli.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cli.importlib.metadata, "version", find)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert "timm of unknown version" in capsys.readouterr().out


def test_help_begins_with_an_example_for_each_command_that_its_parser_takes(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    page = capsys.readouterr().out
    assert page.startswith("examples:\n  timm-tresnet ")
    examples = re.findall(r"^  timm-tresnet (.*)$", page, re.MULTILINE)
    commands = re.findall(r"^    ([\w-]+)", page.partition("options:")[0], re.MULTILINE)
    assert [example.split()[0] for example in examples] == commands
    for example in examples:
        name, *_ = words = shlex.split(example)
        assert cli.make_parser().parse_args(words).command == name
        with pytest.raises(SystemExit, match="0"):
            cli.main([name, "--help"])
        assert capsys.readouterr().out.startswith(f"example:\n  timm-tresnet {example}\n\nusage: ")


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("clasify", "there is no command 'clasify'; did you mean classify?"),
        ("bench", "there is no command 'bench'; did you mean benchmark?"),
        ("frobnicate", "there is no command 'frobnicate'; choose from classify, list, demo, "),
    ],
)
def test_a_command_typed_wrongly_is_answered_with_the_right_one(typed, answer, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([typed, "photo.jpg"])
    assert answer in capsys.readouterr().err


def test_without_a_command_each_is_listed_with_a_line(capsys):
    assert cli.main([]) == 0
    usage, _, *lines = capsys.readouterr().out.splitlines()
    assert usage == "usage: timm-tresnet COMMAND ..."
    listed = [line.split(maxsplit=1) for line in lines if line.startswith("  ")]
    assert [name for name, _ in listed] == list(cli._COMMANDS)
    assert all(about == cli._COMMANDS[name].ABOUT["help"] for name, about in listed)


def test_an_error_of_the_operating_system_is_a_sentence(monkeypatch, capsys):
    def fail(words, **options):
        open("nowhere/file.json")

    monkeypatch.setattr(cli._COMMANDS["list"], "run", fail)
    assert cli.main(["list"]) == 2
    assert capsys.readouterr().err == "timm-tresnet: there is no nowhere/file.json\n"

import argparse
import builtins
import sys

import pytest

from timm_tresnet.cli import main as cli
from timm_tresnet.cli.commands.train_tagger import add_options
from timm_tresnet.tagging.settings import Settings


def parse(*words):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return vars(parser.parse_args(["labels.csv", "--output", "tagger", *words]))


def test_settings_that_are_not_given_are_the_official_ones():
    options = parse()
    usual = vars(Settings())
    assert {name: options[name] for name in usual.keys() & options.keys()} == {
        name: value for name, value in usual.items() if name in options
    }
    assert usual.keys() - options.keys() == {"model_args"}
    assert (usual["gamma_neg"], usual["gamma_pos"], usual["clip"], usual["ema_decay"]) == (4, 0, 0.05, 0.9997)


def test_arguments_of_the_network_keep_their_types():
    words = parse("--model-kwargs", "num_groups=100", "layers=(1,2,1,1)", "use_se=False", "stem=conv7x7")[
        "model_kwargs"
    ]
    assert dict(words) == {"num_groups": 100, "layers": (1, 2, 1, 1), "use_se": False, "stem": "conv7x7"}


@pytest.mark.parametrize(
    "words",
    [
        ["--epochs", "0"],
        ["--batch-size", "0"],
        ["--held-out", "1"],
        ["--lr", "nan"],
        ["--loss", "focal"],
        ["--model-kwargs", "head"],
        ["--cutout", "2"],
        ["--image-size", "3"],
    ],
    ids=lambda words: words[0].strip("-"),
)
def test_values_out_of_range_are_refused_before_anything_is_read(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(*words)
    assert words[0] in capsys.readouterr().err


def test_without_its_packages_the_command_says_what_to_install(monkeypatch, tmp_path, capsys):
    real = builtins.__import__

    def missing(name, *arguments):
        if name.startswith("lightning"):
            raise ModuleNotFoundError("No module named 'lightning'", name="lightning")
        return real(name, *arguments)

    for name in [name for name in sys.modules if name.startswith("timm_tresnet.tagging.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", missing)
    assert cli.main(["train-tagger", "labels.csv", "--output", str(tmp_path / "tagger")]) == 2
    sentence = "training needs the package lightning, which is not installed; in the clone of timm-tresnet, run pip"
    assert capsys.readouterr().err == f"timm-tresnet: {sentence} install '.[tagging]'\n"

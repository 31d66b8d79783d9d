import dataclasses
import re
import shlex
import subprocess

import pytest
from huggingface_hub import ModelCard

from timm_tresnet.tagging.card import Training, make_card
from timm_tresnet.tagging.settings import Settings

TRAINING = Training(
    labels=("cat", "a|b *c*"),
    thresholds=[0.25, 0.5],
    average_precisions=[0.875, float("nan")],
    scores={"mAP": 87.5, "CF1": 80.0, "OF1": 81.25},
    label_counts=[12, 3],
    images=(100, 10),
    data=("train.csv", "val.csv"),
    settings=Settings(),
    head="ml_decoder",
    epoch=7,
    averaged=True,
    image_size=64,
    command="timm-tresnet train-tagger train.csv --output tagger",
)


def test_a_card_says_how_good_the_tagger_is_and_what_it_was_made_of():
    card = ModelCard(make_card(TRAINING, "tresnet_m"))
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.library_name == "timm"
    assert "multi-label" in card.data.tags
    parts = ("mAP on held-out images | 87.50 %", "100 images of `train.csv`", "after epoch 7 of 40", TRAINING.command)
    for part in parts:
        assert part in card.text
    assert r"| cat | 12 | 87.5% | 0.25 |" in card.text
    assert r"| a\|b \*c\* | 3 |  | 0.5 |" in card.text  # no image held out has it


@pytest.mark.parametrize(
    ("changes", "papers"),
    [
        ({}, ["2009.14119", "2111.12933", "2003.13630"]),
        ({"head": "linear"}, ["2009.14119", "2003.13630"]),
        ({"head": "linear", "settings": Settings(loss="bce")}, ["2003.13630"]),
    ],
    ids=["ml_decoder_asl", "linear_asl", "linear_bce"],
)
def test_a_card_cites_what_was_used(changes, papers):
    card = make_card(dataclasses.replace(TRAINING, **changes), "tresnet_m")
    assert [paper for paper in ("2009.14119", "2111.12933", "2003.13630") if f"eprint = {{{paper}}}" in card] == papers


def test_many_labels_are_not_all_in_the_table():
    many = 1500
    training = dataclasses.replace(
        TRAINING,
        labels=tuple(map(str, range(many))),
        thresholds=[0.5] * many,
        average_precisions=[0.5] * many,
        label_counts=[1] * many,
    )
    assert "and 500 more, which `config.json` names." in make_card(training, "tresnet_m")


def test_the_example_of_a_card_runs(tmp_path, monkeypatch, capsys):
    import shutil

    from timm_tresnet.utils.images import find_samples

    mosaics = find_samples({"architecture": "test_tresnet", "tag": "mosaic_cifar10"})
    shutil.copy(next(mosaics.glob("*.jpg")), tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    card = make_card(TRAINING, "test_tresnet").replace("local-dir:FOLDER", "test_tresnet.mosaic_cifar10")
    examples = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
    assert "airplane 0." in capsys.readouterr().out


def command_of(card):
    (code,) = re.findall(r"```bash\n(timm-tresnet train-tagger.*?)\n```", card, re.DOTALL)
    return code


def test_a_card_shows_no_folder_of_this_machine():
    words = [
        "timm-tresnet",
        "train-tagger",
        "/home/me/secret/train.csv",
        "--images=/home/me/photos",
        "--output",
        "/srv/x",
    ]
    words += ["--model", "local-dir:/home/me/weights", "--val", r"C:\Users\me\val.csv", "--column", "a/b"]
    data = ("/home/me/secret/train.csv", "val/held_out.csv")
    card = make_card(dataclasses.replace(TRAINING, command=shlex.join(words), data=data), "tresnet_m")
    assert not re.search("home|secret|srv|Users", card)
    assert shlex.split(command_of(card))[2:] == [
        *("train.csv", "--images=photos", "--output", "x", "--model", "local-dir:weights", "--val", "val.csv"),
        *("--column", "a/b"),
    ]
    assert "100 images of `train.csv`, 10 images of `val/held_out.csv`" in card


@pytest.mark.parametrize("word", ["a\n```\n# Heading\n", "a\r\n~~~", "'\n\\\n'", "\x1b[2J", "a\u2028b", "```"])
def test_no_word_leaves_the_command_of_a_card(word):
    command = shlex.join(["timm-tresnet", "train-tagger", "a.csv", "--column", word])
    code = command_of(make_card(dataclasses.replace(TRAINING, command=command), "tresnet_m"))
    assert len(code.splitlines()) == 1
    if "\u2028" not in word:  # which bash writes as its locale has it
        said = subprocess.run(
            ["bash", "-c", f"printf %s {code.partition('--column ')[2]}"], capture_output=True, check=True
        )
        assert said.stdout.decode() == word

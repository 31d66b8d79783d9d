import os
import shlex
import shutil
import subprocess

import pytest

from timm_tresnet.cli import main as cli
from timm_tresnet.cli.commands.recipe import find_recipes, format_flags, quote_word, read_recipe

GIVEN = ["--data-dir", "flowers", "--model", "tresnet_m"]


def print_line(capsys, *words):
    assert cli.main(["recipe", *words]) == 0
    return capsys.readouterr().out


def test_without_a_name_the_recipes_are_listed_with_a_line_each(capsys):
    lines = print_line(capsys).splitlines()
    assert [line.split()[0] for line in lines] == list(find_recipes())
    (transfer,) = [line for line in lines if line.startswith("transfer ")]
    assert transfer.endswith("  Fine-tune pretrained weights on a small data set.")


def test_show_prints_the_file_as_it_is(capsys):
    assert print_line(capsys, "transfer", "--show") == find_recipes()["transfer"].read_text()


def test_the_command_line_has_every_value_of_the_recipe_as_a_flag(capsys):
    line = print_line(capsys, "memory", *GIVEN)
    assert line.startswith(
        "python train.py --data-dir flowers --model tresnet_m --pretrained --model-kwargs recompute="
    )
    words = shlex.split(line)
    for name in read_recipe(find_recipes()["memory"]):
        assert words.count(f"--{name.replace('_', '-')}") == 1
    assert words[words.index("--lr") + 1] == "0.0002"


def test_the_command_line_is_quoted_for_the_shell(capsys):
    line = print_line(capsys, "transfer", "--data-dir", "my images; $(ls)", "--model", "local-dir:it's")
    assert shlex.split(line)[2:6] == ["--data-dir", "my images; $(ls)", "--model", "local-dir:it's"]
    assert "'my images; $(ls)'" in line


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_a_shell_reads_every_word_back_whatever_the_terminal_can_print(encoding):
    words = ["it's", 'a "b" $HOME `ls`', "!x", "~", "-", "", "ünï 目录", "a\nb\t\x1b[31m", "\\x41 'ü'", "\u00a0e\u0301"]
    words.append(os.fsdecode(b"caf\xe9"))  # a name that is no UTF-8
    line = " ".join(quote_word(word, encoding) for word in words)
    assert line.isprintable()
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}".encode(encoding).decode(encoding)], stdout=subprocess.PIPE, check=True
    )
    assert [os.fsdecode(word) for word in printed.stdout.split(b"\0")[:-1]] == words


def test_values_that_begin_with_a_dash_are_joined_to_their_flags(capsys):
    line = print_line(capsys, "transfer", "--data-dir=-my images", "--model=local-dir:--amp")
    assert shlex.split(line)[2:5] == ["--data-dir=-my images", "--model", "local-dir:--amp"]
    assert format_flags({"head_init_bias": -4.6}) == ["--head-init-bias=-4.6"]


def test_further_flags_come_last_so_that_they_win(capsys):
    line = print_line(
        capsys, "transfer", *GIVEN, "--num-classes", "102", "--", "--epochs", "5", "--mean", "0", "0", "0"
    )
    assert " --num-classes 102 " in line
    assert line.endswith(" --epochs 5 --mean 0 0 0\n")


def test_flags_of_train_script_in_the_wrong_place_are_told_the_right_one(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["recipe", "transfer", *GIVEN, "--epochs", "5"])
    assert "unrecognized arguments: --epochs 5; write flags of train.py after --" in capsys.readouterr().err


def test_arguments_after_two_dashes_are_not_checked(capsys):
    assert print_line(capsys, "transfer", *GIVEN, "--", "--show", "--", "x").endswith(" --show -- x\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["transfr"], "there is no recipe 'transfr'; did you mean transfer?"),
        (["q"], "there is no recipe 'q'; choose from frozen_norms, high_resolution, "),
        (["transfer"], "recipe transfer needs --data-dir DIR and --model MODEL, or --show to print its file"),
        (["transfer", "--model", "tresnet_m"], "needs --data-dir DIR and --model MODEL"),
        (["--show"], "name a recipe: frozen_norms, "),
        (GIVEN, "name a recipe: frozen_norms, "),
        (["--", "--epochs", "5"], "name a recipe: frozen_norms, "),
    ],
    ids=["typed_wrongly", "unknown", "no_data", "no_data_but_a_model", "show_what", "no_name", "flags_alone"],
)
def test_missing_or_wrong_arguments_are_named_in_a_sentence(words, message, capsys):
    assert cli.main(["recipe", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_flags_are_written_as_train_script_reads_them():
    recipe = {
        "amp": True,
        "batch_size": 4,
        "dist_bn": "",
        "train_img_sizes": [32, 64],
        "model_kwargs": {"recompute": "expansions", "use_se": (True, False), "drop_rate": 0.5, "block": "1"},
    }
    assert format_flags(recipe) == [
        "--amp", "--batch-size", "4", "--dist-bn", "", "--train-img-sizes", "32", "64",
        "--model-kwargs", "recompute=expansions", "use_se=(True, False)", "drop_rate=0.5", "block='1'",
    ]  # fmt: skip


@pytest.mark.parametrize("value", [False, None])
def test_values_that_no_flag_can_express_are_refused(value):
    with pytest.raises(ValueError, match=f"no flag of train.py says amp: {value}; leave it out"):
        format_flags({"amp": value})


@pytest.mark.parametrize(
    ("cuda", "words", "device", "said"),
    [
        (False, [], ["--device", "cpu"], True),
        (True, [], [], False),
        (False, ["--", "--device", "mps"], ["--device", "mps"], False),
        (False, ["--", "--device=xla"], ["--device=xla"], False),
    ],
    ids=["no_cuda", "cuda", "chosen", "chosen_with_equals_sign"],
)
def test_the_device_is_the_cpu_where_train_script_would_look_for_cuda_in_vain(
    cuda, words, device, said, capsys, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    assert cli.main(["recipe", "transfer", *GIVEN, *words]) == 0
    printed = capsys.readouterr()
    line = shlex.split(printed.out)
    assert [word for word in line if word.startswith("--device")] == [word for word in device if "device" in word]
    assert line[len(line) - len(device) :] == device
    assert ("there is no CUDA here" in printed.err) == said


def test_a_model_that_timm_does_not_know_is_asked_about_and_printed_all_the_same(capsys):
    assert cli.main(["recipe", "transfer", "--data-dir", "flowers", "--model", "tresnet_mm"]) == 0
    printed = capsys.readouterr()
    assert "--model tresnet_mm " in printed.out
    assert "there is no model tresnet_mm; did you mean tresnet_m, " in printed.err
    assert cli.main(["recipe", "transfer", "--data-dir", "flowers", "--model", "resnet50"]) == 0
    assert "there is no model" not in capsys.readouterr().err

import argparse

import pytest

from timm_tresnet.cli import main as cli
from timm_tresnet.cli.options import add_comparison_options, at_least, between, image_size, new_file


def test_image_sizes_that_the_stem_cannot_take_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["benchmark", "--image-size", "70"])
    assert "needs a multiple of 4 from 32 on, got 70" in capsys.readouterr().err


def test_image_sizes_are_numbers_of_pixels():
    assert image_size("32") == 32
    with pytest.raises(argparse.ArgumentTypeError, match="got 28"):
        image_size("28")


def test_numbers_below_the_least_are_refused():
    assert at_least(1)("1") == 1
    assert at_least(0, float)("0.5") == 0.5
    for kind, text in ((int, "0"), (float, "nan")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"needs a number from 1 on, got {text}"):
            at_least(1, kind)(text)


def test_numbers_are_from_the_least_to_the_greatest():
    assert between(0, 1)("0.5") == 0.5
    assert between(0, 30, int)("30") == 30
    for text in ("-0.1", "1.5", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"needs a number from 0 to 1, got {text}"):
            between(0, 1)(text)


def test_files_of_results_are_new(tmp_path):
    path = tmp_path / "results.json"
    assert new_file(str(path)) == path
    path.touch()
    with pytest.raises(argparse.ArgumentTypeError, match="never overwritten"):
        new_file(str(path))


def test_options_stand_at_a_measurement_on_the_cpu_that_writes_nothing():
    parser = argparse.ArgumentParser()
    add_comparison_options(parser)
    settings = vars(parser.parse_args([]))
    assert settings == {
        "batch_size": 8,
        "rounds": 5,
        "memory_gb": None,
        "device": "cpu",
        "max_batch": None,
        "amp": None,
        "channels_last": False,
        "compile": False,
        "json": None,
    }

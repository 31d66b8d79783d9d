import argparse

import pytest

from timm_tresnet import cli
from timm_tresnet.options import add_options, image_size


def test_image_sizes_that_the_stem_cannot_take_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["benchmark", "--image-size", "70"])
    assert "needs a multiple of 4 from 32 on, got 70" in capsys.readouterr().err


def test_image_sizes_are_numbers_of_pixels():
    assert image_size("32") == 32
    with pytest.raises(argparse.ArgumentTypeError, match="got 28"):
        image_size("28")


def test_options_stand_at_a_measurement_on_the_cpu_that_writes_nothing():
    parser = argparse.ArgumentParser()
    add_options(parser)
    settings = vars(parser.parse_args([]))
    assert settings == {
        "batch_size": 8,
        "rounds": 5,
        "memory_gb": 16,
        "device": "cpu",
        "max_batch": None,
        "amp": None,
        "channels_last": False,
        "compile": False,
        "json": None,
    }

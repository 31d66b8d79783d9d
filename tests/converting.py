"""Helpers of the tests of converted checkpoints."""

from pathlib import Path

import timm
import torch
from reference import relative_error

SMALL = {"layers": (2, 2, 3, 1), "planes": 16}  # test_tresnet, as the official code makes it


def save_checkpoint(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def load_folder(folder: Path, **kwargs: object) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


@torch.no_grad()
def assert_gives(folder: Path, expected: torch.Tensor, x: torch.Tensor) -> None:
    """The network in a folder of converted weights gives the expected output for x."""
    assert relative_error(load_folder(folder)(x), expected) <= 1e-5

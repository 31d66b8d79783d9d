"""Small images with labels that can be learnt: which of the four quarters are bright."""

import csv
import itertools
from pathlib import Path

import torch
from PIL import Image

LABELS = ("ä, left", "bottom", "right; top")  # a comma, a semicolon, and what is no ASCII
SMALL = {"layers": [1, 1, 1, 1], "width_factor": 0.125}
WORDS = ["--model", "test_tresnet", "--from-scratch", "--model-kwargs", "layers=(1,1,1,1)", "width_factor=0.125"]
WORDS += ["--image-size", "32", "--workers", "0", "--device", "cpu", "--batch-size", "8", "--ema-decay", "0.5"]
_PLACES = ((slice(None), slice(0, 12)), (slice(12, 24), slice(None)), (slice(0, 12), slice(12, 24)))


def write_images(folder: Path, count: int, seed: int = 0) -> Path:
    """Write images, in subfolders with the same names, and a CSV file whose labels are JSON lists; returns the file."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    subsets = [subset for size in (1, 2, 3) for subset in itertools.combinations(range(3), size)]
    path = folder / "labels.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "labels"])
        for index in range(count):
            subset = subsets[index % len(subsets)]
            pixels = torch.randint(0, 60, (3, 24, 24), generator=generator, dtype=torch.uint8)
            for label in subset:
                pixels[label, *_PLACES[label]] += 180
            name = f"{index % 3}/{index // 3}.png"
            (folder / name).parent.mkdir(exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / name)
            names = ", ".join(f'"{LABELS[label]}"' for label in subset)
            rows.writerow([name, f"[{names}]"])
    return path


def write_classes(folder: Path, count: int, seed: int = 0, names: tuple[str, ...] = ("2", "10", "ä b")) -> Path:
    """Write count images of each class, in a folder for each; returns the folder.

    The class is the channel that is brightened, which is not always the brightest.
    """
    generator = torch.Generator().manual_seed(seed)
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = torch.randint(0, 90, (3, 24, 28), generator=generator, dtype=torch.uint8)
            pixels += torch.randint(0, 80, (3, 1, 1), generator=generator, dtype=torch.uint8)
            pixels[label % 3] += 60
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / name / f"{index}.png")
    return folder

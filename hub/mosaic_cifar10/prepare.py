"""Write mosaics of four CIFAR-10 photographs each, and their labels as `timm-tresnet train-tagger` reads them.

    python hub/mosaic_cifar10/prepare.py CIFAR10 FOLDER

CIFAR10 is a folder that hub/test_tresnet/prepare.py wrote. FOLDER gets train.csv, val.csv, test.csv and the mosaics.
Mosaics of train and val consist of training photographs, and no photograph is in both. Mosaics of test consist of test
photographs.
"""

import argparse
import csv
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from timm_tresnet.utils.files import atomic_write

PHOTOGRAPH = 32  # pixels
QUALITY = 95  # of the JPEG files, as in hub/test_tresnet/prepare.py
HELD_OUT = 5_000  # training photographs, for val.csv
ROUNDS = 2  # how often each photograph is in train


def arrange(photographs: Sequence[Path], rounds: int, draw: random.Random) -> Iterator[tuple[Path, ...]]:
    """Group photographs in fours at random, each once a round; up to three are left out in a round."""
    for _ in range(rounds):
        order = draw.sample(photographs, len(photographs))
        yield from zip(*(order[first::4] for first in range(4)), strict=False)


def write_mosaics(mosaics: Iterator[tuple[Path, ...]], folder: Path, name: str) -> int:
    """Write mosaics as folder/name/00000.jpg and so on, and folder/name.csv.

    Args:
        mosaics: four photographs each: top left, top right, bottom left, bottom right. Their folders are their labels.
        folder: the folder to write.
        name: name of the part.

    Returns:
        Number of mosaics.
    """
    (folder / name).mkdir(parents=True)
    count = 0
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "labels"])
        for count, photographs in enumerate(mosaics, start=1):
            mosaic = Image.new("RGB", (2 * PHOTOGRAPH, 2 * PHOTOGRAPH))
            for position, photograph in enumerate(photographs):
                with Image.open(photograph) as image:
                    mosaic.paste(image, (position % 2 * PHOTOGRAPH, position // 2 * PHOTOGRAPH))
            path = Path(name) / f"{count - 1:05}.jpg"
            mosaic.save(folder / path, quality=QUALITY)
            rows.writerow([path.as_posix(), ";".join(sorted({photograph.parent.name for photograph in photographs}))])
    return count


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description="Write mosaics of four CIFAR-10 photographs each.")
    parser.add_argument("photographs", type=Path, help="folder that hub/test_tresnet/prepare.py wrote")
    parser.add_argument("folder", type=Path, help="folder to write, must not exist yet")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        sys.exit(f"{arguments.folder} exists already; name a new folder")
    draw = random.Random(0)
    training, test = (sorted((arguments.photographs / part).glob("*/*.jpg")) for part in ("train", "test"))
    training = draw.sample(training, len(training))
    with atomic_write(arguments.folder, overwrite=False) as unfinished:
        for name, photographs, rounds in (
            ("train", training[HELD_OUT:], ROUNDS),
            ("val", training[:HELD_OUT], 1),
            ("test", test, 1),
        ):
            print(f"{name}: {write_mosaics(arrange(photographs, rounds, draw), unfinished, name)} mosaics")


if __name__ == "__main__":
    main()

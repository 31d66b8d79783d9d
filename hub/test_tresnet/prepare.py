"""Write CIFAR-10 as JPEG class folders, `train/<class>/0000.jpg` and `test/<class>/…`, as timm's scripts read them.

CIFAR-10 comes from torchvision, which downloads the original arrays:

    python hub/test_tresnet/prepare.py FOLDER [--cache DOWNLOADS]

The weights in the package were trained on JPEG copies of the same photographs (see README.md beside this file).
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torchvision

from timm_tresnet.utils.files import atomic_write

QUALITY = 95  # of the JPEG files


def write_class_folders(dataset: torchvision.datasets.CIFAR10, folder: Path) -> Counter[str]:
    """Write the images of a dataset, numbered within their class.

    Args:
        dataset: pairs of an image (PIL) and the index of its class in `dataset.classes`.
        folder: folder for the class folders.

    Returns:
        Number of images of each class.
    """
    counts: Counter[str] = Counter()
    for image, label in dataset:
        name = dataset.classes[label]
        (folder / name).mkdir(parents=True, exist_ok=True)
        image.save(folder / name / f"{counts[name]:04}.jpg", quality=QUALITY)
        counts[name] += 1
    return counts


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description="Write CIFAR-10 as JPEG class folders.")
    parser.add_argument("folder", type=Path, help="folder to write, must not exist yet")
    parser.add_argument("--cache", type=Path, default=Path("cifar10-download"), help="torchvision's download")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        sys.exit(f"{arguments.folder} exists already; name a new folder")
    with atomic_write(arguments.folder, overwrite=False) as unfinished:
        for split, train in (("train", True), ("test", False)):
            dataset = torchvision.datasets.CIFAR10(arguments.cache, train=train, download=True)
            counts = write_class_folders(dataset, unfinished / split)
            print(f"{split}: {dict(counts)}")


if __name__ == "__main__":
    main()

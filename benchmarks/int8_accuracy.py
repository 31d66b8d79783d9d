"""Top-1 of `test_tresnet` in float32 and in int8, on CIFAR-10's test images.

    python benchmarks/int8_accuracy.py --data cifar10 --json results.json

CIFAR-10 is given as folders of image files, train/CLASS/ and test/CLASS/. Each engine's int8 artifact is calibrated on
training images by `timm_tresnet.export_model`, as in `timm-tresnet export --calibration cifar10/train`. It then
classifies all test images, and so does PyTorch in float32.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from command_line import format_command
from tqdm import tqdm

import timm_tresnet
from timm_tresnet.bench.results import start_results, write_results
from timm_tresnet.cli.options import new_file
from timm_tresnet.utils.images import find_images, read_image
from timm_tresnet.utils.tables import format_markdown

ENGINES = {"onnx": "int8.onnx", "openvino": "int8.xml"}  # format and engine -> artifact
BATCH_SIZE = 100


def find_test_images(data: Path, names: Sequence[str]) -> list[tuple[Path, int]]:
    """Find the test images and the indices of their classes.

    Raises:
        ValueError: if there are none, or their folders differ from the classes.
    """
    paths = list(find_images([data / "test"])) if (data / "test").is_dir() else []
    found = sorted({path.parent.name for path in paths})
    if found != sorted(names):
        raise ValueError(
            f"--data needs images in test/CLASS/ for {', '.join(sorted(names))}; {data / 'test'} has them for "
            f"{', '.join(found) or 'no class'}"
        )
    return [(path, names.index(path.parent.name)) for path in paths]


def measure(settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the rows of the results: float32, then each engine's int8."""
    model = timm.create_model("test_tresnet", pretrained=True).eval()
    test_images = find_test_images(settings.data, model.pretrained_cfg["label_names"])
    with tempfile.TemporaryDirectory() as folder:
        networks = {}
        for engine in settings.engines:
            artifact = Path(folder) / ENGINES[engine]
            timm_tresnet.export_model(model, artifact, engine, calibration=settings.data / "train")
            networks[engine] = timm_tresnet.ExportedModel(artifact, engine, trust=True)
        transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
        right, same = dict.fromkeys(["float32", *networks], 0), dict.fromkeys(networks, 0)
        for start in tqdm(range(0, len(test_images), BATCH_SIZE), unit="batch", disable=None):
            batch = test_images[start : start + BATCH_SIZE]
            images = torch.stack([transform(read_image(path)) for path, _ in batch])
            classes = torch.tensor([index for _, index in batch])
            with torch.no_grad():
                expected = model(images).argmax(-1)
            right["float32"] += int((expected == classes).sum())
            for engine, network in networks.items():
                predicted = network(images).argmax(-1)
                right[engine] += int((predicted == classes).sum())
                same[engine] += int((predicted == expected).sum())
    percent = 100 / len(test_images)
    common = {"images": len(test_images)}
    rows = [{"row": "float32", "top1": percent * right["float32"], "agreement": 100.0, **common}]
    for engine, network in networks.items():
        row = {"row": f"{engine}, int8", "top1": percent * right[engine], "agreement": percent * same[engine]}
        calibration_images = network.description["check"]["calibration_images"]
        rows.append({**row, **common, "calibration_images": calibration_images})
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of the results as a Markdown table."""
    table = [[row["row"], f"{row['top1']:.2f}", f"{row['agreement']:.2f}"] for row in rows]
    return format_markdown(["", "top-1, %", "same class as float32, %"], table)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write the results."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description="Top-1 of test_tresnet in float32 and in int8, on CIFAR-10.")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="CIFAR-10 as image files")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--json", type=new_file, metavar="FILE", help="file for the results, must not exist yet")
    settings = parser.parse_args(words)
    command = format_command(__file__, words)
    packages = ("onnxruntime", "openvino", "nncf")
    results = start_results(command, "cpu", settings, unrecorded=["data"], packages=packages)
    try:
        results["rows"] = measure(settings)
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"int8_accuracy.py: {error}", file=sys.stderr)
        return 1
    print(format_table(results["rows"]))
    if settings.json:
        write_results(results, settings.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

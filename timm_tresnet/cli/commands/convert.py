"""`timm-tresnet convert` makes old checkpoints loadable."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_tresnet.cli.commands import CommandError
from timm_tresnet.utils.errors import summarise
from timm_tresnet.utils.images import printable
from timm_tresnet.utils.terminal import escape
from timm_tresnet.weights.catalogue import WeightFacts

ABOUT = {
    "help": "make old checkpoints loadable",
    "description": "Convert checkpoints of the official TResNet code and its descendants, or of timm, into folders "
    "that timm.create_model('local-dir:FOLDER', pretrained=True) loads. Architecture, classes and head come from the "
    "tensors; preprocessing, labels and licence from these options, from the run of timm's train.py that wrote the "
    "checkpoint, or from the catalogue of public weights. Nothing in a checkpoint is executed.",
}
EXAMPLE = "convert tresnet_l_448.pth --output converted"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="checkpoints: .pth, .pt, .safetensors, ...; or the "
        "folders of runs of timm's train.py, of which model_best.pth.tar is taken",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="where to write; several files get a subfolder each",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")
    parser.add_argument(
        "--public-weight", metavar="NAME", help="a public weight, see `timm-tresnet list`; default: by the file's name"
    )
    parser.add_argument("--recipe", dest="public_weight", help=argparse.SUPPRESS)  # its name before 0.2
    parser.add_argument(
        "--norm-weights",
        choices=("abn", "bn"),
        help="whether norm weights are In-Place ABN's, to become |w| + 1e-5, or batch norm's; default: by the names",
    )
    parser.add_argument("--custom", action="store_true", help="also convert a network that is none of the variants")
    parser.add_argument(
        "--key", help="which of several networks in a file, such as state_dict or student (default: a moving average)"
    )
    parser.add_argument(
        "--args", metavar="FILE", help="args.yaml of the run of timm's train.py (default: in or beside the checkpoint)"
    )
    parser.add_argument(
        "--like",
        metavar="WEIGHTS",
        help="prepare images as for these: a name as --model of `timm-tresnet classify`, or a folder",
    )
    parser.add_argument(
        "--labels", metavar="FILE", help="names of the classes, one a line, or JSON (default: those of the run)"
    )
    for field in dataclasses.fields(WeightFacts):
        parser.add_argument(f"--{field.name.replace('_', '-')}", **field.metadata)


def run(words: Sequence[str], *, files: Sequence[Path], output: Path, overwrite: bool, **facts: Any) -> int:
    """Convert each file by `convert_checkpoint(file, **facts)`, say what it was, and name those that are none."""
    from timm_tresnet import convert_checkpoint, write_folder

    folders = {file: output / _name_folder(file) if len(files) > 1 else output for file in files}
    if len(set(folders.values())) < len(files):
        raise CommandError("two of the files have the same name, and each would be written to a subfolder of that name")
    failed = 0
    for file, folder in folders.items():
        try:
            conversion = convert_checkpoint(file, **facts)
            write_folder(conversion, folder, overwrite=overwrite)
        except (OSError, ValueError) as error:
            print(f"timm-tresnet: {summarise(error)}", file=sys.stderr)
            failed += 1
            continue
        classes = f"{conversion.num_classes} classes" if conversion.num_classes else "no classes"
        public = f"public weight {conversion.public_weight.name}" if conversion.public_weight else "no public weight"
        print(f"{printable(folder)}: {conversion.architecture}, {classes}, {conversion.layout} names, {public}")
        for note in conversion.notes:
            print(f"  {escape(note)}")
        for warning in conversion.warnings:
            print(f"timm-tresnet: warning: {printable(file)}: {escape(warning)}", file=sys.stderr)
    return 1 if failed else 0


def _name_folder(file: Path) -> str:
    return file.resolve().name if file.is_dir() else file.stem

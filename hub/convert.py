"""Convert an original file of a public weight, check that the result is equal, and write the folder.

python hub/convert.py MS_COCO_TRresNet_L_448_86.6.pth --public-weight tresnet_l.asl_coco_448 --output FOLDER

timm loads the folder, and its output is compared with the original file's. The latter is computed from the official
names by the plain implementation in tests/reference.py. If they differ, nothing is written.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
import torch

import timm_tresnet  # noqa: F401  registers the variants
from timm_tresnet.conversion import Conversion, convert_checkpoint, read_checkpoint, write_folder
from timm_tresnet.utils.terminal import escape
from timm_tresnet.weights.checkpoint import OFFICIAL_STEM, unwrap

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import reference

TOLERANCE = 1e-5  # relative, L2, in float32
_SIZES = ((64, 64), (96, 160))  # pixels; weights fit any size, and the plain implementation is slow


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        Exit status: 0, or 1 if nothing was written.
    """
    parser = argparse.ArgumentParser(
        description="Convert an original file of a public weight and check that the result is equal."
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--public-weight", required=True, metavar="NAME", help="a name in weights/catalogue.toml")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--repo", metavar="ORG/NAME", help="Hub repository to name in the model card")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")
    arguments = parser.parse_args(argv)
    try:
        conversion = convert_checkpoint(arguments.file, public_weight=arguments.public_weight)
        source = unwrap(read_checkpoint(arguments.file))
        write_folder(
            conversion,
            arguments.output,
            overwrite=arguments.overwrite,
            repo_id=arguments.repo,
            check=lambda folder: compare(source, conversion, folder),
        )
    except (OSError, ValueError) as error:
        print(f"hub/convert.py: nothing written: {escape(str(error))}", file=sys.stderr)
        return 1
    for message in (*conversion.notes, *conversion.warnings):
        print(escape(message))
    print(f"{arguments.output}: equal to {arguments.file}")
    return 0


@torch.no_grad()
def compare(source: dict[str, torch.Tensor], conversion: Conversion, folder: Path) -> None:
    """Compare a converted folder with its original file.

    Args:
        source: tensors of the file under the official names.
        conversion: the converted checkpoint.
        folder: the folder of the conversion.

    Raises:
        ValueError: if the file has other names, NaN or infinite values, or a different output.
    """
    if OFFICIAL_STEM not in source:
        raise ValueError(f"needs a file of the official code to compare with, got {conversion.layout} names")
    if conversion.warnings:
        raise ValueError(f"cannot be compared: {'; '.join(conversion.warnings)}")
    source = {name: tensor.float() for name, tensor in source.items()}
    arguments = {"negative_slope": "slope", "stem_negative_slope": "stem_slope"}
    slopes = {arguments[name]: slope for name, slope in conversion.public_weight.slopes.items()}
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    generator = torch.Generator().manual_seed(0)
    for size in _SIZES:
        x = torch.rand(2, 3, *size, generator=generator)
        actual, expected = model(x), reference.official_forward(source, x, **slopes)
        error = ((actual - expected).norm() / expected.norm()).item()
        if not error <= TOLERANCE:
            raise ValueError(f"the output at {size} differs by {error:.1e}, more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    sys.exit(main())

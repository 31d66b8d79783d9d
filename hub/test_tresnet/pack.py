"""Store a checkpoint of timm's train.py as the half-precision safetensors file inside the package.

python hub/test_tresnet/pack.py CHECKPOINT.pth.tar timm_tresnet/weights/test_tresnet.r64_cifar10.safetensors
"""

import argparse
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.models import load_state_dict

from timm_tresnet.files import whole


def pack(checkpoint: Path, output: Path) -> None:
    """Check that a checkpoint fits `test_tresnet`, then write its weights in half precision.

    Args:
        checkpoint: file that timm's train.py wrote.
        output: safetensors file to write; replaced only once the new one is complete.

    Raises:
        RuntimeError: if names or shapes of the checkpoint are not those of `test_tresnet`.
    """
    state_dict = load_state_dict(str(checkpoint), weights_only=True)
    timm.create_model("test_tresnet").load_state_dict(state_dict)
    halves = {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in state_dict.items()
    }
    for name, tensor in halves.items():
        if not torch.isfinite(tensor).all():
            raise RuntimeError(f"{name} of {checkpoint} does not fit float16; train with less extreme weights")
    with whole(output) as unfinished:
        save_file(halves, unfinished, metadata={"format": "pt"})
        unfinished.chmod(0o644)  # save_file leaves 0600


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Store a checkpoint as the weights inside the package.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    pack(arguments.checkpoint, arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size} bytes")

"""Store a checkpoint as a half-precision safetensors file inside the package.

    python hub/test_tresnet/pack.py CHECKPOINT.pth.tar OUTPUT/test_tresnet.r64_cifar10.safetensors
    python hub/test_tresnet/pack.py TAGGER/model.safetensors OUTPUT/test_tresnet.mosaic_cifar10.safetensors

The first checkpoint is from timm's train.py, the second from `timm-tresnet train-tagger`. The output's name is the name
of the weights in the registry.
"""

import argparse
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.models import load_state_dict

from timm_tresnet.utils.files import atomic_write


def pack(checkpoint: Path, output: Path, model: str = "test_tresnet") -> None:
    """Check that a checkpoint fits a network, then write its weights in half precision.

    Args:
        checkpoint: checkpoint of timm's train.py or `timm-tresnet train-tagger`.
        output: safetensors file to write, atomically.
        model: name of the network in timm.

    Raises:
        RuntimeError: if names or shapes of the checkpoint differ from the network's, or a value exceeds float16.
    """
    state_dict = load_state_dict(str(checkpoint), weights_only=True)
    timm.create_model(model).load_state_dict(state_dict)
    halves = {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in state_dict.items()
    }
    for name, tensor in halves.items():
        if not torch.isfinite(tensor).all():
            raise RuntimeError(f"{name} of {checkpoint} does not fit float16; train with less extreme weights")
    with atomic_write(output) as unfinished:
        save_file(halves, unfinished, metadata={"format": "pt"})
        unfinished.chmod(0o644)  # save_file leaves 0600


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Store a checkpoint as the weights inside the package.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    pack(arguments.checkpoint, arguments.output, arguments.output.stem)
    print(f"{arguments.output}: {arguments.output.stat().st_size} bytes")

"""Average the weights of a network's checkpoints, and recompute its norms' statistics from training images.

    python hub/test_tresnet/average.py DATA OUTPUT.safetensors CHECKPOINT.pth.tar ...

The average of weights at the ends of learning-rate cycles is better than each of them ("Averaging Weights Leads to
Wider Optima and Better Generalization", arXiv:1803.05407). The statistics of averaged weights are not the average of
the statistics, and training statistics are of augmented images. So they are computed again from all training images
with the preprocessing of inference.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.models import load_state_dict
from torch import Tensor

from timm_tresnet.utils.files import atomic_write

BATCH_SIZE = 250
SEED = 0  # of the order of the images, which are stored by class


def average(state_dicts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each floating-point tensor, in its own dtype; other tensors are the first state dict's."""
    return {
        name: torch.stack([each[name].double() for each in state_dicts]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in state_dicts[0].items()
    }


def recompute_statistics(model: torch.nn.Module, data: Path) -> None:
    """Set the running statistics of a network's norms to the statistics of a folder's images, `train/CLASS/...`."""
    dataset = create_dataset("", root=str(data), split="train")
    dataset.transform = create_transform(**resolve_data_config(model=model))
    order = torch.Generator().manual_seed(SEED)
    loader = torch.utils.data.DataLoader(dataset, BATCH_SIZE, shuffle=True, generator=order)
    torch.optim.swa_utils.update_bn(loader, model)


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description="Average the weights of checkpoints and recompute the statistics.")
    parser.add_argument("data", type=Path, help="folder that prepare.py wrote")
    parser.add_argument("output", type=Path, help="safetensors file to write")
    parser.add_argument("checkpoints", type=Path, nargs="+", help="checkpoints of timm's train.py")
    arguments = parser.parse_args()
    model = timm.create_model("test_tresnet.r64_cifar10")
    model.load_state_dict(average([load_state_dict(str(path), weights_only=True) for path in arguments.checkpoints]))
    recompute_statistics(model, arguments.data)
    with atomic_write(arguments.output) as unfinished:
        save_file(model.state_dict(), unfinished, metadata={"format": "pt"})


if __name__ == "__main__":
    main()

"""Run a network on batches of images: device, autocast, memory format, compilation."""

import contextlib
import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_tresnet.deployment.folding import optimize_for_inference
from timm_tresnet.models.layers import SpaceToDepth
from timm_tresnet.utils.stacks import Mixed
from timm_tresnet.weights.preprocessing import resolve_preprocessing


class Runner:
    """Runs a network on images, without gradients.

    Args:
        network: a model from `timm.create_model` in eval mode, which is moved to the device; or another callable with a
            `pretrained_cfg` that returns logits, such as a `timm_tresnet.ExportedModel`.
        device: device of the images, and of a model.
        amp: dtype of autocast; None for float32.
        channels_last: use the channels-last memory format for images and weights.
        compile_for: batch size to compile for with `optimize_for_inference`; smaller batches are padded. None not to
            compile.
    """

    def __init__(
        self,
        network: Any,
        device: str = "cpu",
        amp: torch.dtype | None = None,
        channels_last: bool = False,
        compile_for: int | None = None,
    ) -> None:
        config = resolve_preprocessing(network)
        self._square = math.prod(config["input_size"][1:])
        self._mean, self._std = (torch.tensor(config[name], device=device).view(-1, 1, 1) for name in ("mean", "std"))
        self._network = network.to(device) if isinstance(network, torch.nn.Module) else network
        if compile_for:
            self._network = optimize_for_inference(self._network)
        elif channels_last:
            self._network = self._network.to(memory_format=torch.channels_last)
        self._device = device
        self._compile_for = compile_for or 0
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._autocast = torch.autocast(torch.device(device).type, amp) if amp else contextlib.nullcontext()

    @torch.inference_mode()
    def __call__(self, images: Tensor | Mixed) -> Tensor:
        """Compute logits, (N, C, H, W) -> (N, num_classes), float32 on the CPU.

        Args:
            images: preprocessed images, floating point; or uint8 pixels, which are scaled to 0..1 and normalised here.
                Images of several shapes run in batches of one shape, with at most as many pixels as a batch of images
                of the network's own size.
        """
        if isinstance(images, Mixed):
            return self._run_mixed(images)
        images = images.to(self._device)
        if images.dtype == torch.uint8:
            images = images.float().div_(255).sub_(self._mean).div_(self._std)
        count = len(images)
        if count < self._compile_for:
            images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, self._compile_for - count))
        with self._autocast:
            logits = self._network(images.contiguous(memory_format=self._layout))
        return logits[:count].float().cpu()

    def _run_mixed(self, images: Mixed) -> Tensor:
        single = images.split()
        indices = defaultdict(list)
        for index, shape in enumerate(images.shapes):
            indices[shape].append(index)
        logits: dict[int, Tensor] = {}
        for shape, alike in indices.items():
            most = max(1, len(images) * self._square // math.prod(shape[1:]))
            for start in range(0, len(alike), most):
                batch = alike[start : start + most]
                logits.update(zip(batch, self(torch.stack([single[index] for index in batch])), strict=True))
        return torch.stack([logits[index] for index in range(len(images))])


def find_size_multiple(network: Any) -> int:
    """Return the number of which the sides of a network's images are multiples.

    Args:
        network: a model from `timm.create_model`, or a `timm_tresnet.ExportedModel`.

    Raises:
        ValueError: if it takes images of one size only, as an artifact can.
    """
    if not isinstance(network, torch.nn.Module):
        if network.size_multiple is None:
            raise ValueError("the artifact takes images of one size only; export it without --size")
        return int(network.size_multiple)
    found = (module.block_size for module in network.modules() if isinstance(module, SpaceToDepth))
    return next(found, 1)

"""Run a network on batches of images: device, autocast, memory format, compilation."""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_tresnet.deployment.folding import optimize_for_inference
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
    def __call__(self, images: Tensor) -> Tensor:
        """Compute logits, (N, C, H, W) -> (N, num_classes), float32 on the CPU.

        Args:
            images: preprocessed images, floating point; or uint8 pixels, which are scaled to 0..1 and normalised here.
        """
        images = images.to(self._device)
        if images.dtype == torch.uint8:
            images = (images.float() / 255 - self._mean) / self._std
        count = len(images)
        images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, max(0, self._compile_for - count)))
        with self._autocast:
            logits = self._network(images.contiguous(memory_format=self._layout))
        return logits[:count].float().cpu()

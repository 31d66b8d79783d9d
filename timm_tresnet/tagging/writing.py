"""Write the folder of a trained network."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from timm_tresnet.conversion.writing import check_free
from timm_tresnet.tagging.card import Training, make_card
from timm_tresnet.tagging.class_card import ClassTraining, make_class_card
from timm_tresnet.utils.files import atomic_write
from timm_tresnet.weights.labels import make_notes
from timm_tresnet.weights.loading import load_network

TOLERANCE = 1e-5  # relative L2 distance of the loaded network's logits


@dataclass(frozen=True)
class TrainedNetwork:
    """A trained tagger or classifier.

    Args:
        architecture: name of the variant.
        model_args: arguments that differ from the variant's.
        pretrained_cfg: timm's pretrained config, with the preprocessing.
        weights: the state dict.
        training: labels, settings and scores of the training.
    """

    architecture: str
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    weights: dict[str, Tensor]
    training: Training | ClassTraining

    def config(self) -> dict[str, Any]:
        """Return config.json in timm's form; labels and thresholds reach the loaded network's `pretrained_cfg`."""
        described: dict[str, Any] = {"architecture": self.architecture, "num_classes": len(self.training.labels)}
        if self.model_args:
            described["model_args"] = self.model_args
        pretrained_cfg = {**self.pretrained_cfg, "num_classes": len(self.training.labels)}
        if isinstance(self.training, Training):
            pretrained_cfg["notes"] = list(make_notes(True, self.training.thresholds))
        return {**described, "pretrained_cfg": pretrained_cfg, "label_names": list(self.training.labels)}

    def card(self) -> str:
        """Return the model card."""
        if isinstance(self.training, Training):
            return make_card(self.training, self.architecture)
        return make_class_card(self.training, self.architecture)


def write_tagger(tagged: TrainedNetwork, folder: Path, network: nn.Module, overwrite: bool = False) -> None:
    """Write model.safetensors, config.json and README.md: all of them or none.

    Before the files get their final names, `timm.create_model('local-dir:...')` loads them and its logits are compared
    with the trained network's.

    Args:
        tagged: the trained network.
        folder: the folder to write; must be missing or empty.
        network: a network of the same architecture; it gets the weights for the comparison.
        overwrite: replace the folder of an earlier training.

    Raises:
        FileExistsError: if the folder is not empty and overwrite is not set, or it has other files than a training's.
        OSError: if a file cannot be written.
        RuntimeError: if the loaded network's logits differ.
    """
    check_free(folder, overwrite)
    with atomic_write(folder, overwrite) as partial:
        partial.mkdir()
        weights = {name: tensor.contiguous() for name, tensor in tagged.weights.items()}
        (partial / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
        config = json.dumps(tagged.config(), indent=2, ensure_ascii=False)
        (partial / "config.json").write_text(config + "\n", encoding="utf-8")
        (partial / "README.md").write_text(tagged.card(), encoding="utf-8")
        _compare(partial, tagged, network)
        check_free(folder, overwrite)  # again, since writing took a while


def _compare(folder: Path, tagged: TrainedNetwork, network: nn.Module) -> None:
    network.load_state_dict(tagged.weights)
    images = torch.rand(2, *tagged.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network.cpu().eval()(images)
        found = load_network(f"local-dir:{folder}")(images)
    error = ((found - expected).norm() / expected.norm()).item()
    if not error <= TOLERANCE:  # also true for nan
        raise RuntimeError(f"{folder} gives logits that differ from the trained network's by {error:.1e} (relative L2)")

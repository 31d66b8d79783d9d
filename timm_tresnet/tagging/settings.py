"""What a training is told."""

import dataclasses
from typing import Any

LOSSES = ("asl", "bce")
UNKNOWNS = ("ignore", "negative", "selective")
SCHEDULES = ("onecycle", "cosine", "step", "poly", "tanh")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a network is trained, whatever its labels are; the values are those of `Settings`.

    Args:
        model: name of the weights to start from, as `timm_tresnet.weights.loading.load_network` takes it.
        from_scratch: start from random weights instead.
        model_args: arguments of the network that differ from those of the weights, such as its head.
        image_size: side of the images, in pixels; None for that of the weights.
        epochs: how often each image is seen.
        batch_size: images in a step, of each process.
        accumulate: steps whose gradients are added up before the weights change.
        opt: optimizer, a name that timm knows.
        lr: the highest learning rate.
        weight_decay: of all weights but biases and norms.
        sched: how the learning rate goes: one of `SCHEDULES`.
        warmup_epochs: epochs in which it rises, for all but onecycle, which takes the first fifth.
        ema_decay: of the moving average of the weights, a step.
        precision: one of `PRECISIONS`; None for 16-mixed with CUDA, else 32-true.
        channels_last: keep images and weights with their channels last in memory.
        sync_bn: batch norm over all processes.
        held_out: share of the training images to measure with, where there are none of their own for that.
        seed: of all that is drawn.
    """

    model: str = "tresnet_m"
    from_scratch: bool = False
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    image_size: int | None = None
    epochs: int = 40  # ML_Decoder's; ASL's train.py stops after 40 of 80
    batch_size: int = 56  # ML_Decoder's, at 448 pixels
    accumulate: int = 1
    opt: str = "adam"  # both
    lr: float = 1e-4  # both
    weight_decay: float = 1e-4  # both
    sched: str = "onecycle"  # both
    warmup_epochs: int = 0
    ema_decay: float = 0.9997  # both
    precision: str | None = None
    channels_last: bool = False
    sync_bn: bool = False
    held_out: float = 0.1
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(TrainingSettings):
    """How a tagger is trained; what is not said is as in official training (train.py of ASL and ML_Decoder).

    Args:
        loss: one of `LOSSES`.
        gamma_neg: focusing of the asymmetric loss on labels that an image lacks.
        gamma_pos: focusing on those that it has.
        clip: probability up to which a label that an image lacks costs nothing.
        unknown: what becomes of labels of which nobody knows whether they are there: one of `UNKNOWNS`, to leave them
            out of the loss, to take them as absent, or to decide by how probable they are.
        gamma_unknown: focusing on them, where unknown is "selective", as are the next three.
        unknown_top_k: how many of them, the most probable ones, are left out, an image of the batch on average.
        prior: how often each label is there, by its name; None if nobody says.
        prior_threshold: from which on labels are so common that they are left out where nobody knows.
        pos_weight: how much each label counts where it is there, by its name; "balanced" for as much as where it is
            absent, None for 1.
        cutout: side of the square that is painted over, as a share of the image's; 0 for none.
        randaugment: magnitude of RandAugment, up to 30; 0 for none.
    """

    loss: str = "asl"
    gamma_neg: float = 4.0  # both, as are the next two
    gamma_pos: float = 0.0
    clip: float = 0.05
    unknown: str = "ignore"
    gamma_unknown: float = 4.0  # README.md of PartialLabelingCSL
    unknown_top_k: int = 5  # its train.py, --likelihood_topk
    prior: dict[str, float] | None = None
    prior_threshold: float = 0.5  # its README.md
    pos_weight: dict[str, float] | str | None = None
    cutout: float = 0.5  # both
    randaugment: int = 9  # torchvision's default; see `timm_tresnet.tagging.transforms`


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassSettings(TrainingSettings):
    """How a network for one class an image is trained; what is not said is as in `recipes/transfer.yaml`.

    Args:
        min_lr: the lowest learning rate.
        smoothing: of the targets.
        aa: policy of timm's augmentation, such as v0r or rand-m9-mstd0.5; "" for none.
        reprob: probability of erasing a part of an image.
        hflip: probability of mirroring an image.
    """

    epochs: int = 50
    batch_size: int = 64
    lr: float = 2e-4
    sched: str = "cosine"
    warmup_epochs: int = 3
    min_lr: float = 1e-8
    ema_decay: float = 0.995
    smoothing: float = 0.1
    aa: str = "v0r"
    reprob: float = 0.5
    hflip: float = 0.5  # train.py's default

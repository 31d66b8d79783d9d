"""Settings of a training."""

import dataclasses
from typing import Any

LOSSES = ("asl", "bce")
UNKNOWNS = ("ignore", "negative", "selective")
SCHEDULES = ("onecycle", "cosine", "step", "poly", "tanh")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings shared by taggers and classifiers; the defaults here are those of `Settings`.

    Args:
        model: name of the weights to start from, see `timm_tresnet.weights.loading.load_network`.
        from_scratch: start from random weights instead.
        model_args: arguments of the network that differ from those of the weights, such as its head.
        image_size: side of the images, in pixels; None for the size of the weights.
        epochs: number of epochs.
        batch_size: images in a batch of each process.
        accumulate: batches whose gradients are added before the weights are updated.
        opt: name of an optimizer of timm.
        lr: the highest learning rate.
        weight_decay: weight decay of all weights except biases and norms.
        sched: schedule of the learning rate, one of `SCHEDULES`.
        warmup_epochs: epochs of rising learning rate; ignored by onecycle, whose first fifth is its warmup.
        ema_decay: decay of the weights' moving average in each step.
        precision: one of `PRECISIONS`; None for 16-mixed with CUDA, else 32-true.
        channels_last: use the channels-last memory format for images and weights.
        sync_bn: use batch statistics of all processes.
        held_out: share of the training images to hold out, from 0 to 1, if there are no validation images.
        seed: seed of all random numbers.
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
    """Settings of a tagger; the defaults are those of official training (train.py of ASL and ML_Decoder).

    Args:
        loss: one of `LOSSES`.
        gamma_neg: focusing of the asymmetric loss on absent labels.
        gamma_pos: focusing of the asymmetric loss on present labels.
        clip: an absent label with at most this probability adds nothing to the loss.
        unknown: treatment of unknown labels, one of `UNKNOWNS`: leave them out of the loss, treat them as absent, or
            choose by their probability, see `timm_tresnet.tagging.losses.LabelLoss`.
        gamma_unknown: focusing on unknown labels. This and the next three are used if unknown is "selective".
        unknown_top_k: number of the most probable unknown labels that are ignored, on average for each image.
        prior: estimated frequency of each label by its name, from 0 to 1; None if unknown.
        prior_threshold: an unknown label with a higher prior is ignored.
        pos_weight: weight of each label where it is present, by its name; "balanced" to balance presence and absence,
            None for 1.
        cutout: side of the Cutout square, as a share of the image's side; 0 for none.
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
    """Settings of a classifier, one class an image; the defaults are those of `recipes/transfer.yaml`.

    Args:
        min_lr: the lowest learning rate.
        smoothing: label smoothing.
        aa: policy of timm's augmentation, such as v0r or rand-m9-mstd0.5; "" for none.
        reprob: probability of random erasing.
        hflip: probability of a horizontal flip.
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

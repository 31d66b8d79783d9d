"""The variants and their pretrained weights, one row each.

Nothing here imports PyTorch or timm, so commands that only list names start fast.
"""

import functools
import re
from pathlib import Path
from typing import Any

from timm_tresnet.utils.names import suggest
from timm_tresnet.weights.catalogue import PublicWeight, load_catalogue, make_pretrained_cfg
from timm_tresnet.weights.labels import make_notes
from timm_tresnet.weights.preprocessing import NAMES, note_assumed

# Arguments of `TResNet` for each variant; missing ones have their defaults. The registry, `timm-tresnet list`,
# README.md's test, the converter, the benchmarks and the tests read these rows.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tresnet_s": {"layers": (3, 4, 7, 3)},  # requested in Alibaba-MIIL/TResNet#40
    "tresnet_m": {"layers": (3, 4, 11, 3)},  # M, L, XL: Table "TResNet variants", arXiv:2003.13630
    "tresnet_l": {"layers": (4, 5, 18, 3), "width_factor": 1.2},
    "tresnet_xl": {"layers": (4, 5, 24, 3), "width_factor": 1.3},
    "tresnet_v2_l": {"layers": (3, 4, 23, 3), "v2": True},  # official code, src/models/tresnet_v2
    "tresnet_v2_xl": {"layers": (3, 8, 34, 5), "v2": True},  # Alibaba-MIIL/ML_Decoder, its "tresnet_xl"
    # 7eu7d7/ML-Danbooru, `TResnetD` in src_files/models/tresnet/tresnet_f.py, commit bd0e61e
    "tresnet_d": {"layers": (3, 6, 14, 3), "block": "bottleneck", "act_layer": "frelu"},
    "test_tresnet": {"layers": (2, 2, 3, 1), "width_factor": 0.25},
}


_WEIGHTS = Path(__file__).parent / "weights"
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_MOSAIC_THRESHOLDS = (
    0.733822,
    0.720875,
    0.709961,
    0.699107,
    0.752827,
    0.741801,
    0.760516,
    0.787939,
    0.724124,
    0.705942,
)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "body.conv1.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
        **kwargs,
    }


# timm completes "timm/" to the repository timm/<architecture>.<tag>. With a file name, timm loads no pickle.
_timm_hub = functools.partial(_cfg, hf_hub_id="timm/", hf_hub_filename="model.safetensors")
_timm_hub_448 = functools.partial(_timm_hub, input_size=(3, 448, 448), pool_size=(14, 14))


def _public_weight_cfg(public: PublicWeight) -> dict[str, Any]:
    """Make the config of a public weight without a Hub repository; of its backbone if we do not have its head."""
    known = make_pretrained_cfg(public, public.converted_classes)
    notes = note_assumed(known.get("notes"), [name for name in NAMES if name not in known])
    return _cfg(**{"license": None, **known, "notes": notes})


_WITH_WEIGHTS: dict[str, dict[str, Any]] = {  # variant.tag; a variant's first entry is its default
    "tresnet_m.miil_in21k_ft_in1k": _timm_hub(),
    "tresnet_m.miil_in21k": _timm_hub(num_classes=11221),
    "tresnet_m.miil_in1k": _timm_hub(),
    "tresnet_l.miil_in1k": _timm_hub(),
    "tresnet_xl.miil_in1k": _timm_hub(),
    "tresnet_m.miil_in1k_448": _timm_hub_448(),
    "tresnet_l.miil_in1k_448": _timm_hub_448(),
    "tresnet_xl.miil_in1k_448": _timm_hub_448(),
    "tresnet_v2_l.miil_in21k_ft_in1k": _timm_hub(),
    "tresnet_v2_l.miil_in21k": _timm_hub(num_classes=11221),
    "test_tresnet.r64_cifar10": _cfg(
        file=str(_WEIGHTS / "test_tresnet.r64_cifar10.safetensors"),
        num_classes=10,
        input_size=(3, 64, 64),
        pool_size=(2, 2),
        crop_pct=1.0,
        label_names=_CIFAR10,
    ),
    "test_tresnet.mosaic_cifar10": _cfg(  # hub/mosaic_cifar10; thresholds as `timm-tresnet train-tagger` chose them
        file=str(_WEIGHTS / "test_tresnet.mosaic_cifar10.safetensors"),
        num_classes=10,
        input_size=(3, 64, 64),
        pool_size=(2, 2),
        crop_pct=1.0,
        crop_mode="squash",
        label_names=_CIFAR10,
        notes=make_notes(True, _MOSAIC_THRESHOLDS),
    ),
}
_HAVE_WEIGHTS = {name.partition(".")[0] for name in _WITH_WEIGHTS}
WEIGHTS = {
    **{f"{name}.untrained": _cfg() for name in ARCHITECTURES if name not in _HAVE_WEIGHTS},
    **_WITH_WEIGHTS,
    # Last, so that no default changes.
    **{name: _public_weight_cfg(public) for name, public in load_catalogue().items() if not public.hf_hub_id},
}

# ImageNet-1k top-1 in percent, from timm's results/results-imagenet.csv (validate.py with the configs above)
IMAGENET_TOP1 = {
    "tresnet_m.miil_in21k_ft_in1k": 83.09,
    "tresnet_m.miil_in1k": 80.816,
    "tresnet_l.miil_in1k": 81.498,
    "tresnet_xl.miil_in1k": 82.06,
    "tresnet_m.miil_in1k_448": 81.71,
    "tresnet_l.miil_in1k_448": 82.278,
    "tresnet_xl.miil_in1k_448": 83.066,
    "tresnet_v2_l.miil_in21k_ft_in1k": 83.91,
}

DEPRECATED = {  # timm's former names
    "tresnet_m_miil_in21k": "tresnet_m.miil_in21k",
    "tresnet_m_448": "tresnet_m.miil_in1k_448",
    "tresnet_l_448": "tresnet_l.miil_in1k_448",
    "tresnet_xl_448": "tresnet_xl.miil_in1k_448",
}


def name_weights() -> list[str]:
    """Return the names of all weights, variant.tag, in the order of `timm.list_models`."""
    return sorted(WEIGHTS, key=lambda name: [int(part) if part.isdigit() else part for part in _split_numbers(name)])


def explain_unknown(name: str) -> str | None:
    """Return why a name is not a variant, variant.tag or deprecated name, with a suggestion; None if it is one."""
    variant, dot, tag = name.partition(".")
    if name in DEPRECATED or name in WEIGHTS or (variant in ARCHITECTURES and not dot):
        return None
    if name and Path(name).is_dir():
        return f"there is no model {name}; did you mean the folder, local-dir:{name}?"
    if "/" in name:
        return f"there is no model {name}; did you mean a repository of the Hub, hf-hub:{name}?"
    if variant in ARCHITECTURES:
        tags = [known.partition(".")[2] for known in WEIGHTS if known.startswith(f"{variant}.")]
        meant = suggest(tag, tags)
        return f"{variant} has no weights {tag!r}{meant or '; it has ' + ', '.join(tags)}"
    meant = suggest(name, [*ARCHITECTURES, *WEIGHTS, *DEPRECATED], limit=3)
    return f"there is no model {name}{meant or '; see `timm-tresnet list`'}"


def _split_numbers(name: str) -> list[str]:
    return re.split(r"(\d+)", name.lower())

"""The registry: TResNet's variants, their pretrained configs and timm entrypoints.

timm lists models by the last name of their module, and `register_model` looks for the configs beside the function.
"""

import functools
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_model_deprecations,
    resolve_pretrained_cfg,
)

from timm_tresnet.models.heads import drop_inherited, same_head
from timm_tresnet.models.network import TResNet
from timm_tresnet.weights.catalogue import PublicWeight, load_catalogue, make_pretrained_cfg
from timm_tresnet.weights.checkpoint import checkpoint_filter_fn
from timm_tresnet.weights.labels import make_notes
from timm_tresnet.weights.preprocessing import NAMES, fill_preprocessing, note_assumed

__all__ = ["TResNet"]  # timm adds each entrypoint

_logger = logging.getLogger(__name__)

ARCHITECTURES: dict[str, dict[str, Any]] = {  # blocks per stage and width
    "tresnet_s": {"layers": (3, 4, 7, 3)},  # asked for in Alibaba-MIIL/TResNet#40
    "tresnet_m": {"layers": (3, 4, 11, 3)},  # M, L, XL: Table "TResNet variants", arXiv:2003.13630
    "tresnet_l": {"layers": (4, 5, 18, 3), "width_factor": 1.2},
    "tresnet_xl": {"layers": (4, 5, 24, 3), "width_factor": 1.3},
    "tresnet_v2_l": {"layers": (3, 4, 23, 3), "v2": True},  # official code, src/models/tresnet_v2
    "tresnet_v2_xl": {"layers": (3, 8, 34, 5), "v2": True},  # Alibaba-MIIL/ML_Decoder, its "tresnet_xl"
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


# "timm/" is completed by timm to the repository timm/<architecture>.<tag>. Naming the file keeps pickles out.
_timm_hub = functools.partial(_cfg, hf_hub_id="timm/", hf_hub_filename="model.safetensors")
_timm_hub_448 = functools.partial(_timm_hub, input_size=(3, 448, 448), pool_size=(14, 14))


def _public_weight_cfg(public: PublicWeight) -> dict[str, Any]:
    """Config of a public weight that is on no Hub repository yet; the backbone's if its head is none of ours."""
    known = make_pretrained_cfg(public, public.converted_classes)
    notes = note_assumed(known.get("notes"), [name for name in NAMES if name not in known])
    return _cfg(**{"license": None, **known, "notes": notes})


default_cfgs = generate_default_cfgs(
    {
        "tresnet_s.untrained": _cfg(),
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
        "tresnet_v2_xl.untrained": _cfg(),
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
        # Behind the others, so that no default changes.
        **{name: _public_weight_cfg(public) for name, public in load_catalogue().items() if not public.hf_hub_id},
    }
)

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

# The base of what the Hub's client raises when a connection fails, in whichever of httpx and requests it has
_TransportError = [HTTPError, *(base for base in HTTPError.__mro__ if base.__module__.startswith("requests"))][-1]


def _create_tresnet(variant: str, pretrained: bool, in_chans: int | None = None, **kwargs: Any) -> TResNet:
    _log_takeover()

    def build(**model_kwargs: Any) -> TResNet:
        if in_chans is not None:
            model_kwargs["in_chans"] = in_chans
        return TResNet(**model_kwargs)

    # Our filter adapts the stem to in_chans. timm would too, and for 2 or 4 channels it throws the stem away, so what
    # it is told is the checkpoint's own number of channels. Newer timm takes that from the pretrained config.
    if not hasattr(sys.modules["timm.models"], "get_model_traits"):
        kwargs["in_chans"] = 3
    config = kwargs.get("pretrained_cfg")
    if isinstance(config, dict) and config.get("source"):  # of a folder or repository
        of_weights = (kwargs.get("pretrained_model_args") or {}).get("in_chans", 3)
        kwargs["pretrained_cfg"] = fill_preprocessing(config, default_cfgs[variant].default, of_weights)
    public = _find_public_weight(variant, config)
    if public and pretrained:
        _check_source(public, kwargs)
    # Newer timm says which arguments a folder or repository has; older ones mix them with those of the call.
    source = public.network_arguments if public else kwargs.get("pretrained_model_args") or {}
    kwargs = drop_inherited({**(public.network_arguments if public else {}), **kwargs}, source)
    other_head = not same_head(kwargs, drop_inherited(source, source))
    load = functools.partial(checkpoint_filter_fn, other_head=other_head)
    try:
        return build_model_with_cfg(
            build,
            variant,
            pretrained,
            pretrained_filter_fn=load,
            feature_cfg={"out_indices": (1, 2, 3, 4), "flatten_sequential": True},
            **{**ARCHITECTURES[variant], **kwargs},
        )
    except LocalEntryNotFoundError as error:
        reason = "it is not in the cache and the Hub cannot be reached"
        raise LocalEntryNotFoundError(_explain_missing_weights(variant, kwargs, reason)) from error
    except HfHubHTTPError:
        raise  # names the address and the status
    except _TransportError as error:
        reason = f"the download broke off: {error}"
        raise ConnectionError(_explain_missing_weights(variant, kwargs, reason)) from error


@functools.cache  # once a process
def _log_takeover() -> None:
    _logger.info("TResNet comes from the timm_tresnet plugin, not from timm; TIMM_TRESNET_AUTOLOAD=0 turns that off")


def _find_public_weight(variant: str, config: Any) -> PublicWeight | None:
    """Public weight of a registered tag; a config from the Hub or a folder comes with arguments of its own."""
    if config is not None and not isinstance(config, str):  # timm's scripts resolve the tag before
        fields = config if isinstance(config, dict) else vars(config)
        config = None if fields.get("source") else fields.get("tag")
    return load_catalogue().get(f"{variant}.{config}")


def _check_source(public: PublicWeight, kwargs: dict[str, Any]) -> None:
    config = resolve_pretrained_cfg(
        public.architecture, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
    )
    if config.has_weights or config.state_dict:
        return
    raise RuntimeError(
        f"{public.name} is on no Hub repository yet. If you have the original file, {public.files[0]}, convert it with "
        f"`timm-tresnet convert {public.files[0]} --public-weight {public.name} --output FOLDER` and load it with "
        "timm.create_model('local-dir:FOLDER', pretrained=True)"
    )


def _explain_missing_weights(variant: str, kwargs: dict[str, Any], reason: str) -> str:
    config = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    return (
        f"{variant} needs {config.hf_hub_filename or 'model.safetensors'} from the Hugging Face Hub repository "
        f"{config.hf_hub_id}, but {reason}. Either connect to the network, "
        "set HF_ENDPOINT to a mirror, point HF_HOME or cache_dir at a cache that holds it, load a folder with "
        "timm.create_model('local-dir:FOLDER', pretrained=True), or try the model inside the package, 'test_tresnet'"
    )


def tresnet_s(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """TResNet-S, 3-4-7-3 blocks; not in the paper, no public weights."""
    return _create_tresnet("tresnet_s", pretrained, **kwargs)


def tresnet_m(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """TResNet-M, 3-4-11-3 blocks (arXiv:2003.13630)."""
    return _create_tresnet("tresnet_m", pretrained, **kwargs)


def tresnet_l(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """TResNet-L, 4-5-18-3 blocks, width 1.2 (arXiv:2003.13630)."""
    return _create_tresnet("tresnet_l", pretrained, **kwargs)


def tresnet_xl(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """TResNet-XL, 4-5-24-3 blocks, width 1.3 (arXiv:2003.13630)."""
    return _create_tresnet("tresnet_xl", pretrained, **kwargs)


def tresnet_v2_l(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """TResNet-V2-L, 3-4-23-3 bottlenecks (arXiv:2104.10972); the "tresnet_l" of ImageNet-21k and ML-Decoder."""
    return _create_tresnet("tresnet_v2_l", pretrained, **kwargs)


def tresnet_v2_xl(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """TResNet-V2-XL, 3-8-34-5 bottlenecks; the "tresnet_xl" of ML-Decoder (arXiv:2111.12933)."""
    return _create_tresnet("tresnet_v2_xl", pretrained, **kwargs)


def test_tresnet(pretrained: bool = False, **kwargs: Any) -> TResNet:
    """A tiny TResNet with CIFAR-10 weights inside the package, for trying things out."""
    return _create_tresnet("test_tresnet", pretrained, **kwargs)


_ENTRYPOINTS = (tresnet_s, tresnet_m, tresnet_l, tresnet_xl, tresnet_v2_l, tresnet_v2_xl, test_tresnet)
_DEPRECATED = {
    "tresnet_m_miil_in21k": "tresnet_m.miil_in21k",
    "tresnet_m_448": "tresnet_m.miil_in1k_448",
    "tresnet_l_448": "tresnet_l.miil_in1k_448",
    "tresnet_xl_448": "tresnet_xl.miil_in1k_448",
}


def register() -> None:
    """Put the variants into timm's registry and onto `timm.models`, in place of timm's own where it has one.

    Called when timm.models has been imported (`timm_tresnet.autoload`); calling it again changes nothing.
    """
    # Not `import timm.models`: while timm imports itself, it does not have that attribute yet.
    timm_models = sys.modules["timm.models"]
    with warnings.catch_warnings():
        for entrypoint in _ENTRYPOINTS:
            # Replacing these names is the point of the plugin; any other warning stays.
            warnings.filterwarnings("ignore", message=f"Overwriting {entrypoint.__name__} in registry")
            register_model(entrypoint)
    register_model_deprecations(__name__, _DEPRECATED)
    for name in __all__:
        setattr(timm_models, name, globals()[name])

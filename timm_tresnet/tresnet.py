"""The registry: timm's entrypoints and pretrained configs of the rows in `timm_tresnet.variants`.

timm lists models by the last name of their module, and `register_model` looks for the configs beside the function.
"""

import functools
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_model_deprecations,
    resolve_pretrained_cfg,
)

from timm_tresnet.models.features import FEATURE_CLASSES, FeatureList
from timm_tresnet.models.heads import drop_inherited, same_head
from timm_tresnet.models.network import TResNet
from timm_tresnet.variants import ARCHITECTURES, DEPRECATED, WEIGHTS
from timm_tresnet.weights.catalogue import PublicWeight, load_catalogue
from timm_tresnet.weights.checkpoint import checkpoint_filter_fn
from timm_tresnet.weights.hub import require_hub
from timm_tresnet.weights.preprocessing import fill_preprocessing

__all__ = ["TResNet"]  # timm adds each entrypoint

_logger = logging.getLogger(__name__)

default_cfgs = generate_default_cfgs({**WEIGHTS})

# The base of what the Hub's client raises when a connection fails, in whichever of httpx and requests it has
_TransportError: Any = [HTTPError, *(base for base in HTTPError.__mro__ if base.__module__.startswith("requests"))][-1]


def _create_tresnet(variant: str, pretrained: bool, in_chans: int | None = None, **kwargs: Any) -> TResNet:
    _log_takeover()
    if "rebuild" in kwargs:
        warnings.warn(
            f"{variant}: the argument rebuild is now recompute; rename it, as the next release will not know rebuild",
            DeprecationWarning,
            stacklevel=3,
        )
        kwargs["recompute"] = kwargs.pop("rebuild")

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
    if "feature_cls" in kwargs:
        kwargs["feature_cls"] = FEATURE_CLASSES.get(kwargs["feature_cls"], kwargs["feature_cls"])
    other_head = not same_head(kwargs, drop_inherited(source, source))
    load = functools.partial(checkpoint_filter_fn, other_head=other_head)
    try:
        if pretrained:
            _require_hub(variant, kwargs)
        return build_model_with_cfg(
            build,
            variant,
            pretrained,
            pretrained_filter_fn=load,
            feature_cfg={"out_indices": (1, 2, 3, 4), "flatten_sequential": True, "feature_cls": FeatureList},
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


def _require_hub(variant: str, kwargs: dict[str, Any]) -> None:
    """Find out before the network is built whether its weights can be downloaded, if they have to be."""
    config = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if not config.hf_hub_id or config.file or config.state_dict:
        return
    names = (config.hf_hub_filename,) if config.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
    repo_id, _, revision = config.hf_hub_id.partition("@")
    require_hub(repo_id, *names, revision=revision or None, cache_dir=kwargs.get("cache_dir"))


def _explain_missing_weights(variant: str, kwargs: dict[str, Any], reason: str) -> str:
    config = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    return (
        f"{variant} needs {config.hf_hub_filename or 'model.safetensors'} from the Hugging Face Hub repository "
        f"{config.hf_hub_id}, but {reason}. Either connect to the network, "
        "set HF_ENDPOINT to a mirror, point HF_HOME or cache_dir at a cache that holds it, load a folder with "
        "timm.create_model('local-dir:FOLDER', pretrained=True), or try the model inside the package, 'test_tresnet'"
    )


def _make_entrypoint(variant: str) -> Callable[..., TResNet]:
    """Function under whose name timm makes a variant."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> TResNet:
        return _create_tresnet(variant, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    arguments = ", ".join(f"{name}={value}" for name, value in ARCHITECTURES[variant].items())
    entrypoint.__doc__ = f"TResNet with {arguments}."
    return entrypoint


_ENTRYPOINTS = {variant: _make_entrypoint(variant) for variant in ARCHITECTURES}
globals().update(_ENTRYPOINTS)  # where pickle, and whoever asks this module for a model, finds them


def register() -> None:
    """Put the variants into timm's registry and onto `timm.models`, in place of timm's own where it has one.

    Called when timm.models has been imported (`timm_tresnet.autoload`); calling it again changes nothing.
    """
    # Not `import timm.models`: while timm imports itself, it does not have that attribute yet.
    timm_models = sys.modules["timm.models"]
    with warnings.catch_warnings():
        for variant, entrypoint in _ENTRYPOINTS.items():
            # Replacing these names is the point of the plugin; any other warning stays.
            warnings.filterwarnings("ignore", message=f"Overwriting {variant} in registry")
            register_model(entrypoint)
    register_model_deprecations(__name__, {**DEPRECATED})
    for name in __all__:
        setattr(timm_models, name, globals()[name])

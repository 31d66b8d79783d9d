"""Register the variants of `timm_tresnet.variants` with timm: entrypoints and pretrained configs.

timm lists models by their module's last name, and `register_model` looks for the configs in the function's module.
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

__all__ = ["TResNet"]  # `register_model` adds each entrypoint

_logger = logging.getLogger(__name__)

default_cfgs = generate_default_cfgs({**WEIGHTS})

# Base class of connection errors in the Hub's client, which uses httpx or requests
_TransportError: Any = [HTTPError, *(base for base in HTTPError.__mro__ if base.__module__.startswith("requests"))][-1]


def _create_tresnet(variant: str, pretrained: bool, in_chans: int | None = None, **kwargs: Any) -> TResNet:
    _log_takeover()
    if "rebuild" in kwargs:
        warnings.warn(
            f"{variant}: the argument rebuild is now recompute; rename it, the next release will not accept rebuild",
            DeprecationWarning,
            stacklevel=3,
        )
        kwargs["recompute"] = kwargs.pop("rebuild")

    def build(**model_kwargs: Any) -> TResNet:
        if in_chans is not None:
            model_kwargs["in_chans"] = in_chans
        return TResNet(**model_kwargs)

    # Our filter adapts the stem to in_chans. timm would too, but for 2 or 4 channels it discards the stem. So timm gets
    # the checkpoint's number of channels; newer timm reads it from the pretrained config.
    if not hasattr(sys.modules["timm.models"], "get_model_traits"):
        kwargs["in_chans"] = 3
    config = kwargs.get("pretrained_cfg")
    if isinstance(config, dict) and config.get("source"):  # from a folder or repository
        of_weights = (kwargs.get("pretrained_model_args") or {}).get("in_chans", 3)
        kwargs["pretrained_cfg"] = fill_preprocessing(config, default_cfgs[variant].default, of_weights)
    public = _find_public_weight(variant, config)
    if public and pretrained:
        _check_source(public, kwargs)
    # Newer timm passes the arguments of a folder or repository separately; older timm merges them into the call's.
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
        raise  # its message has the URL and the status
    except _TransportError as error:
        reason = f"the download broke off: {error}"
        raise ConnectionError(_explain_missing_weights(variant, kwargs, reason)) from error


@functools.cache  # once a process
def _log_takeover() -> None:
    _logger.info("TResNet comes from the timm_tresnet plugin, not from timm; TIMM_TRESNET_AUTOLOAD=0 turns that off")


def _find_public_weight(variant: str, config: Any) -> PublicWeight | None:
    """Return the public weight of a registered tag; None for a config from the Hub or a folder."""
    if config is not None and not isinstance(config, str):  # timm's scripts have resolved the tag already
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
        f"{public.name} has no Hub repository yet. If you have the original file, {public.files[0]}, convert it with "
        f"`timm-tresnet convert {public.files[0]} --public-weight {public.name} --output FOLDER` and load it with "
        "timm.create_model('local-dir:FOLDER', pretrained=True)"
    )


def _require_hub(variant: str, kwargs: dict[str, Any]) -> None:
    """Check, before the network is built, that weights which must be downloaded can be."""
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
    """Make the function that timm registers for a variant."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> TResNet:
        return _create_tresnet(variant, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    arguments = ", ".join(f"{name}={value}" for name, value in ARCHITECTURES[variant].items())
    entrypoint.__doc__ = f"TResNet with {arguments}."
    return entrypoint


_ENTRYPOINTS = {variant: _make_entrypoint(variant) for variant in ARCHITECTURES}
globals().update(_ENTRYPOINTS)  # for pickle, and for imports from this module


def register() -> None:
    """Add the variants to timm's registry and to `timm.models`; timm's own TResNets are replaced.

    Called after timm.models has been imported (`timm_tresnet.autoload`). Calling it again changes nothing.
    """
    # Not `import timm.models`: while timm is being imported, it does not have that attribute yet.
    timm_models = sys.modules["timm.models"]
    with warnings.catch_warnings():
        for variant, entrypoint in _ENTRYPOINTS.items():
            # The plugin replaces these names on purpose; other warnings are shown.
            warnings.filterwarnings("ignore", message=f"Overwriting {variant} in registry")
            register_model(entrypoint)
    register_model_deprecations(__name__, {**DEPRECATED})
    for name in __all__:
        setattr(timm_models, name, globals()[name])

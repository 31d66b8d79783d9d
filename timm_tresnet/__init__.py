"""TResNet for timm: after importing this package, `timm.create_model('tresnet_m')` builds this package's network."""

import importlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time, names are imported when first used
    from timm_tresnet.conversion import Conversion as Conversion
    from timm_tresnet.conversion import convert_checkpoint as convert_checkpoint
    from timm_tresnet.conversion import write_folder as write_folder
    from timm_tresnet.deployment import ExportedModel as ExportedModel
    from timm_tresnet.deployment import export_model as export_model
    from timm_tresnet.deployment import fold_batch_norms as fold_batch_norms
    from timm_tresnet.deployment import optimize_for_inference as optimize_for_inference
    from timm_tresnet.models.blocks import BasicBlock as BasicBlock
    from timm_tresnet.models.blocks import Bottleneck as Bottleneck
    from timm_tresnet.models.network import TResNet as TResNet

_PUBLIC = {  # name -> module; imported when first used, so that importing this package with torch stays cheap
    "BasicBlock": "models.blocks",
    "Bottleneck": "models.blocks",
    "Conversion": "conversion",
    "ExportedModel": "deployment",
    "TResNet": "models.network",
    "convert_checkpoint": "conversion",
    "export_model": "deployment",
    "fold_batch_norms": "deployment",
    "optimize_for_inference": "deployment",
    "write_folder": "conversion",
}
__all__ = list(_PUBLIC)

_imported_by_torch = "torch" in sys.modules

try:
    from timm_tresnet import autoload

    autoload.arm()
except KeyboardInterrupt:
    raise
except BaseException as error:  # PyTorch imports this package: a broken plugin, or its sys.exit, must not break torch
    logging.getLogger(__name__).warning("timm_tresnet is broken, timm keeps its own TResNet: %r", error)


def _autoload() -> None:
    """Entry point in the group `torch.backends`: PyTorch imports this package, then calls this."""
    if os.environ.get("TIMM_TRESNET_AUTOLOAD") == "0" and _imported_by_torch and "timm_tresnet.autoload" in sys.modules:
        sys.modules["timm_tresnet.autoload"].disarm()
        # Undo the import, so that a later `import timm_tresnet` arms the hook again.
        del sys.modules["timm_tresnet.autoload"], sys.modules["timm_tresnet"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"timm_tresnet.{_PUBLIC[name]}"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("timm-tresnet")
    raise AttributeError(f"module 'timm_tresnet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, "__version__"])

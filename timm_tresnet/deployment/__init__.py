"""Deploy a network: fold it, compile it, or export it as an artifact for another engine."""

from timm_tresnet.deployment.artifact import ExportedModel, export_model
from timm_tresnet.deployment.description import description_path
from timm_tresnet.deployment.engines import ENGINES, FORMATS
from timm_tresnet.deployment.folding import fold_batch_norms, optimize_for_inference

__all__ = ["ENGINES", "FORMATS", "ExportedModel", "description_path", "export_model"]
__all__ += ["fold_batch_norms", "optimize_for_inference"]

"""Convert any TResNet checkpoint to a folder for `timm.create_model('local-dir:FOLDER', pretrained=True)`."""

from timm_tresnet.conversion.description import Conversion, convert_checkpoint
from timm_tresnet.conversion.reading import read_checkpoint
from timm_tresnet.conversion.writing import write_folder

__all__ = ["Conversion", "convert_checkpoint", "read_checkpoint", "write_folder"]

"""What the tests of exporting share."""

import importlib.util

import pytest
import timm
from reference import randomise

from timm_tresnet.deployment import FORMATS

SMALL = {"layers": (1, 1, 1, 1), "num_classes": 10}
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2", "torchscript": ".pt"}
ENGINES = {"onnx": "onnx", "openvino": "openvino", "torch-export": "torch", "torchscript": "torch"}
PACKAGES = {"onnx": ["onnx", "onnxscript", "onnxruntime"], "openvino": ["onnx", "onnxscript", "openvino"]}
# The exporters of PyTorch and ONNX and NNCF warn about themselves and each other; ours are errors all the same.
exporters_warn = [
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
]


def needs(format, int8=False):
    packages = [*PACKAGES.get(format, []), *(["nncf"] if int8 and format == "openvino" else [])]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"exporting to {format} needs {', '.join(missing)}")


each_format = pytest.mark.parametrize("format", [pytest.param(format, marks=needs(format)) for format in FORMATS])
each_int8_format = pytest.mark.parametrize(
    "format", [pytest.param(format, marks=needs(format, int8=True)) for format in ("onnx", "openvino")]
)


def make_small(variant="tresnet_m", **kwargs):
    return randomise(timm.create_model(variant, **SMALL, **kwargs)).eval()

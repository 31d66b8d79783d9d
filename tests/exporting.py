"""Helpers of the tests of exporting."""

import copy
import importlib.util
import warnings

import pytest
import timm
from reference import randomise
from timm.layers import GroupNormAct
from torch import nn
from torch.nn.utils import prune

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


def in_formats(*formats, thorough=()):
    """Parametrize a test with formats, of which some are thorough."""
    return pytest.mark.parametrize(
        "format",
        [
            pytest.param(format, marks=[needs(format), *([pytest.mark.thorough] if format in thorough else [])])
            for format in formats
        ],
    )


each_format = in_formats(*FORMATS)
most_formats = in_formats(*FORMATS, thorough=["torch-export"])  # exporting with torch.export takes long
few_formats = in_formats("torchscript", "openvino", "torch-export", thorough=["torch-export"])  # OpenVINO reads ONNX
each_int8_format = pytest.mark.parametrize(
    "format", [pytest.param(format, marks=needs(format, int8=True)) for format in ("onnx", "openvino")]
)


def make_small(variant="tresnet_m", **kwargs):
    return randomise(timm.create_model(variant, **SMALL, **kwargs)).eval()


class StandardizedConv2d(nn.Conv2d):
    """A convolution that computes something else than its class."""

    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / std, self.bias)


def hook_unit(model):
    model.body.layer1[0].conv1.register_forward_hook(lambda module, args, output: output * 0.5)


def hook_convolution(model):
    model.body.layer3[0].conv3.conv.register_forward_hook(lambda module, args, output: output * 0.5)


def hook_norm_before(model):
    model.body.layer2[0].conv1.bn.register_forward_pre_hook(lambda module, args: (args[0] + 0.3,))


def hook_block(model):
    model.body.layer2[0].register_forward_hook(lambda module, args, output: output * 0.5)


def hook_blur(model):
    model.body.layer2[0].conv1.aa.register_forward_hook(lambda module, args, output: output * 0.5)


def hook_network(model):
    model.register_forward_hook(lambda module, args, output: output * 0.5 + 1)


def patch_convolution(model):
    conv = model.body.layer1[0].conv2.conv
    conv.forward = lambda x: nn.Conv2d.forward(conv, x) * 1.5


def patch_unit(model):
    unit = model.body.layer1[0].conv2
    unit.forward = type(unit).forward.__get__(unit)
    unit.conv.forward = (lambda self, x: nn.Conv2d.forward(self, x) * 1.5).__get__(unit.conv)


def use_subclass(model):
    unit = model.body.layer1[0].conv2
    own = StandardizedConv2d(unit.conv.in_channels, unit.conv.out_channels, 3, padding=1, bias=False)
    own.load_state_dict(unit.conv.state_dict())
    unit.conv = own


def use_group_norm(model):
    unit = model.body.layer3[0].conv1
    unit.bn = GroupNormAct(unit.conv.out_channels, 4)


def use_own_head(model):
    model.head = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(1), nn.Linear(model.num_features, 10))


def drop_gates(model):
    model.body.layer1[0].se = model.body.layer2[0].conv1.aa = None
    model.body.layer2[0].conv1.conv.stride = (2, 2)


def normalize_weights(model):
    nn.utils.parametrizations.weight_norm(model.body.layer1[0].conv1.conv)
    nn.utils.parametrizations.spectral_norm(model.body.layer2[0].conv1.conv)


def normalize_weights_by_hooks(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch announces the end of this kind
        nn.utils.weight_norm(model.body.layer1[0].conv1.conv)
    nn.utils.spectral_norm(model.body.layer2[0].conv1.conv)


def prune_weights(model):
    prune.l1_unstructured(model.body.layer1[0].conv1.conv, "weight", 0.5)
    prune.l1_unstructured(model.body.layer1[0].conv1.conv, "weight", 0.5)
    prune.random_unstructured(model.body.layer2[0].conv1.bn, "weight", 0.3)
    prune.ln_structured(model.head.fc, "weight", 0.2, n=2, dim=1)


def adapt_by_lora(model):
    """LoRA on a convolution, a widening one and the classifier, with weights that are not zero."""
    peft = pytest.importorskip("peft", reason="peft is not installed; the extra `lora` has it")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["conv1.conv", "conv3.conv", "fc"], r=2)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


# What users do to a network, which folding and exporting must not lose, and whether every unit still folds.
ALTERATIONS = [
    *(hook_unit, hook_convolution, hook_norm_before, hook_block, hook_blur, hook_network, patch_convolution),
    *(patch_unit, use_subclass, use_group_norm, use_own_head, drop_gates, normalize_weights),
    *(normalize_weights_by_hooks, prune_weights, adapt_by_lora),
]
WHOLE = [hook_block, hook_blur, hook_network, use_own_head, drop_gates, normalize_weights, normalize_weights_by_hooks]
WHOLE += [prune_weights]
each_alteration = pytest.mark.parametrize("alter", ALTERATIONS)


def make_altered(alter):
    """A network before and after."""
    plain = timm.create_model("test_tresnet", pretrained=True).eval()
    altered = copy.deepcopy(plain)
    return plain, (alter(altered) or altered).eval()

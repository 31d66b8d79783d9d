"""Ways in which a config.json can be wrong, each by itself."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest

MISSING = object()
HUGE = 10**30
DAMAGES = [  # where in config.json, and what is put there
    *((path, value) for path in ["architecture"] for value in [
        MISSING, None, 7, [], ["test_tresnet"], {}, True, "", "resnet50", "tresnet_q", "../test_tresnet", "os.system",
        "test_tresnet.r64_cifar10", "test_tresnet\n", "\ud800",
    ]),
    *(("pretrained_cfg", value) for value in [None, [], "r64", 3, True]),
    *((f"pretrained_cfg.{name}", value) for name, values in {
        "unknown": [1],
        "__class__": ["x"],
        "file": ["/etc/passwd", "model.bin", 3],
        "url": ["http://127.0.0.1:9/x.pth", ["http://127.0.0.1:9/x.pth", "x"]],
        "state_dict": [{"head.fc.weight": [1]}],
        "hf_hub_id": ["other/repository"],
        "hf_hub_filename": ["../../x.bin"],
        "source": ["url", "timm"],
        "custom_load": [True, "hf", 1],
        "architecture": [1],
        "input_size": [[3, 64], "64", [3, 63, 63], [3, 4, 4], [3, -64, 64], [3, 64.5, 64], [3, 10**9, 64], 64],
        "fixed_input_size": [True],
        "interpolation": ["cubist", 3, "random"],
        "mean": [[0, 0], "000", [None] * 3, [math.nan] * 3, 0, [[0], [0], [0]]],
        "std": [[0, 0, 0], [1, 1], [-1, 1, 1], [math.inf] * 3],
        "crop_pct": [0, -1, "all", math.nan, 1e-9, HUGE],
        "crop_mode": ["round", 1],
        "num_classes": [None, "ten", -1, HUGE],
        "label_offset": [-1, "one", 10**6],
        "label_names": [{"0": "cat"}, "cat", [1, 2], ["\x1b[2J"], ["\ud800"]],
        "label_descriptions": [["cat"], {"cat": 3}, {"cat": "\x07"}],
        "pool_size": ["2", [2], [0, 0]],
        "first_conv": ["head.fc", "nowhere", 3],
        "classifier": ["nowhere", ["head.fc"], 3],
        "tag": [3, ["a"]],
        "notes": [3, {"a": 1}, [None]],
        "license": [3],
    }.items() for value in values),
    *(("num_classes", value) for value in [None, "ten", 9.5, -1, HUGE, 10**7, [10], True, 7, math.nan]),
    *(("label_names", value) for value in [3, "cat", {"0": "cat"}, [None], ["a\nb"], ["\ud800"]]),
    *(("label_descriptions", value) for value in [3, ["cat"], {"cat": None}]),
    *(("model_args", value) for value in [None, [], "x", 3, [["layers", [1, 1, 1, 1]]]]),
    *((f"model_args.{name}", value) for name, values in {
        "_target_": ["os.system"],
        "checkpoint_path": ["/etc/passwd"],
        "pretrained": [True],
        "pretrained_cfg": [{"file": "/etc/passwd"}],
        "pretrained_cfg_overlay": [{"file": "/etc/passwd"}],
        "cache_dir": ["/tmp"],
        "features_only": [True],
        "img_size": [64],
        "device": ["meta", "cuda"],
        "dtype": ["float16", "torch.float16", 3],
        "in_chans": [0, -3, "three", 3.0, None, HUGE, True],
        "num_classes": [5, "ten", None, -1],
        "width_factor": [0, -1, "wide", math.inf, math.nan, None, HUGE, 1e-9, 15],
        "layers": ["1111", [1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1.5], [1, 1, 1, "1"], None, [10**9] * 4, 3, [1] * 5],
        "v2": ["yes", 1, None],
        "block": ["transformer", 3, ["basic"], ["basic"] * 3 + [None]],
        "stem": ["conv3x3", None, 3],
        "use_se": ["yes", [True], None, 2],
        "aa_layer": ["sharp", 1, None],
        "act_layer": ["nothing", "", 3, None, "os.system"],
        "negative_slope": ["0.1", math.nan, math.inf, -1, None, 2],
        "stem_negative_slope": ["0.1", math.nan, [0.1]],
        "norm_layer": ["nothing", "", 3, None, "groupnorm"],
        "output_stride": [0, 4, "32", 32.0, None],
        "global_pool": ["nothing", 3, None, ""],
        "head": ["attention", 1, None],
        "head_features": [0, -1, "many", HUGE, 1.5],
        "num_groups": [0, -1, "many", HUGE, 1.5],
        "decoder_embedding": [0, 12, "many", HUGE, 1.5],
        "label_embedding": [0, -1, "many", HUGE, 1.5],
        "drop_rate": [-1, 2, "half", math.nan],
        "drop_path_rate": [-1, 1, None],
        "recompute": ["everything", None, 1],
    }.items() for value in values),
]  # fmt: skip


def first_of_each_path(damages: Sequence[tuple[str, Any]]) -> pytest.MarkDecorator:
    """Parametrize a test with `path` and `value`; the first value at each path is always tried, the others thorough."""
    seen, cases = set(), []
    for path, value in damages:
        word = "" if value is MISSING else repr(value)[:30]
        marks = [pytest.mark.thorough] if path in seen else []
        cases.append(pytest.param(path, value, id=f"{path}-{word}", marks=marks))
        seen.add(path)
    return pytest.mark.parametrize(("path", "value"), cases)


def damage(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a config with a value put at a path of names, or nothing there if it is MISSING."""
    config = copy.deepcopy(config)
    table = config
    *parents, name = path.split(".")
    for parent in parents:
        table = table[parent]
    if value is MISSING:
        del table[name]
    else:
        table[name] = value
    return config

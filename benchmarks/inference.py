"""Inference speed: eager, folded, compiled and exported networks, against timm's built-in and ResNet-50.

    python benchmarks/inference.py --json benchmarks/results/inference.json

- speed: images a second, in rounds over all rows, and the ratio to the built-in in the same round; the built-in runs in
  its best eager layout, channels-last. Median (min-max).
- share: share of the rate of a lone 3x3 convolution in the same precision, in PyTorch or, for int8, in ONNX Runtime.
  The best of a few shapes of the network counts, measured in the same rounds. A network that only convolved at that
  rate would have a share of 1.

With `--profile`, only PyTorch's profile of the rows that run in PyTorch is printed.

Weights are random, since speed does not depend on them. Rows whose packages are not installed are skipped and named. On
CUDA (`--device cuda`), rows run in `--dtype`, each time is the mean of a few runs in a row, and engines other than
PyTorch are skipped.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from command_line import format_command
from PIL import Image
from profiles import profile
from torch import Tensor, nn
from training_memory import BUILTIN, make_builtin

from timm_tresnet import ExportedModel, export_model, fold_batch_norms, optimize_for_inference
from timm_tresnet.bench.comparison import REPEATS
from timm_tresnet.bench.measuring import choose_memory_format, count_flops, read_clock
from timm_tresnet.bench.results import format_spread, start_results, write_results
from timm_tresnet.cli.options import at_least, new_file
from timm_tresnet.utils.tables import format_markdown
from timm_tresnet.variants import ARCHITECTURES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONVOLUTIONS = ((64, 56), (128, 28), (256, 14))  # channels and side of 3x3 convolutions at 224 px, for the peak rate
Run = Callable[[Tensor], Any]


def make_network(name: str, model: str) -> nn.Module:
    """Make a network with random weights, in eval mode.

    Args:
        name: "resnet50", "built-in", or any other name for this package's TResNet.
        model: variant of TResNet.
    """
    if name == "resnet50":
        return timm.create_model("resnet50").eval()
    network = make_builtin(model) if name == BUILTIN else timm.create_model(model, num_classes=1000)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 0.5)  # an engine could skip the zeros of a new network
    return network.eval()


def run_eager(network: nn.Module, settings: argparse.Namespace) -> Run:
    """Return a function that runs the network unchanged, in channels-last layout unless settings.contiguous."""
    layout = choose_memory_format(not settings.contiguous)
    dtype = DTYPES[settings.dtype]
    network = network.to(device=settings.device, dtype=dtype, memory_format=layout)
    return lambda images: network(images.to(dtype=dtype, memory_format=layout))


def run_compiled(network: nn.Module, settings: argparse.Namespace) -> Run:
    """Return a function that runs the network through `optimize_for_inference`."""
    dtype = DTYPES[settings.dtype]
    network = optimize_for_inference(network.to(device=settings.device, dtype=dtype), mode=settings.mode)
    return lambda images: network(images.to(dtype=dtype))


def run_exported(network: nn.Module, settings: argparse.Namespace, format: str) -> Run:
    """Return the network in ONNX Runtime or OpenVINO, exported for the batch size."""
    size = (settings.image_size, settings.image_size)
    with tempfile.TemporaryDirectory() as folder:
        calibration = _write_noise(Path(folder) / "images", size) if settings.dtype == "int8" else None
        path = Path(folder) / ("network.onnx" if format == "onnx" else "network.xml")
        # The classes of random weights on noise are near ties, so int8 may choose others.
        export_model(network, path, format, settings.batch, size, calibration, min_agreement=0.0)
        if settings.dtype == "bfloat16":  # OpenVINO's own choice on CPUs that support it
            return _run_bfloat16(path)
        return ExportedModel(path, format, trust=True)


def _write_noise(folder: Path, size: tuple[int, int]) -> Path:
    folder.mkdir()
    for index in range(16):
        pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return folder


def _run_bfloat16(path: Path) -> Run:
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    return lambda images: compiled(images.numpy())


def _openvino_has_bfloat16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


# row -> network, engine, precision on the CPU, packages
ROWS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "resnet50": ("resnet50", "eager", "float32", ()),
    "resnet50, compiled": ("resnet50", "compiled", "float32", ()),
    BUILTIN: (BUILTIN, "eager", "float32", ()),
    "built-in, NCHW": (BUILTIN, "contiguous", "float32", ()),
    "eager": ("ours", "eager", "float32", ()),
    "folded": ("ours", "folded", "float32", ()),
    "compiled": ("ours", "compiled", "float32", ()),
    "compiled, bfloat16": ("ours", "compiled", "bfloat16", ()),
    "onnx": ("ours", "onnx", "float32", ("onnxscript", "onnxruntime")),
    "onnx, int8": ("ours", "onnx", "int8", ("onnxscript", "onnxruntime")),
    "openvino": ("ours", "openvino", "float32", ("onnxscript", "openvino")),
    "openvino, bfloat16": ("ours", "openvino", "bfloat16", ("onnxscript", "openvino")),
    "openvino, int8": ("ours", "openvino", "int8", ("onnxscript", "openvino", "nncf")),
}
_IN_PYTORCH = ("eager", "contiguous", "folded", "compiled")


def make_row(row: str, settings: argparse.Namespace) -> Run:
    """Make the function of a row: images (N, 3, H, W), float32, to logits."""
    name, engine, dtype, _ = ROWS[row]
    settings = argparse.Namespace(**vars(settings), contiguous=engine == "contiguous")
    settings.dtype = settings.dtype or dtype
    network = make_network(name, settings.model)
    if engine == "folded":
        network = fold_batch_norms(network)
    if engine == "compiled":
        return run_compiled(network, settings)
    return run_eager(network, settings) if engine in _IN_PYTORCH else run_exported(network, settings, engine)


def make_peak(dtype: torch.dtype, channels: int, side: int, batch: int, device: str) -> tuple[Run, float]:
    """Make a lone 3x3 convolution; return it and its number of floating-point operations."""
    factory = {"device": device, "dtype": dtype}
    x = torch.rand(batch, channels, side, side, **factory).contiguous(memory_format=torch.channels_last)
    weight = torch.rand(channels, channels, 3, 3, **factory).contiguous(memory_format=torch.channels_last)
    return lambda images: F.conv2d(x, weight, padding=1), 2.0 * x.numel() * channels * 9


def make_int8_peak(channels: int, side: int, batch: int) -> tuple[Run, float]:
    """Make a lone quantised 3x3 convolution in ONNX Runtime; return it and its number of operations."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    constants = {
        "scale": np.float32(0.02),
        "zero": np.uint8(128),
        "weight": generator.integers(-127, 128, (channels, channels, 3, 3), dtype=np.int8),
        "weight_zero": np.int8(0),
    }
    inputs = ["x", "scale", "zero", "weight", "scale", "weight_zero", "scale", "zero"]
    shape = [batch, channels, side, side]
    graph = helper.make_graph(
        [helper.make_node("QLinearConv", inputs, ["y"], pads=[1, 1, 1, 1])],
        "peak",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = generator.integers(0, 256, shape, dtype=np.uint8)
    return lambda images: session.run(None, {"x": x}), 2.0 * x.size * channels * 9


def measure_seconds(runs: dict[str, Run], images: Tensor, rounds: int) -> dict[str, list[float]]:
    """Measure the seconds of one run for each row and round; the rows take turns."""
    seconds: dict[str, list[float]] = {row: [] for row in runs}
    for turn in range(rounds + 1):
        for row, run in runs.items():
            repeats = REPEATS[images.device.type] if turn else 2  # a CUDA graph is captured in the second
            start = read_clock(images.device.type)
            for _ in range(repeats):
                run(images)
            end = read_clock(images.device.type)
            if turn:  # round 0 warms up and compiles
                seconds[row].append((end - start) / repeats)
        print(f"\rround {turn} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return seconds


def measure(settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the rows of the results for one batch size."""
    runs = {}
    for row in settings.rows:
        print(f"batch {settings.batch}: preparing {row}", file=sys.stderr)
        runs[row] = make_row(row, settings)
    images = torch.rand(settings.batch, 3, settings.image_size, settings.image_size, device=settings.device)
    precisions = [settings.dtype] if settings.dtype else sorted({ROWS[row][2] for row in runs})
    if not all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))):
        precisions = [precision for precision in precisions if precision != "int8"]
    peaks = {
        (precision, shape): make_int8_peak(*shape, settings.batch)
        if precision == "int8"
        else make_peak(DTYPES[precision], *shape, settings.batch, settings.device)
        for precision in precisions
        for shape in CONVOLUTIONS
    }
    everything = {**runs, **{f"peak {key}": run for key, (run, _) in peaks.items()}}
    with torch.inference_mode():
        seconds = measure_seconds(everything, images, settings.rounds)
    peak_flops = {
        precision: max(
            flops / statistics.median(seconds[f"peak {key}"])
            for key, (_, flops) in peaks.items()
            if key[0] == precision
        )
        for precision in precisions
    }
    flops = {
        name: count_flops(make_network(name, settings.model), settings.image_size) for name in ("resnet50", "ours")
    }
    rows = []
    for row in runs:
        network, _, precision, _ = ROWS[row]
        precision = settings.dtype or precision
        images_per_s = [settings.batch / value for value in seconds[row]]
        per_image = flops["resnet50" if network == "resnet50" else "ours"]
        entry: dict[str, Any] = {"row": row, "batch_size": settings.batch, "precision": precision}
        entry["images_per_s"] = images_per_s
        if BUILTIN in runs:
            entry["ratios"] = [other / own for own, other in zip(seconds[row], seconds[BUILTIN], strict=True)]
        if precision in peak_flops:
            entry["peak_gflop_per_s"] = peak_flops[precision] / 1e9
            entry["share_of_peak"] = statistics.median(images_per_s) * per_image / peak_flops[precision]
        rows.append(entry)
    return rows


def profile_row(row: str, settings: argparse.Namespace) -> str:
    """Return the profile of a row as a Markdown table."""
    run = make_row(row, settings)
    images = torch.rand(settings.batch, 3, settings.image_size, settings.image_size, device=settings.device)
    with torch.inference_mode():
        return profile(lambda: run(images), f"{row}, batch {settings.batch}", settings.device)


def _can_profile(row: str, settings: argparse.Namespace) -> bool:
    engine = ROWS[row][1]  # on a GPU, compiled code runs kernels outside PyTorch's operations
    return engine in _IN_PYTORCH and (engine != "compiled" or settings.device == "cpu")


def find_largest_batch(settings: argparse.Namespace) -> int:
    """Find the largest batch size for all rows on a GPU, a power of two up to 4096."""
    batch = 1
    while batch < 4096:  # PyTorch counts a tensor's elements in 32 bits in places
        try:
            for row in settings.rows:
                if ROWS[row][1] != "compiled":  # compiling for each size would take hours
                    images = torch.rand(2 * batch, 3, settings.image_size, settings.image_size, device=settings.device)
                    with torch.inference_mode():
                        make_row(row, settings)(images)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return batch
        batch *= 2
    return batch


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of the results as a Markdown table."""
    table = []
    for row in rows:
        ratios = row.get("ratios")
        spread = format_spread(ratios or [])
        share = ""
        if "share_of_peak" in row:
            share = f"{row['share_of_peak']:.0%} of {row['peak_gflop_per_s']:.0f} GFLOP/s, {row['precision']}"
        speed = statistics.median(row["images_per_s"])
        table.append([row["row"], row["batch_size"], f"{speed:.2f}", spread, share])
    return format_markdown(["", "batch", "images/s", "to the built-in", "share of the convolution peak"], table)


def _batch(text: str) -> int | str:
    return text if text == "largest" else at_least(1)(text)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse and check the options; a mistake ends the process."""
    parser = argparse.ArgumentParser(description="Inference speed of eager, folded, compiled and exported networks.")
    parser.add_argument("--model", choices=list(ARCHITECTURES), default="tresnet_m")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--image-size", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument(
        "--batch-sizes", nargs="+", type=_batch, default=[8, 1], metavar="N", help='"largest" for a GPU (default: 8 1)'
    )
    parser.add_argument("--rounds", type=at_least(1), default=15)
    parser.add_argument("--profile", action="store_true", help="print profiles only")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="for CUDA (default: float16)")
    parser.add_argument("--mode", help="mode of torch.compile (default: that of optimize_for_inference)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="file for the results, must not exist yet")
    settings = parser.parse_args(words)
    if settings.profile and settings.json:
        parser.error("--profile only prints tables; leave out --json")
    if settings.device == "cpu" and (settings.dtype or "largest" in settings.batch_sizes):
        parser.error("--dtype and the largest batch need --device cuda; on the CPU, each row has its own precision")
    if settings.device == "cuda":
        settings.dtype = settings.dtype or "float16"
        settings.rows = [row for row in settings.rows if ROWS[row][1] in _IN_PYTORCH and ROWS[row][2] == "float32"]
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the results."""
    words = list(sys.argv[1:] if argv is None else argv)
    settings = parse(words)
    torch.manual_seed(0)
    for row in list(settings.rows):
        missing = [package for package in ROWS[row][3] if importlib.util.find_spec(package) is None]
        if missing:
            print(f"left out {row}: {', '.join(missing)} not installed", file=sys.stderr)
            settings.rows.remove(row)
    if "openvino, bfloat16" in settings.rows and not _openvino_has_bfloat16():
        print("left out openvino, bfloat16: OpenVINO computes in float32 on this CPU", file=sys.stderr)
        settings.rows.remove("openvino, bfloat16")
    command = format_command(__file__, words)
    engines = ("onnxruntime", "openvino", "nncf")
    results = start_results(command, settings.device, settings, unrecorded=["rows"], packages=engines)
    for batch in settings.batch_sizes:
        settings.batch = find_largest_batch(settings) if batch == "largest" else batch
        if settings.profile:
            print(*(profile_row(row, settings) for row in settings.rows if _can_profile(row, settings)), sep="\n\n")
            continue
        results["rows"] += measure(settings)
        torch.compiler.reset()
    if settings.profile:
        return
    print(format_table(results["rows"]))
    if settings.json:
        write_results(results, settings.json)


if __name__ == "__main__":
    main()

"""timm's unchanged scripts with our TResNet, flag by flag, compared with timm's own TResNet.

    TIMM_SCRIPTS=pytorch-image-models python tests/acceptance.py

writes tests/ACCEPTANCE.md. Every row of ROWS runs twice, with the plugin and with timm's built-in network of the same
layers and widths, on the same tiny images. One process for each of the two imports torch and timm once, then forks for
every row and runs the script in the child as `__main__`: a row costs a second or two, and cannot disturb the next.
"""

import argparse
import csv
import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIDES = ("ours", "builtin")
PLUGIN_LINE = "TResNet comes from the timm_tresnet plugin"
PAGE = Path(__file__).parent / "ACCEPTANCE.md"
TIME_LIMIT = 600  # seconds a row
CLOSE = 1e-3  # relative L2 norm of what rounding may add up to in a few steps


@dataclass(frozen=True)
class Row:
    """One command, and what is expected of it.

    Args:
        name: unique; the folder a row's files go to.
        flags: what is added to the script's usual arguments (`_COMMON`). {images} is the folder of images, {in:NAME}
            the folder of another row, {out} the row's own.
        script: file in TIMM_SCRIPTS.
        expected: how our result compares with the built-in's: "same", to the last bit; "close", to rounding;
            "parameters", the same but for running statistics; "folded", the same with fewer parameters; "ours", the
            built-in fails; "fails", both fail with the same message; "either", both fail with the same message or do
            the same, which depends on timm's version.
        note: why it is not "same", or what the row is for; goes into the page.
        processes: how many processes are started, with the environment that torchrun gives them.
        drop_device_ids: whether PyTorch's DDP is not told of `device_ids`, which it refuses for a CPU. Nothing else is
            ever changed.
    """

    name: str
    flags: str
    script: str = "train.py"
    expected: str = "same"
    note: str = ""
    processes: int = 1
    drop_device_ids: bool = False

    @property
    def needs(self) -> list[str]:
        return re.findall(r"\{in:(\w+)\}", self.flags)


_MODEL = "--model tresnet_m --model-kwargs layers=(1,1,1,1) width_factor=0.25"
_COMMON = {
    "train.py": f"--data-dir {{images}} {_MODEL} --num-classes 2 --img-size 64 --device cpu --workers 1 --batch-size 4 "
    "--epochs 1 --warmup-epochs 0 --lr 0.05 --output {out} --experiment run --log-interval 1",
    "validate.py": f"--data-dir {{images}} {_MODEL} --num-classes 2 --img-size 64 --device cpu --workers 1 "
    "--batch-size 4 --log-freq 1",
    "inference.py": f"--data-dir {{images}} --split validation {_MODEL} --num-classes 2 --img-size 64 --device cpu "
    "--workers 1 --batch-size 4 --results-dir {out} --results-file labels --topk 2 --include-index",
    "benchmark.py": f"{_MODEL} --img-size 64 --device cpu --batch-size 2 --num-warm-iter 1 --num-bench-iter 10 "
    "--results-file {out}/results.json --results-format json",
    "bulk_runner.py": "",
    "avg_checkpoints.py": "",
    "clean_checkpoint.py": "",
    # This script has no --model-kwargs: the folder says which layers and widths.
    "onnx_export.py": "{out}/model.onnx --model local-dir:{folder} --batch-size 2 --img-size 64",
    "onnx_validate.py": "{images}/validation --batch-size 2 --workers 1 --img-size 64",
}
_ROUNDING = "another order of operations, hence of rounding"

ROWS = [
    Row("base", ""),
    Row("amp", "--amp --amp-dtype bfloat16"),
    Row("amp_float16", "--amp"),
    Row("channels_last", "--channels-last"),
    Row("model_ema", "--model-ema --model-ema-decay 0.5"),
    Row("model_ema_warmup", "--model-ema --model-ema-warmup --model-ema-force-cpu"),
    Row(
        "grad_checkpointing",
        "--grad-checkpointing",
        expected="parameters",
        note="the built-in's updates running statistics twice",
    ),
    Row("grad_accum_steps", "--grad-accum-steps 2"),
    Row("torchcompile", "--torchcompile", expected="close", note=_ROUNDING),
    Row("torchcompile_eager", "--torchcompile eager", expected="close", note=_ROUNDING),
    Row(
        "torchcompile_grad_checkpointing",
        "--torchcompile aot_eager --grad-checkpointing",
        expected="close",
        note=f"{_ROUNDING}; compiled, the built-in's updates running statistics once too",
    ),
    Row("torchscript", "--torchscript", expected="close", note=_ROUNDING),
    Row("sync_bn_one_process", "--sync-bn", note="one process: timm converts nothing"),
    Row("split_bn", "--aug-splits 2 --split-bn --aa rand-m9-mstd0.5-inc1-mmax9"),
    Row("resplit", "--aug-splits 2 --resplit --reprob 0.3 --aa original"),
    Row("jsd_loss", "--aug-splits 3 --jsd-loss"),
    Row("jsd_loss_split_bn", "--aug-splits 3 --jsd-loss --split-bn --channels-last"),
    Row("dist_bn", "--dist-bn reduce", note="one process: nothing to reduce"),
    Row("fast_norm", "--fast-norm"),
    Row("bn_momentum_eps", "--bn-momentum 0.3 --bn-eps 1e-3", expected="fails", note="no such arguments"),
    Row("drop", "--drop 0.2"),
    Row("drop_path", "--drop-path 0.2"),
    Row("drop_block", "--drop-block 0.1", expected="fails", note="no such argument"),
    Row("gp", "--gp max"),
    Row("gp_catavgmax", "--gp catavgmax"),
    Row("in_chans", "--in-chans 1"),
    Row("img_size", "--img-size 96"),
    Row("input_size", "--input-size 3 64 96"),
    Row("head_init_scale", "--head-init-scale 0.1 --head-init-bias -2"),
    Row("layer_decay", "--layer-decay 0.7"),
    Row("opt_adamw", "--opt adamw --lr 1e-3"),
    Row("opt_lamb", "--opt lamb --lr 1e-3"),
    Row("opt_muon", "--opt muon --lr 1e-3"),
    Row("clip_grad", "--clip-grad 0.1"),
    Row("clip_grad_agc", "--clip-grad 0.01 --clip-mode agc"),
    Row("mixup_cutmix", "--mixup 0.2 --cutmix 1.0"),
    Row("mixup_bce", "--mixup 0.2 --smoothing 0.1 --bce-loss --bce-target-thresh 0.2"),
    Row("smoothing", "--smoothing 0.3"),
    Row("bce_loss", "--bce-loss"),
    Row("train_img_sizes", "--train-img-sizes 64 96 --train-batch-sizes 4 2"),
    Row(
        "train_size_schedule",
        "--epochs 2 --train-img-sizes 64 96 --train-batch-sizes 4 2 --train-size-schedule progressive",
    ),
    Row("model_dtype", "--model-dtype bfloat16"),
    Row("initial_checkpoint", "--initial-checkpoint {in:base}/run/last.pth.tar"),
    Row("pretrained", "--pretrained", note="from a cache of the Hub"),
    Row("pretrained_in_chans", "--pretrained --in-chans 1"),
    Row("pretrained_path", "--pretrained --pretrained-path {folder}/model.safetensors"),
    Row("kd_logit", "--kd-model-name local-dir:{folder}"),
    Row("kd_feature", "--kd-model-name local-dir:{folder} --kd-distill-type feature"),
    Row(
        "kd_token",
        "--kd-model-name local-dir:{folder} --kd-distill-type token",
        expected="fails",
        note="for vision transformers with a distillation token",
    ),
    Row("model_kwargs", "--model-kwargs layers=(1,1,2,1) width_factor=0.25 v2=True"),
    Row(
        "model_kwargs_ingredients",
        "--model-kwargs layers=(1,1,1,1) width_factor=0.25 stem=conv7x7 aa_layer=False act_layer=silu block=bottleneck",
        expected="ours",
        note="the built-in has no such arguments",
    ),
    Row(
        "model_kwargs_recompute",
        "--model-kwargs layers=(1,1,1,1) width_factor=0.25 recompute=expansions",
        expected="ours",
        note="the built-in has no such argument",
    ),
    Row("no_prefetcher", "--no-prefetcher --tta 0 --save-images"),
    Row("epochs", "--epochs 3 --model-ema --model-ema-decay 0.5", note="uninterrupted"),
    Row(
        "resume",
        "--epochs 3 --model-ema --model-ema-decay 0.5 --resume {in:epochs}/run/checkpoint-0.pth.tar",
        note="timm does not restore random numbers, so that images come in another order than in the row above",
    ),
    Row(
        "epochs_in_order",
        "--epochs 3 --model-ema --model-ema-decay 0.5 --no-aug",
        processes=2,
        drop_device_ids=True,
        note="uninterrupted; with several processes, the epoch decides the order of images",
    ),
    Row(
        "resume_in_order",
        "--epochs 3 --model-ema --model-ema-decay 0.5 --no-aug --resume {in:epochs_in_order}/run/checkpoint-0.pth.tar",
        processes=2,
        drop_device_ids=True,
        note="the same weights as in the row above, to the last bit",
    ),
    Row("resume_without_optimizer", "--epochs 2 --resume {in:base}/run/last.pth.tar --no-resume-opt"),
    Row(
        "two_processes",
        "",
        processes=2,
        expected="fails",
        note="train.py names a CPU as DDP's device, as with `torchrun --nproc-per-node 2 train.py --data-dir {images} "
        "--model resnet18 --num-classes 2 --device cpu`",
    ),
    Row("two_processes_dist_bn", "--dist-bn reduce --model-ema", processes=2, drop_device_ids=True),
    Row(
        "two_processes_broadcast",
        "--dist-bn broadcast --no-ddp-bb --grad-accum-steps 2",
        processes=2,
        drop_device_ids=True,
    ),
    Row(
        "two_processes_grad_checkpointing",
        "--grad-checkpointing --amp --amp-dtype bfloat16",
        processes=2,
        drop_device_ids=True,
        expected="parameters",
        note="the built-in's updates running statistics twice",
    ),
    Row(
        "two_processes_torchcompile",
        "--torchcompile aot_eager",
        expected="close",
        note=_ROUNDING,
        processes=2,
        drop_device_ids=True,
    ),
    Row("two_processes_split_bn", "--aug-splits 2 --split-bn --dist-bn reduce", processes=2, drop_device_ids=True),
    Row("two_processes_kd", "--kd-model-name local-dir:{folder}", processes=2, drop_device_ids=True),
    Row(
        "two_processes_sync_bn",
        "--sync-bn",
        processes=2,
        drop_device_ids=True,
        expected="ours",
        note="PyTorch's synchronised batch norm, which the built-in gets, refuses a CPU",
    ),
    Row(
        "two_processes_sync_bn_grad_checkpointing",
        "--sync-bn --grad-checkpointing --model-ema --channels-last",
        processes=2,
        drop_device_ids=True,
        expected="ours",
        note="as in the row above",
    ),
    Row("validate", "--checkpoint {in:base}/run/last.pth.tar", "validate.py"),
    Row(
        "validate_reparam",
        "--checkpoint {in:base}/run/last.pth.tar --reparam",
        "validate.py",
        expected="folded",
        note="ours folds its batch norms, of the built-in nothing is folded",
    ),
    Row("validate_torchcompile", "--checkpoint {in:base}/run/last.pth.tar --torchcompile", "validate.py"),
    Row("validate_torchscript", "--checkpoint {in:base}/run/last.pth.tar --torchscript", "validate.py"),
    Row("validate_aot_autograd", "--checkpoint {in:base}/run/last.pth.tar --aot-autograd", "validate.py"),
    Row("validate_amp", "--checkpoint {in:base}/run/last.pth.tar --amp --amp-dtype bfloat16", "validate.py"),
    Row("validate_model_dtype", "--checkpoint {in:base}/run/last.pth.tar --model-dtype bfloat16", "validate.py"),
    Row("validate_channels_last", "--checkpoint {in:base}/run/last.pth.tar --channels-last", "validate.py"),
    Row("validate_fast_norm", "--checkpoint {in:base}/run/last.pth.tar --fast-norm", "validate.py"),
    Row("validate_test_pool", "--checkpoint {in:base}/run/last.pth.tar --img-size 256 --test-pool", "validate.py"),
    Row("validate_use_ema", "--checkpoint {in:model_ema}/run/last.pth.tar --use-ema", "validate.py"),
    Row("validate_pretrained", "--pretrained", "validate.py", note="from a cache of the Hub"),
    Row("validate_gp", "--checkpoint {in:base}/run/last.pth.tar --gp avg --crop-pct 1.0", "validate.py"),
    Row(
        "validate_results_file",
        "--checkpoint {in:base}/run/last.pth.tar --results-file {out}/results.csv",
        "validate.py",
    ),
    Row("benchmark_both", "--bench both", "benchmark.py"),
    Row("benchmark_infer", "--bench infer --channels-last --precision bfloat16 --fast-norm", "benchmark.py"),
    Row("benchmark_train", "--bench train --grad-checkpointing --opt adamw --clip-grad 1 --detail", "benchmark.py"),
    Row("benchmark_amp", "--bench both --amp --amp-dtype bfloat16 --drop-path 0.1", "benchmark.py"),
    Row("benchmark_reparam", "--bench infer --reparam", "benchmark.py"),
    Row("benchmark_torchscript", "--bench infer --torchscript", "benchmark.py"),
    Row("benchmark_torchcompile", "--bench infer --torchcompile", "benchmark.py"),
    Row("benchmark_aot_autograd", "--bench infer --aot-autograd", "benchmark.py"),
    Row("benchmark_profile", "--bench profile-fvcore", "benchmark.py"),
    Row("inference", "--checkpoint {in:base}/run/last.pth.tar", "inference.py"),
    Row("inference_pretrained", "--pretrained --amp --amp-dtype bfloat16 --channels-last", "inference.py"),
    Row("inference_test_pool", "--checkpoint {in:base}/run/last.pth.tar --img-size 256 --test-pool", "inference.py"),
    Row("inference_torchscript", "--checkpoint {in:base}/run/last.pth.tar --torchscript", "inference.py"),
    Row("avg_checkpoints", "--input {in:epochs}/run --output {out}/averaged.pth -n 2", "avg_checkpoints.py"),
    Row(
        "avg_checkpoints_safetensors",
        "--input {in:epochs}/run --output {out}/averaged.safetensors --safetensors --no-use-ema",
        "avg_checkpoints.py",
    ),
    Row(
        "clean_checkpoint",
        "--checkpoint {in:model_ema}/run/last.pth.tar --output {out}/clean.pth",
        "clean_checkpoint.py",
    ),
    Row(
        "clean_checkpoint_safetensors",
        "--checkpoint {in:model_ema}/run/last.pth.tar --output {out}/clean.safetensors --safetensors --no-use-ema",
        "clean_checkpoint.py",
    ),
    Row("onnx_export", "", "onnx_export.py"),
    Row("onnx_export_checkpoint", "--checkpoint {in:base}/run/last.pth.tar --opset 18", "onnx_export.py"),
    Row("onnx_export_dynamic", "--dynamic-size --check-forward", "onnx_export.py"),
    Row("onnx_export_reparam", "--reparam --keep-init", "onnx_export.py", expected="close", note=_ROUNDING),
    Row(
        "onnx_export_dynamo",
        "--dynamo",
        "onnx_export.py",
        expected="either",
        note="timm 1.0.29.dev0 asks for what newer PyTorch has removed, timm 1.0.31 does not",
    ),
    Row("onnx_export_training", "--training", "onnx_export.py"),
    Row(
        "onnx_export_input_size",
        "--input-size 3 64 64",
        "onnx_export.py",
        expected="either",
        note="timm adds the list of sides to a tuple, as with `onnx_export.py {out}/model.onnx --model resnet18 "
        "--input-size 3 64 64`",
    ),
    Row("onnx_validate", "--onnx-input {in:onnx_export}/model.onnx", "onnx_validate.py"),
    Row(
        "bulk_runner",
        f"--model-list tresnet_m* --results-file {{out}}/results.csv {{scripts}}/validate.py --data-dir {{images}} "
        f"{_MODEL.removeprefix('--model tresnet_m ')} --num-classes 2 --img-size 64 --device cpu --workers 1 "
        "--checkpoint {in:base}/run/last.pth.tar",
        "bulk_runner.py",
    ),
]


# ---- running


@dataclass(frozen=True)
class Result:
    """The result of one side of a row: an error, or values to compare."""

    error: str
    values: dict[str, Any]
    log: str


class Sides:
    """Runs rows in a new folder, on both sides at once; a context manager.

    Args:
        folder: where everything goes; must exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: list[subprocess.Popen] = []
        self._results: dict[str, dict[str, Result]] = {}

    def __enter__(self) -> "Sides":
        make_images(self.folder / "images")
        for side in SIDES:
            (self.folder / side).mkdir()
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "HF_HUB_CACHE": str(self.folder / side / "cache"),
                "TORCHINDUCTOR_CACHE_DIR": str(self.folder / side / "inductor"),
                "TIMM_TRESNET_AUTOLOAD": "1" if side == "ours" else "0",
            }
            command = [sys.executable, __file__, "--serve", side, str(self.folder)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
            self._processes.append(subprocess.Popen(command, env=environment, **pipes))
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.stdin.close()
            process.stdout.close()
            process.wait()

    def run(self, row: Row) -> dict[str, Result]:
        """Results of a row by side; what the row needs runs before it."""
        if row.name not in self._results:
            for needed in ROWS:
                if needed.name in row.needs:
                    self.run(needed)
            for process in self._processes:
                process.stdin.write(f"{row.name}\n")
            for process in self._processes:
                if process.stdout.readline() != f"{row.name}\n":
                    raise RuntimeError(f"{shlex.join(process.args)} ended with status {process.wait()}")
            self._results[row.name] = {side: read_result(self.folder / side / row.name, row) for side in SIDES}
        return self._results[row.name]


def make_images(folder: Path) -> None:
    """Write noise images of two brightnesses, sixteen for training and eight for validation."""
    import torch
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("validation", 4)):
        for name, brightness in (("dark", 40), ("light", 200)):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 50, (64, 64, 3), generator=generator, dtype=torch.uint8) + brightness
                Image.fromarray(pixels.numpy()).save(folder / split / name / f"{name}{index}.png")


def serve(side: str, folder: Path) -> None:
    """Run the rows named on stdin on one side, each in forks of this process, and name them on stdout when done."""
    scripts = Path(os.environ["TIMM_SCRIPTS"]).resolve()
    sys.path[0] = str(scripts)  # as for `python train.py`: a clone's scripts import the clone's timm
    import timm.data
    import timm.optim
    import timm.task
    import timm.utils  # noqa: F401

    where = "TIMM_SCRIPTS" if Path(timm.__file__).is_relative_to(scripts) else "installed"
    (folder / side / "timm.txt").write_text(f"timm {timm.__version__} ({where})")
    places = {"images": folder / "images", "folder": folder / side / "model", "scripts": scripts}
    (folder / side / "prepare").mkdir()
    wait(fork(lambda: prepare(folder / side), folder / side / "prepare", {}))
    rows = {row.name: row for row in ROWS}
    for line in sys.stdin:
        row = rows[line.strip()]
        out = folder / side / row.name
        out.mkdir()
        flags = f"{_COMMON[row.script]} {row.flags}".replace("{in:", "{folder}/../{in:")
        flags = re.sub(r"\{in:(\w+)\}", r"\1", flags).format(out=out, **places)
        port = free_port()
        children = []
        for rank in range(row.processes):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": row.processes}
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            work = functools.partial(run_script, scripts / row.script, shlex.split(flags), row.drop_device_ids)
            children.append(fork(work, out, environment if row.processes > 1 else {}))
        wait(*children)
        print(row.name, flush=True)


def prepare(folder: Path) -> None:
    """A trained model's stand-in, as a folder and as a cache of the Hub."""
    import timm
    import torch

    torch.manual_seed(0)
    arguments = {"layers": (1, 1, 1, 1), "width_factor": 0.25}
    for name, num_classes in (("model", 2), ("cache", 1000)):
        model = timm.create_model("tresnet_m", num_classes=num_classes, **arguments)
        model.pretrained_cfg.update(input_size=(3, 64, 64), pool_size=(2, 2))
        if name == "cache":
            repository = folder / "cache" / "models--timm--tresnet_m.miil_in21k_ft_in1k"
            (repository / "refs").mkdir(parents=True)
            (repository / "refs" / "main").write_text("0" * 40)
            saved = repository / "snapshots" / ("0" * 40)
        else:
            saved = folder / "model"
        timm.models.save_for_hf(model, str(saved), model_args=arguments, safe_serialization=True)


def run_script(script: Path, arguments: list[str], drop_device_ids: bool) -> None:
    """Run a script in this process as `python SCRIPT …` does."""
    import torch

    if drop_device_ids:
        parallel = torch.nn.parallel.DistributedDataParallel
        original = parallel.__init__
        parallel.__init__ = lambda self, module, device_ids=None, **kwargs: original(self, module, **kwargs)
    torch.manual_seed(0)  # inference.py and onnx_export.py draw weights and images without a seed
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def fork(work: Callable[[], None], out: Path, environment: dict[str, Any]) -> int:
    """Do work in a fork of this process, its output in out/log.txt and its error in out/error.txt; return its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()  # a group of its own, with the workers that load images
        os.chdir(out)
        log = os.open(out / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update({name: str(value) for name, value in environment.items()})
        try:
            work()
            status = 0
        except SystemExit as exit:
            status = 0 if exit.code is None else exit.code if isinstance(exit.code, int) else 1
            error = f"exit status {exit.code}"
        except BaseException as exception:
            traceback.print_exc()
            error = f"{type(exception).__name__}: {exception}"
        if status:
            (out / "error.txt").write_text(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # without the parent's clean-up


def wait(*children: int) -> None:
    """Wait for forks; kill those that exceed TIME_LIMIT or wait for a failed one."""
    left, deadline = set(children), time.monotonic() + TIME_LIMIT
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.discard(child)
                if status:
                    deadline = min(deadline, time.monotonic() + 5)
        if time.monotonic() > deadline:
            for child in left:
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


# ---- comparing


def read_result(out: Path, row: Row) -> Result:
    """Files that a row left behind."""
    log = (out / "log.txt").read_text(errors="replace")
    error = out / "error.txt"
    if error.exists():
        return Result(error.read_text(), {}, log)
    try:
        values = _READERS[row.script](out, log)
    except (OSError, IndexError, KeyError, StopIteration) as missing:  # killed, or a script that hides its failure
        return Result(f"no result ({missing!r})", {}, log)
    return Result("", values, log)


def _read_training(out: Path, log: str) -> dict[str, Any]:
    import torch

    checkpoint = torch.load(out / "run" / "last.pth.tar", map_location="cpu", weights_only=False)
    # TorchScript makes every buffer persistent; the blur's constant has another name in the built-in.
    values = {name: value for name, value in checkpoint["state_dict"].items() if ".aa." not in name}
    values |= {f"ema.{name}": tensor for name, tensor in checkpoint.get("state_dict_ema", {}).items()}
    with open(out / "run" / "summary.csv") as summary:
        last = list(csv.DictReader(summary))[-1]
    return values | {name: float(value) for name, value in last.items() if "loss" in name or "top1" in name}


def _read_json(text: str) -> dict[str, Any]:
    result = json.loads(text)
    return result[0] if isinstance(result, list) else result


def _read_validation(out: Path, log: str) -> dict[str, Any]:
    values = {"loss": re.findall(r"Loss: +\S+ +\( *([\d.naif]+)\)", log)[-1]}
    if (out / "results.csv").exists():
        values["file"] = (out / "results.csv").read_text()
    return values | _read_json(log.split("--result\n")[1])


def _read_benchmark(out: Path, log: str) -> dict[str, Any]:
    result = _read_json((out / "results.json").read_text())
    if "error" in result:
        raise KeyError(result["error"])
    rates = [value for name, value in result.items() if name.endswith("samples_per_sec")]
    return {"rates": all(rate > 0 for rate in rates) and len(rates)} | {
        name: value for name, value in result.items() if not re.search("samples_per_sec|_time$", name)
    }


def _read_weights(out: Path, log: str) -> dict[str, Any]:
    import safetensors.torch
    import torch

    (file,) = (path for path in out.iterdir() if path.suffix in (".pth", ".safetensors"))
    return safetensors.torch.load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def _read_onnx(out: Path, log: str) -> dict[str, Any]:
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # not that --keep-init makes weights inputs
    session = onnxruntime.InferenceSession(out / "model.onnx", options, providers=["CPUExecutionProvider"])
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return {"logits": torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])}


_READERS = {
    "train.py": _read_training,
    "validate.py": _read_validation,
    "benchmark.py": _read_benchmark,
    "avg_checkpoints.py": _read_weights,
    "clean_checkpoint.py": _read_weights,
    "onnx_export.py": _read_onnx,
    "inference.py": lambda out, log: {"labels": (out / "labels.csv").read_text()},
    "onnx_validate.py": lambda out, log: {"precision": re.search(r"\* Prec@1 .*", log)[0]},
    "bulk_runner.py": lambda out, log: {"file": (out / "results.csv").read_text()},
}


_ALSO = {"close": ["same"], "either": ["fails", "same"]}  # what else meets an expectation


def compare(results: dict[str, Result]) -> tuple[str, float]:
    """How ours compares with the built-in's: a word as in Row.expected, and the largest relative difference."""
    ours, builtin = (results[side] for side in SIDES)
    if ours.error or builtin.error:
        if ours.error and builtin.error:
            return ("fails" if ours.error == builtin.error else "fails differently"), math.nan
        return ("broken" if ours.error else "ours"), math.nan
    if ours.values.keys() != builtin.values.keys():
        return "different", math.inf
    differences = {name: _difference(value, builtin.values[name]) for name, value in ours.values.items()}
    largest = max(differences.values())
    if largest == 0:
        return "same", largest
    statistics = re.compile(r"running_(mean|var)$|num_batches_tracked$|^eval_|^ema\.")
    if not any(difference for name, difference in differences.items() if not statistics.search(name)):
        return "parameters", largest
    changed = {name for name, difference in differences.items() if difference}
    if changed == {"param_count"} and ours.values["param_count"] < builtin.values["param_count"]:
        return "folded", 0.0
    return ("close" if largest < CLOSE else "different"), largest


def meets(row: Row, relation: str) -> bool:
    """Whether a row has the expected result."""
    return relation in {row.expected, *_ALSO.get(row.expected, ())}


def _difference(actual: Any, expected: Any) -> float:
    import torch

    if isinstance(actual, float):
        actual, expected = torch.tensor(actual), torch.tensor(expected)
    if not isinstance(actual, torch.Tensor):
        return 0.0 if actual == expected else math.inf
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return math.inf
    if torch.equal(actual, expected):
        return 0.0
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


# ---- the page


_WORDS = {
    "same": "equal to the last bit",
    "parameters": "parameters equal, running statistics not",
    "close": "equal but for rounding",
    "folded": "equal with fewer parameters",
    "ours": "only ours works",
    "fails": "same error",
}
_SUMMARY = {
    **_WORDS,
    "parameters": "with equal parameters and other running statistics",
    "ours": "where only ours works",
    "fails": "where both fail with the same error",
}
_COMPARED = {
    "train.py": "the last checkpoint's weights, their running averages (`--model-ema`) and the losses",
    "validate.py": "the loss in four digits and everything in the result",
    "inference.py": "the table of labels and probabilities",
    "benchmark.py": "the result but for times and rates, which have to be there",
    "avg_checkpoints.py": "the weights written",
    "clean_checkpoint.py": "the weights written",
    "onnx_export.py": "the logits that ONNX Runtime computes with the file",
    "onnx_validate.py": "the line with the precision",
    "bulk_runner.py": "the table of results",
}


def format_page(folder: Path, rows: Sequence[Row], results: dict[str, dict[str, Result]]) -> str:
    """The results as Markdown, a table for each script.

    Args:
        folder: where the rows ran.
        rows: which rows to show.
        results: what `Sides.run` returned, by name of row.
    """
    from timm_tresnet.utils.tables import format_markdown  # not above: timm's own side runs without this package

    packages = ["timm-tresnet", "torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "pandas", "fvcore"]
    versions = [f"{name} {version}" for name in packages if (version := _find_version(name))]
    relations = [compare(results[row.name])[0] for row in rows]
    counts = {word: relations.count(word) for word in _SUMMARY}
    unexpected = [row.name for row in rows if not meets(row, compare(results[row.name])[0])]
    lines = [
        "# timm's scripts, flag by flag",
        "",
        "Written by `TIMM_SCRIPTS=FOLDER python tests/acceptance.py`, not by hand; `tests/test_acceptance.py` runs the",
        "same rows. Every row ran twice on the same noise, with this package and with timm's built-in TResNet of the",
        "same blocks and widths. What was compared is said above each table. `{images}` is the folder of images,",
        "`{folder}` one that `timm.models.save_for_hf` wrote, `{out}` the row's own, `{in:ROW}` that of another row,",
        "`{scripts}` that of timm's scripts.",
        "",
        f"{datetime.date.today()}; {(folder / 'ours' / 'timm.txt').read_text()}; {', '.join(versions)}; "
        f"Python {platform.python_version()}; {platform.system()}, CPU only. train.py is git's blob "
        f"{_hash_blob(Path(os.environ['TIMM_SCRIPTS']) / 'train.py')[:12]}.",
        "",
        f"{len(rows)} rows: {', '.join(f'{count} {_SUMMARY[word]}' for word, count in counts.items() if count)}. "
        f"Not as expected: {', '.join(unexpected) or 'none'}.",
    ]
    for script in _COMMON:
        shown = [row for row in rows if row.script == script]
        if not shown:
            continue
        lines += ["", f"## {script}", ""]
        if _COMMON[script]:
            lines += [f"With `{_COMMON[script]}`.", ""]
        lines += [f"Compared: {_COMPARED[script]}.", ""]
        titles = ["row", "flags", "ours", "built-in", "compared", ""]
        lines.append(format_markdown(titles, [_format_row(row, results[row.name]) for row in shown]))
    return "\n".join(lines) + "\n"


def _find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hash_blob(path: Path) -> str:
    """Return the hash that `git hash-object` prints, to find the file in timm's history."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _format_row(row: Row, results: dict[str, Result]) -> list[str]:
    relation, largest = compare(results)
    cells = [_describe(results[side]) for side in SIDES]
    word = _WORDS.get(relation, relation)
    if 0 < largest < math.inf and relation != "parameters":
        word += f", {largest:.0e}"
    if not meets(row, relation):
        word = f"**not as expected: {word}**"
    notes = [row.note] if row.note else []
    if row.processes > 1:
        notes.append(f"{row.processes} processes, gloo" + (", `device_ids` dropped" if row.drop_device_ids else ""))
    flags = f"`{row.flags}`" if row.flags else "none"
    return [row.name, flags, *cells, word, "; ".join(notes)]


def _describe(result: Result) -> str:
    if result.error:
        message = result.error.split("\n")[0]
        return f"`{message if len(message) < 100 else message[:97] + '...'}`"
    losses = [value for name, value in result.values.items() if name.endswith("loss")]
    return f"works, loss {losses[-1]:.4f}" if losses and isinstance(losses[-1], float) else "works"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=PAGE, help="the page to write")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], help="some rows only, to stdout")
    parser.add_argument("--keep", type=Path, help="new folder for everything that the scripts write; default: none")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        return serve(options.serve[0], Path(options.serve[1]))
    if not os.environ.get("TIMM_SCRIPTS"):
        parser.error("TIMM_SCRIPTS has to name a folder with timm's train.py, validate.py, ...")
    rows = [row for row in ROWS if not options.rows or row.name in options.rows]
    with tempfile.TemporaryDirectory() as folder:
        if options.keep:
            options.keep.mkdir()
            folder = options.keep.resolve()
        with Sides(Path(folder)) as sides:
            results = {row.name: sides.run(row) for row in rows}
            page = format_page(Path(folder), rows, results)
    if options.rows:
        print(page)
    else:
        from timm_tresnet.utils.files import atomic_write

        with atomic_write(options.output) as unfinished:
            unfinished.write_text(page)
    if not all(meets(row, compare(results[row.name])[0]) for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

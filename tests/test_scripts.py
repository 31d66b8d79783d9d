"""timm's own scripts, unchanged, from a clone of timm that TIMM_SCRIPTS names."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

SCRIPTS = os.environ.get("TIMM_SCRIPTS")
PLUGIN_LINE = "TResNet comes from the timm_tresnet plugin"

pytestmark = pytest.mark.skipif(
    not SCRIPTS, reason="TIMM_SCRIPTS does not name a folder with timm's train.py, validate.py, ..."
)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Eight noisy photographs of two classes, for training and for validation."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "validation"):
        for name, brightness in (("dark", 40), ("light", 200)):
            (folder / split / name).mkdir(parents=True)
            for index in range(4):
                pixels = torch.randint(0, 50, (64, 64, 3), generator=generator, dtype=torch.uint8) + brightness
                Image.fromarray(pixels.numpy()).save(folder / split / name / f"{name}{index}.png")
    return folder


def train_arguments(image_folder, model, output, num_classes=2):
    return [
        "--data-dir", image_folder, "--model", model, "--num-classes", num_classes, "--input-size", "3", "64", "64",
        "--device", "cpu", "--workers", "1", "--batch-size", "4", "--epochs", "1", "--warmup-epochs", "0",
        "--output", output, "--experiment", "run",
    ]  # fmt: skip


def run_script(run_python, script, *arguments, before=(), **environment):
    process = run_python(*before, Path(SCRIPTS) / script, *arguments, **environment)
    return process.stdout + process.stderr


@pytest.mark.parametrize("model", ["tresnet_l", "test_tresnet"])
def test_train_script_trains_ours(run_python, image_folder, tmp_path, model):
    printed = run_script(run_python, "train.py", *train_arguments(image_folder, model, tmp_path))
    assert PLUGIN_LINE in printed
    checkpoint = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=False)
    assert checkpoint["arch"] == model
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())


def test_train_script_without_the_plugin_builds_timms_own(run_python, image_folder, tmp_path):
    arguments = train_arguments(image_folder, "tresnet_m", tmp_path)
    assert PLUGIN_LINE not in run_script(run_python, "train.py", *arguments, TIMM_TRESNET_AUTOLOAD="0")


def test_train_script_reaches_the_ingredients(run_python, image_folder, tmp_path):
    printed = run_script(
        run_python,
        "train.py",
        *train_arguments(image_folder, "tresnet_s", tmp_path),
        "--grad-checkpointing",
        "--model-kwargs", "layers=(1,1,1,1)", "aa_layer=False", "stem=conv7x7", "act_layer=relu", "block=bottleneck",
    )  # fmt: skip
    state_dict = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=False)["state_dict"]
    assert PLUGIN_LINE in printed
    assert state_dict["body.conv1.conv.weight"].shape == (64, 3, 7, 7)
    assert "body.layer1.0.conv3.conv.weight" in state_dict


def test_train_script_reaches_the_heads(run_python, image_folder, tmp_path):
    run_script(
        run_python,
        "train.py",
        *train_arguments(image_folder, "test_tresnet", tmp_path),
        "--head-init-scale", "0.5", "--head-init-bias", "-3", "--layer-decay", "0.7", "--model-ema",
        "--model-kwargs", "head=ml_decoder", "num_groups=1", "decoder_embedding=16",
    )  # fmt: skip
    checkpoint = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=False)
    assert checkpoint["state_dict"]["head.fc.weight"].shape == (1, 16, 2)
    assert checkpoint["state_dict"]["head.fc.bias"].max() < -2
    queries = checkpoint["state_dict"]["head.queries.vectors"]
    assert torch.equal(checkpoint["state_dict_ema"]["head.queries.vectors"], queries)


@pytest.mark.parametrize(
    ("before", "extra"),
    [(["-m", "timm_tresnet"], []), ([], ["--device-modules", "timm_tresnet"])],
    ids=["python_m", "device_modules"],
)
def test_train_script_takes_the_plugin_explicitly(run_python, image_folder, tmp_path, before, extra):
    arguments = [*extra, *train_arguments(image_folder, "test_tresnet", tmp_path)]
    printed = run_script(run_python, "train.py", *arguments, before=before, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert PLUGIN_LINE in printed
    assert (tmp_path / "run" / "last.pth.tar").exists()


def test_validate_script_measures_the_embedded_weights(run_python, image_folder, tmp_path):
    # Two of the ten classes, so that labels exist; the images are noise, only the mechanics are tested.
    results = tmp_path / "results.json"
    printed = run_script(
        run_python, "validate.py", "--data-dir", image_folder, "--model", "test_tresnet", "--pretrained",
        "--device", "cpu", "--workers", "1", "--batch-size", "4", "--results-file", results, "--results-format", "json",
    )  # fmt: skip
    assert PLUGIN_LINE in printed
    result = json.loads(results.read_text())
    assert float(result["param_count"]) == 0.68
    assert result["img_size"] == 64
    assert (result["crop_pct"], result["interpolation"]) == (1.0, "bilinear")


def test_benchmark_script_runs_inference_and_training(run_python, tmp_path):
    results = tmp_path / "results.json"
    printed = run_script(
        run_python, "benchmark.py", "--model", "test_tresnet", "--bench", "both", "--device", "cpu",
        "--batch-size", "2", "--num-warm-iter", "1", "--num-bench-iter", "10",
        "--results-file", results, "--results-format", "json",
    )  # fmt: skip
    assert PLUGIN_LINE in printed
    result = json.loads(results.read_text())
    result = result[0] if isinstance(result, list) else result
    assert result["model"] == "test_tresnet"
    assert result["infer_samples_per_sec"] > 0
    assert result["train_samples_per_sec"] > 0


def test_validate_script_folds_batch_norms_without_changing_a_prediction(run_python, image_folder, tmp_path):
    measured = []
    for extra in ([], ["--reparam"]):
        results = tmp_path / f"results{len(measured)}.json"
        run_script(
            run_python, "validate.py", "--data-dir", image_folder, "--model", "test_tresnet", "--pretrained",
            "--device", "cpu", "--workers", "1", "--batch-size", "4", "--results-file", results,
            "--results-format", "json", *extra,
        )  # fmt: skip
        measured.append(json.loads(results.read_text()))
    assert measured[1].pop("param_count") < measured[0].pop("param_count")
    assert measured[1] == measured[0]


def test_benchmark_script_folds_batch_norms(run_python, tmp_path):
    results = tmp_path / "results.json"
    run_script(
        run_python, "benchmark.py", "--model", "test_tresnet", "--bench", "inference", "--device", "cpu", "--reparam",
        "--batch-size", "2", "--num-warm-iter", "1", "--num-bench-iter", "5",
        "--results-file", results, "--results-format", "json",
    )  # fmt: skip
    result = json.loads(results.read_text())
    result = result[0] if isinstance(result, list) else result
    assert result["infer_samples_per_sec"] > 0


@pytest.mark.skipif(not find_spec("pandas"), reason="inference.py needs pandas, which is not installed")
def test_inference_script_labels_images(run_python, image_folder, tmp_path):
    printed = run_script(
        run_python, "inference.py", "--data-dir", image_folder, "--split", "validation", "--model", "test_tresnet",
        "--pretrained", "--device", "cpu", "--workers", "1", "--batch-size", "4", "--results-dir", tmp_path,
        "--results-format", "csv", "--results-file", "labels",
    )  # fmt: skip
    assert PLUGIN_LINE in printed
    assert len((tmp_path / "labels.csv").read_text().splitlines()) == 9


@pytest.mark.skipif(not find_spec("onnx"), reason="onnx_export.py needs onnx, which is not installed")
@pytest.mark.skipif(not find_spec("onnxscript"), reason="onnx_export.py needs onnxscript, which is not installed")
@pytest.mark.skipif(not find_spec("onnxruntime"), reason="the comparison needs onnxruntime, which is not installed")
def test_onnx_export_script_exports_the_network(run_python, tmp_path):
    import onnxruntime
    import timm

    output = tmp_path / "test_tresnet.onnx"
    # This script sets up no logging, but only the plugin has a test_tresnet.
    run_script(run_python, "onnx_export.py", output, "--model", "test_tresnet", "--batch-size", "2")
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    x = torch.rand(2, 3, 64, 64)
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = timm.create_model("test_tresnet", pretrained=True).eval()(x)
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-4, atol=1e-4)


def test_trained_checkpoint_can_be_packed(run_python, image_folder, tmp_path):
    run_script(run_python, "train.py", *train_arguments(image_folder, "test_tresnet", tmp_path, num_classes=10))
    pack = Path(__file__).parents[1] / "hub" / "test_tresnet" / "pack.py"
    output = tmp_path / "packed" / "test_tresnet.r64_cifar10.safetensors"  # the name says of what they are
    run_python(pack, tmp_path / "run" / "last.pth.tar", output)
    packed = load_file(output)
    checkpoint = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=False)["state_dict"]
    assert packed.keys() == checkpoint.keys()
    for name, tensor in packed.items():
        torch.testing.assert_close(tensor, checkpoint[name].to(tensor.dtype), rtol=0, atol=0)
    assert [path.name for path in output.parent.iterdir()] == [output.name]

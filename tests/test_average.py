import sys

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from scripts import load_script

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's data sets leave them open


@pytest.fixture
def average():
    return load_script("hub/test_tresnet/average.py")


@pytest.fixture
def photographs(tmp_path):
    """Class folders in which each class has a brightness of its own, so that their order matters for statistics."""
    generator = torch.Generator().manual_seed(0)
    for index in range(40):
        pixels = torch.randint(0, 40, (64, 64, 3), generator=generator, dtype=torch.uint8) + 20 * (index // 4)
        folder = tmp_path / "data" / "train" / f"class{index // 4}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return tmp_path / "data"


def save_checkpoint(seed, file):
    torch.manual_seed(seed)
    torch.save({"state_dict": timm.create_model("test_tresnet").state_dict()}, file)
    return torch.load(file)["state_dict"]


def test_weights_are_averaged_and_statistics_are_those_of_all_images(average, photographs, tmp_path, monkeypatch):
    checkpoints = [tmp_path / "first.pth.tar", tmp_path / "second.pth.tar"]
    first, second = (save_checkpoint(seed, file) for seed, file in enumerate(checkpoints))
    monkeypatch.setattr(sys, "argv", ["average.py", *map(str, [photographs, tmp_path / "a.safetensors", *checkpoints])])
    average.main()
    averaged = load_file(tmp_path / "a.safetensors")
    for name, value in averaged.items():
        if "running" not in name and value.is_floating_point():
            torch.testing.assert_close(value, (first[name] + second[name]) / 2)

    model = timm.create_model("test_tresnet").train()
    model.load_state_dict(averaged)
    images = []  # 40, which are one batch
    model.body.conv1.conv.register_forward_hook(lambda module, inputs, output: images.append(output))
    files = sorted(photographs.rglob("*.png"))
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=timm.create_model("test_tresnet")))
    with torch.no_grad():
        model(torch.stack([transform(Image.open(file)) for file in files]))
    mean, var = averaged["body.conv1.bn.running_mean"], averaged["body.conv1.bn.running_var"]
    torch.testing.assert_close(mean, images[0].mean((0, 2, 3)))
    torch.testing.assert_close(var, images[0].var((0, 2, 3)))


def test_statistics_do_not_depend_on_the_order_of_the_classes(average, photographs, monkeypatch):
    monkeypatch.setattr(average, "BATCH_SIZE", 20)
    variances = []
    for shuffles in (True, False):
        if not shuffles:
            monkeypatch.setattr(average.torch.utils.data.DataLoader, "__init__", without_shuffling())
        torch.manual_seed(0)
        model = timm.create_model("test_tresnet")
        average.recompute_statistics(model, photographs)
        variances.append(model.body.conv1.bn.running_var.sum())
    assert variances[0] > 1.1 * variances[1]  # a batch of few classes varies less


def without_shuffling():
    original = torch.utils.data.DataLoader.__init__
    return lambda self, *args, shuffle, generator, **kwargs: original(self, *args, **kwargs)

"""Images that keep their aspect ratio, beside a statement of ML-Danbooru's transform in torchvision's functions."""

import json
import math

import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms import functional as vision

from timm_tresnet.cli import main as cli
from timm_tresnet.collection.predictions import Settings, classify_files
from timm_tresnet.deployment.running import Runner, find_size_multiple
from timm_tresnet.utils.images import read_image
from timm_tresnet.utils.stacks import Mixed, stack
from timm_tresnet.weights.aspect_ratio import make_transform

SIZES = [(90, 60), (60, 90), (64, 64), (301, 64), (64, 301), (333, 200), (200, 333), (37, 41), (500, 31), (65, 64)]
CONFIG = {"input_size": (3, 64, 64), "interpolation": "bilinear", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}


def draw(width, height, seed=0):
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def see_as_ml_danbooru(image, side=64):
    """Short side resized to a length; rows and columns beyond a multiple of 4 cut off. Values from 0 to 1."""
    pixels = vision.to_tensor(vision.resize(image, side))
    return pixels[:, : pixels.shape[1] // 4 * 4, : pixels.shape[2] // 4 * 4]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_images_are_those_that_ml_danbooru_shows_its_network(size):
    image = draw(*size)
    expected = see_as_ml_danbooru(image)
    pixels = make_transform(CONFIG, 4, normalize=False)(image)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels / 255, expected)
    normalised = vision.normalize(expected, CONFIG["mean"], CONFIG["std"])
    assert torch.equal(make_transform(CONFIG, 4)(image), normalised)


def test_other_multiples_sizes_and_interpolations_are_kept_to():
    config = {**CONFIG, "input_size": (3, 48, 32), "interpolation": "bicubic"}
    image = draw(101, 70)
    expected = vision.pil_to_tensor(vision.resize(image, 32, vision.InterpolationMode.BICUBIC))
    assert expected.shape == (3, 32, 46)
    assert torch.equal(make_transform(config, 1, normalize=False)(image), expected)
    assert torch.equal(make_transform(config, 32, normalize=False)(image), expected[:, :, :32])


def test_without_a_multiple_the_transform_is_timms():
    config = {**CONFIG, "crop_pct": 0.9}
    assert torch.equal(make_transform(config)(draw(90, 60)), timm.data.create_transform(**config)(draw(90, 60)))


def test_images_of_several_shapes_are_put_together_and_taken_apart():
    images = [torch.rand(3, *size) for size in ((2, 5), (4, 3), (2, 5))]
    mixed = stack(images)
    assert isinstance(mixed, Mixed)
    assert len(mixed) == 3
    assert all(torch.equal(one, other) for one, other in zip(mixed.split(), images, strict=True))
    assert torch.equal(stack(images[::2]), torch.stack(images[::2]))


def test_images_of_one_shape_run_together_and_never_more_pixels_than_a_batch():
    class Network:
        pretrained_cfg, in_chans, shapes = {**CONFIG, "crop_pct": 1.0}, 3, []

        def __call__(self, images):
            self.shapes.append(tuple(images.shape))
            return images.sum((2, 3))

    sizes = [(64, 64), (64, 128), (64, 64), (64, 64), (64, 128), (64, 128), (64, 640), (64, 640)]
    images = [torch.rand(3, *size) for size in sizes]
    logits = Runner(Network())(stack(images))
    torch.testing.assert_close(logits, torch.stack([image.sum((1, 2)) for image in images]))
    assert Network.shapes == [(3, 3, 64, 64), (3, 3, 64, 128), (1, 3, 64, 640), (1, 3, 64, 640)]
    assert all(math.prod(shape) <= 3 * len(images) * 64**2 or shape[0] == 1 for shape in Network.shapes)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for index, size in enumerate([*SIZES, (90, 60)]):
        draw(*size, seed=index).save(tmp_path / "images" / f"{index:02}.png")
    (tmp_path / "images" / "05b.png").write_bytes(b"damaged")
    return tmp_path / "images"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_collection_of_several_shapes_is_classified_as_each_image_alone(workers, folder, embedded):
    config = timm.data.resolve_data_config(model=embedded)
    settings = Settings(keep_ratio=True, batch_size=4, workers=workers, top_k=10)
    found = [pair for batch in classify_files(embedded, sorted(folder.iterdir()), settings) for pair in batch]
    assert ["error" in result for _, result in found] == [path.stem == "05b" for path in sorted(folder.iterdir())]
    for path, result in found:
        if "error" not in result:
            x = vision.normalize(see_as_ml_danbooru(read_image(path)), config["mean"], config["std"])
            with torch.inference_mode():
                expected = embedded(x[None]).softmax(-1)[0]
            for entry in result["predictions"]:
                assert entry["probability"] == pytest.approx(expected[entry["index"]].item(), abs=1e-5)


def test_the_command_says_what_keeping_the_ratio_does(folder, tmp_path, capsys):
    words = ["classify", str(folder), "--keep-ratio", "-j", "0", "--device", "cpu"]
    assert cli.main([*words, "--output", str(tmp_path / "tags.jsonl")]) == 1
    said = "--keep-ratio: short sides become 64 pixels, long ones keep the ratio, and what is beyond a multiple of 4 is"
    assert f"{said} cut off\n" in capsys.readouterr().err
    assert json.loads((tmp_path / "tags.jsonl.json").read_text())["made_by"]["keep_ratio"] is True
    assert cli.main([*words, "--compile"]) == 2
    assert "--compile is for images of one size" in capsys.readouterr().err
    assert cli.main(["validate", str(folder), "--model", "test_tresnet", "--keep-ratio", "--compile"]) == 2
    assert "--compile is for images of one size" in capsys.readouterr().err


def test_artifacts_keep_the_ratio_where_they_take_any_size(folder, tmp_path, capsys):
    (folder / "05b.png").unlink()
    free, fixed = str(tmp_path / "free.pt"), str(tmp_path / "fixed.pt")
    words = ["export", "test_tresnet", "--format", "torchscript", "--output"]
    assert cli.main([*words, free]) == cli.main([*words, fixed, "--size", "64", "64"]) == 0
    capsys.readouterr()
    results = []
    for source in (["--model", "test_tresnet"], ["--engine", "torch", free, "--trust"]):
        assert cli.main(["classify", str(folder), *source, "--keep-ratio", "--json", "-j", "0"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    for one, other in zip(*results, strict=True):
        for first, second in zip(one["predictions"], other["predictions"], strict=True):
            assert first["index"] == second["index"]
            assert first["probability"] == pytest.approx(second["probability"], abs=1e-4)
    assert cli.main(["classify", str(folder), "--engine", "torch", fixed, "--trust", "--keep-ratio"]) == 2
    assert "--keep-ratio: the artifact takes images of one size only" in capsys.readouterr().err


def test_a_network_without_space_to_depth_takes_any_side():
    assert find_size_multiple(timm.create_model("test_tresnet")) == 4
    assert find_size_multiple(torch.nn.Conv2d(3, 3, 1)) == 1

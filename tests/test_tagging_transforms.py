import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from timm_tresnet.tagging.transforms import Cutout, make_transform

pytest.importorskip("torchvision", minversion="0.21")  # as the extra "tagging" has it


def test_cutout_paints_one_rectangle_in_one_colour_and_leaves_the_rest():
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    sizes = set()
    for _ in range(50):
        changed = Cutout(0.5)(image)
        mask = (changed != image).any(0)
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        painted = changed[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (painted == painted[:, :1, :1]).all()
        assert painted.shape[1] <= 20
        assert painted.shape[2] <= 30
        sizes.add(tuple(painted.shape[1:]))
    assert max(sizes)[0] == 20
    assert min(sizes)[0] < 20  # part of it lay outside


def test_without_augmentation_images_are_those_that_classify_sees():
    timm_data = pytest.importorskip("timm.data")
    image = Image.fromarray(torch.randint(0, 256, (50, 30, 3), dtype=torch.uint8).numpy())
    config = {"input_size": (3, 32, 32), "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"}
    config |= {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    ours = make_transform(32, config["mean"], config["std"], cutout=0, randaugment=0)
    torch.testing.assert_close(ours(image), timm_data.create_transform(**config)(image))


def test_official_training_has_cutout_before_randaugment():
    steps = [type(step) for step in make_transform(32, [0.0], [1.0], cutout=0.5, randaugment=9).transforms]
    assert steps.index(v2.Resize) < steps.index(Cutout) < steps.index(v2.RandAugment) < steps.index(v2.ToDtype)

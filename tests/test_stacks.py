import pickle

import pytest
import torch

from timm_tresnet.utils.stacks import Mixed, stack

SHAPES = [(3, 4, 6), (3, 6, 4), (3, 1, 1), (3, 4, 6)]


def make_images(shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, shape, dtype=torch.uint8, generator=generator) for shape in shapes]


@pytest.mark.parametrize("count", [1, 3])
def test_images_of_one_shape_become_one_tensor(count):
    images = make_images([(3, 4, 6)] * count)
    stacked = stack(images)
    assert isinstance(stacked, torch.Tensor)
    assert torch.equal(stacked, torch.stack(images))


@pytest.mark.parametrize("sent", [False, True], ids=["here", "sent"])
def test_images_of_different_shapes_are_split_as_they_came(sent):
    images = make_images(SHAPES)
    stacked = stack(images)
    if sent:
        stacked = pickle.loads(pickle.dumps(stacked))
    assert isinstance(stacked, Mixed)
    assert len(stacked) == len(images)
    assert stacked.shapes == tuple(SHAPES)
    for part, image in zip(stacked.split(), images, strict=True):
        assert part.dtype == torch.uint8
        assert torch.equal(part, image)


def test_images_with_the_same_number_of_pixels_but_other_sides_are_not_stacked():
    images = make_images([(3, 4, 6), (3, 6, 4)])
    assert [part.shape for part in stack(images).split()] == [(3, 4, 6), (3, 6, 4)]


def test_values_that_are_too_few_for_the_shapes_are_refused():
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        Mixed(torch.zeros(5), ((1, 2, 2), (1, 1, 2))).split()

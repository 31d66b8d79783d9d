import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from tagged import LABELS, write_images

from timm_tresnet.tagging.annotations import Example, read_annotations
from timm_tresnet.tagging.data import EpochSampler, LabelledImages, make_loader, mix_seed
from timm_tresnet.tagging.transforms import make_transform

pytest.importorskip("torchvision", minversion="0.21")  # as the extra "tagging" has it


@pytest.fixture
def examples(tmp_path):
    return read_annotations(write_images(tmp_path, 10)).examples


def make_images(examples, seed=0):
    return LabelledImages(examples, LABELS, make_transform(32, [0.0], [1.0], 0.5, 9), 32, seed)


def test_targets_follow_the_order_of_the_names(examples):
    item = LabelledImages(examples, LABELS[::-1], make_transform(32, [0.0], [1.0], 0, 0), 32)[0, 3]
    assert set(examples[3].labels) == set(LABELS[:2])
    assert item["target"].tolist() == [0, 1, 1]
    assert item["image"].shape == (3, 32, 32)
    assert (item["index"], item["readable"]) == (3, True)


def test_what_is_drawn_depends_on_seed_epoch_and_image_alone(examples):
    first, again = make_images(examples), make_images(examples)
    for index in random.Random(0).sample(range(len(examples)), len(examples)):
        again[0, index]
    torch.rand(3)
    assert torch.equal(first[1, 4]["image"], again[1, 4]["image"])
    assert not torch.equal(first[1, 4]["image"], first[2, 4]["image"])
    assert not torch.equal(first[1, 4]["image"], make_images(examples, seed=1)[1, 4]["image"])


def test_reading_an_image_leaves_the_random_numbers_of_others_alone(examples):
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    make_images(examples)[0, 0]
    assert torch.equal(torch.rand(2), expected)


def test_workers_read_the_same_images_as_the_process_itself(examples):
    batches = []
    for workers in (0, 2):
        loader = make_loader(make_images(examples), 4, True, workers, 0, 1, seed=3)
        loader.sampler.set_epoch(1)
        batches.append(torch.cat([batch["image"] for batch in loader]))
    assert torch.equal(*batches)


def test_an_image_that_cannot_be_read_or_is_gone_is_marked(examples):
    examples[0].path.write_bytes(b"damaged")
    examples[1].path.unlink()
    images = make_images(examples)
    assert [images[0, index]["readable"] for index in range(3)] == [False, False, True]
    assert images[0, 0]["image"].shape == images[0, 2]["image"].shape


def test_training_leaves_out_what_fills_no_batch_and_takes_every_image_otherwise(examples):
    images = make_images(examples)
    sizes = [len(batch["index"]) for batch in make_loader(images, 3, True, 0, 0, 1, 0)]
    assert sizes == [3, 3, 3]
    (batch,) = make_loader(images, 64, True, 0, 0, 1, 0)  # more than there are
    assert sorted(batch["index"].tolist()) == list(range(10))
    kept = torch.cat([batch["index"] for batch in make_loader(images, 3, False, 0, 0, 1, 0)])
    assert kept.tolist() == list(range(10))


def test_processes_share_the_images_in_equal_parts(examples):
    images = make_images(examples)
    parts = [[index for _, index in EpochSampler(images, 3, process, shuffle=True, seed=0)] for process in range(3)]
    assert {len(part) for part in parts} == {4}
    assert set().union(*parts) == set(range(10))


def test_fingerprints_tell_other_files_and_other_labels(examples):
    fingerprint = make_images(examples).fingerprint()
    assert make_images(examples, seed=5).fingerprint() == fingerprint
    assert make_images(examples[1:]).fingerprint() != fingerprint
    assert LabelledImages(examples, LABELS[::-1], None, 32).fingerprint() != fingerprint


def test_counts_are_of_each_label(examples):
    counts = [sum(name in example.labels for example in examples) for name in LABELS]
    assert make_images(examples).count_labels().tolist() == counts


def test_mixed_seeds_differ_where_any_part_does():
    seeds = {mix_seed(seed, epoch, index) for seed in range(5) for epoch in range(10) for index in range(100)}
    assert len(seeds) == 5000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_images_are_read_as_classify_reads_them(tmp_path, examples):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(examples[0].path)  # transparent: white
    images = LabelledImages(examples, LABELS, make_transform(32, [0.0], [1.0], 0, 0), 32)
    assert images[0, 0]["image"].min() == 1


def test_targets_say_what_is_known():
    examples = [Example(Path("a"), ("x",)), Example(Path("b"), ("y",), ("x",)), Example(Path("c"), (), ())]
    images = LabelledImages(examples, ("x", "y", "z"), None, 32)
    assert [images.make_target(index).tolist() for index in range(3)] == [[1, 0, 0], [0, 1, -1], [-1, -1, -1]]
    assert images.count_labels().tolist() == [1, 1, 0]
    assert images.count_absent().tolist() == [1, 1, 1]
    less = LabelledImages([*examples[:2], Example(Path("c"), ())], ("x", "y", "z"), None, 32)
    assert images.fingerprint() != less.fingerprint()

import pytest
import torch
from tagged import write_classes

from timm_tresnet.tagging.folders import hold_out_of_each, read_folders


def test_classes_are_in_the_order_of_timm_and_images_in_their_folders(tmp_path):
    annotations, measuring = read_folders(write_classes(tmp_path, 2, names=("10", "9", "b")))
    assert annotations.names == ("9", "10", "b")
    assert measuring is None
    assert all(example.labels == (example.path.parent.name,) for example in annotations.examples)
    assert len(annotations.examples) == 6


@pytest.mark.parametrize("name", ["validation", "val", "eval"])
def test_a_data_set_has_its_own_images_to_measure_with(tmp_path, name):
    write_classes(tmp_path / "train", 2)
    write_classes(tmp_path / name, 1, names=("10",))
    training, measuring = read_folders(tmp_path)
    assert (len(training.examples), len(measuring.examples)) == (6, 1)
    assert measuring.names == training.names
    assert {example.path.parents[1] for example in measuring.examples} == {tmp_path / name}


def test_a_data_set_without_them_does_not_measure_with_what_it_trains_on(tmp_path):
    write_classes(tmp_path / "train", 2)
    training, measuring = read_folders(tmp_path)
    assert len(training.examples) == 6
    assert measuring is None


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: write_classes(folder, 1, names=("a",)), "needs two class folders or more, got a"),
        (lambda folder: (folder / "a").mkdir(parents=True), "Found 0 images"),
        (lambda folder: None, "needs to be a folder with a folder for each class"),
        (
            lambda folder: write_classes(write_classes(folder, 1).parent, 1, names=(folder.name,)),
            "outside class folders",
        ),
        (lambda folder: [write_classes(folder / f, 1, names=(f, "b")) for f in ("train", "val")], "lacks: val"),
    ],
    ids=["one_class", "no_images", "no_folder", "outside", "other_classes"],
)
def test_folders_that_are_no_classes_are_refused(tmp_path, prepare, message):
    prepare(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        read_folders(tmp_path / "data")


def test_a_share_of_each_class_is_held_out_by_the_seed_alone(tmp_path):
    annotations, _ = read_folders(write_classes(tmp_path, 10))
    torch.rand(3)
    kept, held_out = hold_out_of_each(annotations, 0.3, seed=1)
    assert [sum(example.labels == (name,) for example in held_out.examples) for name in annotations.names] == [3, 3, 3]
    assert set(kept.examples) | set(held_out.examples) == set(annotations.examples)
    assert not set(kept.examples) & set(held_out.examples)
    assert hold_out_of_each(annotations, 0.3, seed=1) == (kept, held_out)
    assert hold_out_of_each(annotations, 0.3, seed=2) != (kept, held_out)
    _, least = hold_out_of_each(annotations, 0.0, seed=1)
    assert len(least.examples) == 3


def test_a_class_with_a_single_image_cannot_be_held_out(tmp_path):
    annotations, _ = read_folders(write_classes(tmp_path, 1))
    with pytest.raises(
        ValueError, match="has a single image of '2', too few to hold one out; give validation images with --val"
    ):
        hold_out_of_each(annotations, 0.1, seed=0)


def test_images_that_timm_skips_are_counted_by_format(tmp_path):
    folder = write_classes(tmp_path, 1)
    for name in ("2/a.webp", "10/b.WEBP", "2/c.bmp"):
        (folder / name).touch()
    annotations, _ = read_folders(folder)
    skipped = "files, which timm's reader skips"
    assert annotations.left_out == {f".webp {skipped}": 2, f".bmp {skipped}": 1}

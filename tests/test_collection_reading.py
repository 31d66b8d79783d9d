import itertools
import os
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from timm_tresnet.collection.reading import Batch, ImageFiles, plan_batches, read_batches
from timm_tresnet.utils.images import SAMPLES, find_images, read_image

PATHS = [Path(f"{number}.jpg") for number in range(23)]
CONFIG = {"input_size": (3, 24, 32), "crop_pct": 0.9, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}


def test_batches_depend_neither_on_finished_files_nor_on_the_number_of_processes():
    whole = [[file.path for file in batch] for batch in plan_batches(PATHS, 4)]
    assert [len(batch) for batch in whole] == [4, 4, 4, 4, 4, 3]
    for processes in (1, 2, 3, 9):
        shares = [list(plan_batches(PATHS, 4, process=process, processes=processes)) for process in range(processes)]
        in_turn = [batch for batches in itertools.zip_longest(*shares) for batch in batches if batch]
        assert [[file.path for file in batch] for batch in in_turn] == whole
    done = set(PATHS[:5] + PATHS[8:12])
    left = list(plan_batches(PATHS, 4, done.__contains__))
    assert [[file.path for file in batch] for batch in left] == [whole[1], *whole[3:]]
    assert [file.path for batch in left for file in batch if file.wanted] == [
        each for each in PATHS if each not in done
    ]
    assert list(plan_batches([], 4)) == []


def test_no_more_paths_are_taken_than_workers_read_ahead():
    taken = []
    paths = (taken.append(path) or path for path in PATHS)
    batches = iter(read_batches(ImageFiles(CONFIG), plan_batches(paths, 2), 0))
    next(batches)
    assert len(taken) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_equal_timms_and_unreadable_files_are_left_out(workers, tmp_path):
    photos = list(find_images([SAMPLES]))
    (tmp_path / "bad.jpg").touch()
    paths = [photos[0], tmp_path / "bad.jpg", photos[1], photos[2], tmp_path / "gone.jpg"]
    batches = list(read_batches(ImageFiles(CONFIG), plan_batches(paths, 3), workers))
    assert [file.path for batch in batches for file in batch.files] == paths
    assert [bool(file.error) for batch in batches for file in batch.files] == [False, True, False, False, True]
    pixels = torch.cat([batch.pixels for batch in batches])
    assert pixels.dtype == torch.uint8
    mean, std = (torch.tensor(CONFIG[name]).view(3, 1, 1) for name in ("mean", "std"))
    transform = timm.data.create_transform(**CONFIG)
    expected = torch.stack([transform(read_image(path)) for path in photos[:3]])
    assert torch.equal((pixels.float() / 255 - mean) / std, expected)


def test_a_batch_of_unreadable_files_has_no_pixels(tmp_path):
    (batch,) = read_batches(ImageFiles(CONFIG), plan_batches([tmp_path / "gone.jpg"], 3), 0)
    assert isinstance(batch, Batch)
    assert batch.pixels is None


def test_files_change_while_they_are_read(tmp_path):
    for number in range(6):
        Image.new("RGB", (40, 30), (9 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "z").mkdir()
    results = []
    for batch in read_batches(ImageFiles(CONFIG), plan_batches(find_images([tmp_path]), 2), 0):
        results += batch.files
        if len(results) == 2:
            os.rename(tmp_path / "4.png", tmp_path / "z" / "later.png")
            (tmp_path / "5.png").write_bytes(b"")
    assert [file.path.name for file in results if not file.error] == ["0.png", "1.png", "2.png", "3.png", "later.png"]
    assert [file.path.name for file in results if file.error] == ["4.png", "5.png"]


def test_fast_jpeg_reads_at_least_twice_the_pixels_that_are_wanted(tmp_path, monkeypatch):
    from timm_tresnet.collection import reading

    Image.new("RGB", (800, 600)).save(tmp_path / "a.jpg")
    sizes = []

    def record(*arguments, **options):
        image = read_image(*arguments, **options)
        sizes.append(image.size)
        return image

    monkeypatch.setattr(reading, "read_image", record)
    for fast in (False, True):
        (batch,) = read_batches(ImageFiles(CONFIG, fast_jpeg=fast), plan_batches([tmp_path / "a.jpg"], 1), 0)
        assert batch.pixels.shape == (1, 3, 24, 32)
    assert sizes == [(800, 600), (100, 75)]  # 32 / 0.9 = 35.6

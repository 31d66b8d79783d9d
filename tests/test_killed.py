"""Files left by processes that are killed while they write, and by two that write to one path at once."""

import functools
import os
import random
import sys
import threading

import pytest
import timm
import torch
from converting import load_folder, save_checkpoint
from killing import run_killed
from safetensors.torch import load_file

from timm_tresnet import ExportedModel, convert_checkpoint, export_model, write_folder
from timm_tresnet.utils.files import atomic_write

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]


@pytest.fixture
def conversions(tensors, tmp_path):
    """Two that differ in every file: weights, classes, and the repository that the card names."""
    other = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    other["head.fc.weight"], other["head.fc.bias"] = torch.ones(7, *tensors["head.fc.weight"].shape[1:]), torch.ones(7)
    return [
        convert_checkpoint(save_checkpoint(content, tmp_path / f"{index}.pth"))
        for index, content in enumerate((tensors, other))
    ]


def which(conversions, folder):
    """Index of the conversion that a folder holds, whole."""
    (index,) = (index for index, one in enumerate(conversions) if one.num_classes == load_folder(folder).num_classes)
    torch.testing.assert_close(load_file(folder / "model.safetensors"), conversions[index].state_dict)
    card = (folder / "README.md").read_text()
    assert f"| classes | {conversions[index].num_classes} |" in card
    return index


@pytest.mark.parametrize("overwrite", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_a_killed_conversion_leaves_nothing_or_the_whole_and_nothing_in_the_way(conversions, tmp_path, overwrite):
    folder = tmp_path / "out" / "folder"
    seen = set()
    for moment in range(0, 50, 2):
        if not overwrite and folder.exists():
            folder.rename(tmp_path / f"done{moment}")
        before = which(conversions, folder) if folder.exists() else None
        wanted = 1 - before if before is not None else 1
        write = functools.partial(write_folder, conversions[wanted], folder, overwrite=overwrite)
        killed = run_killed(write, moment)
        after = which(conversions, folder) if folder.exists() else None
        assert after in ({before, wanted, None} if killed else {wanted})
        seen.add((killed, after is None))
        if not killed:
            break
    assert seen >= {(True, True), (False, False)} or overwrite
    assert os.listdir(folder.parent) == ["folder"]  # the last one, which lived, cleared up behind the others
    assert moment > 8


@pytest.mark.parametrize(
    "moments",
    [range(0, 60, 15), pytest.param(range(60), marks=pytest.mark.thorough)],
    ids=["few_moments", "every_moment"],
)
def test_a_killed_export_leaves_nothing_or_the_whole(embedded, tmp_path, moments):
    path = tmp_path / "out" / "network.pt"
    other = timm.create_model("test_tresnet", num_classes=7).eval()
    export_model(other, path, "torchscript")
    x = torch.rand(1, 3, 64, 64)
    expected = {10: embedded(x), 7: other(x)}
    killings = 0
    for moment in moments:
        killed = run_killed(lambda: export_model(embedded, path, "torchscript"), moment)
        killings += killed
        if path.exists():
            exported = ExportedModel(path, "torch", trust=True)
            torch.testing.assert_close(exported(x), expected[exported.num_classes], rtol=1e-3, atol=1e-4)
        if not killed:
            break
    assert not killed
    assert killings
    export_model(embedded, path, "torchscript")
    assert sorted(os.listdir(path.parent)) == [path.name, f"{path.name}.json"]


def test_random_moments_leave_nothing_or_the_whole_of_files_that_belong_together(tmp_path):
    path = tmp_path / "out" / "a.bin"
    draw = random.Random(0)

    def write(text):
        with atomic_write(path) as unfinished:
            for suffix in (".c", "", ".b"):
                unfinished.with_name(path.name + suffix).write_text(text)

    write("0")
    for round in range(1, 21):
        killed = run_killed(lambda round=round: write(str(round)), draw.randrange(12))
        if path.exists():
            names = ("a.bin", "a.bin.b", "a.bin.c")
            assert len({(path.parent / name).read_text() for name in names}) == 1
        assert killed or path.read_text() == str(round)
    write("last")
    assert sorted(os.listdir(path.parent)) == ["a.bin", "a.bin.b", "a.bin.c"]


@pytest.mark.parametrize("overwrite", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_two_that_write_one_folder_at_once_do_not_mix(conversions, tmp_path, overwrite):
    folder = tmp_path / "out" / "folder"
    for _ in range(3):
        children = []
        for conversion in conversions:
            child = os.fork()
            if not child:
                try:
                    write_folder(conversion, folder, overwrite=overwrite)
                finally:
                    os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        assert which(conversions, folder) in (0, 1)
        names = set(os.listdir(folder.parent)) - {"folder"}
        assert all(name.endswith(".complete") for name in names)
        if not overwrite:
            folder.rename(tmp_path / f"done{len(os.listdir(tmp_path))}")


def test_two_that_write_files_that_belong_together_do_not_mix(tmp_path):
    path = tmp_path / "a.bin"

    def write(text):
        for _ in range(50):
            with atomic_write(path) as unfinished:
                for suffix in ("", ".json", ".weights"):
                    unfinished.with_name(path.name + suffix).write_text(text)

    threads = [threading.Thread(target=write, args=(text,)) for text in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({entry.read_text() for entry in tmp_path.iterdir()}) == 1
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.bin.json", "a.bin.weights"]

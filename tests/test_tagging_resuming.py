import importlib.util
import os
import re
import shutil

import pytest
import torch
from tagged import WORDS, write_images

from timm_tresnet.cli import main as cli

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lightning", "torchmetrics", "torchvision")),
    reason="install the extra tagging",
)


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed_images")
    data = write_images(folder / "train", 16), write_images(folder / "val", 8, seed=1)
    return ["train-tagger", str(data[0]), "--val", str(data[1]), *WORDS, "--epochs", "2", "--output"]


@pytest.fixture(scope="session")
def stopped(words, tmp_path_factory):
    """The folder of a training of two epochs that has done one."""
    from timm_tresnet.tagging.resuming import AtomicCheckpoints

    folder = tmp_path_factory.mktemp("stopped") / "tagger"
    save = AtomicCheckpoints.save_checkpoint

    def save_and_stop(self, *arguments, **options):
        save(self, *arguments, **options)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AtomicCheckpoints, "save_checkpoint", save_and_stop)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            cli.main([*words, str(folder)])
    return folder.with_name("tagger.training")


@pytest.fixture
def resume(words, stopped, tmp_path):
    """Resume a copy of it, with a file that is made of its checkpoint; returns the exit status."""

    def run(make):
        shutil.copytree(stopped, tmp_path / "tagger.training")
        make(tmp_path / "tagger.training" / "last.ckpt")
        return cli.main([*words, str(tmp_path / "tagger"), "--resume"])

    return run


def changed(change):
    def make(path):
        checkpoint = torch.load(path, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, path)

    return make


def put(*path, value):
    """What puts a value at a path of a checkpoint."""

    def change(checkpoint):
        *parents, last = path
        for each in parents:
            checkpoint = checkpoint[each]
        checkpoint[last] = value

    return change


def drop(name):
    return lambda checkpoint: checkpoint.pop(name)


CURRENT = ("loops", "fit_loop", "epoch_progress", "current")
BIAS = ("state_dict", "network.head.fc.bias")
FOREIGN = {  # what is done to the checkpoint, and what is said of it
    **{f"no_{name}": (drop(name), f"needs {name}, which is missing") for name in ("state_dict", "loops", "tagging")},
    "no_optimizer": (drop("optimizer_states"), "needs optimizer_states"),
    "list_of_weights": (put("state_dict", value=[1]), "needs state_dict to be a dict, got list"),
    "other_network": (put("state_dict", value={"a": torch.ones(2)}), "has state_dict of another training"),
    "hostile_name": (put("state_dict", value={"\x1b[2J": torch.ones(2)}), r"unexpected \x1b[2J"),
    "other_shape": (put(*BIAS, value=torch.ones(7)), "to be a tensor of (3,)"),
    "no_tensor": (put(*BIAS, value="x"), "to be a tensor of (3,), torch.float32, got str"),
    "other_average": (put("tagging", "average", "head.fc.bias", value=torch.ones(7)), "needs tagging.average"),
    "other_best": (put("tagging", "best", "weights", value={}), "has tagging.best.weights of another training"),
    "thresholds": (put("tagging", "best", "thresholds", value=[2, 0, 0]), "needs tagging.best.thresholds"),
    "no_best": (put("tagging", "best", value=None), "needs tagging.best to be an object, got null"),
    "history": (put("tagging", "history", value=[{"epoch": 1}]), "needs tagging.history"),
    "unreadable": (put("tagging", "unreadable", value=[10**9]), "needs tagging.unreadable"),
    "epoch": (put("epoch", value=7), "needs epoch to be an integer from 0 to 1, got 7"),
    "odd_epoch": (put("epoch", value=torch.ones(2)), "needs epoch to be an integer from 0 to 1"),
    "loops": (put(*CURRENT, value={}), "has loops.fit_loop.epoch_progress.current of another training"),
    "count": (put(*CURRENT, "completed", value=-5), "to be a number from 0, got -5"),
    "other_epochs": (put(*CURRENT, "processed", value=2), "needs its loops to have processed 1 epochs, got 2"),
    "other_optimizer": (put("optimizer_states", value=[{}]), "cannot resume from"),
    "two_optimizers": (lambda checkpoint: checkpoint["optimizer_states"].append({}), "needs optimizer_states to be"),
    "moments": (put("optimizer_states", 0, "state", 0, "exp_avg", value=torch.ones(5)), "cannot resume from"),
    "schedule": (put("lr_schedulers", value=[{"last_epoch": "x"}]), "cannot resume from"),
    "version": (put("pytorch-lightning_version", value="\x1b[2J"), "cannot resume from"),
}


@pytest.mark.parametrize(("change", "said"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_checkpoint_is_refused_in_one_sentence(change, said, resume, tmp_path, capsys):
    assert resume(changed(change)) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"timm-tresnet: cannot train: [^\n\x1b]*last.ckpt[^\n\x1b]*\n", error)
    assert said in error
    assert not (tmp_path / "tagger").exists()


FILES = {
    "text": lambda path: path.write_text("hello"),
    "empty": lambda path: path.write_text(""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "list": lambda path: torch.save([1, 2], path),
    "weights": lambda path: torch.save({"a": torch.ones(2)}, path),
    "legacy": lambda path: torch.save({}, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_file_that_is_no_checkpoint_is_refused_in_one_sentence(make, resume, capsys):
    assert resume(make) == 2
    said = r"timm-tresnet: cannot train: \S*last.ckpt is not a checkpoint of this training: [^\n]+\n"
    assert re.fullmatch(said, capsys.readouterr().err)


def test_checkpoint_names_no_file_that_is_removed(resume, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")

    def name_another(checkpoint):
        (state,) = checkpoint["callbacks"].values()
        outside = f"{tmp_path}/tagger.training/../thesis.txt"
        state |= {"dirpath": f"{tmp_path}/tagger.training", "best_model_path": outside, "kth_best_model_path": outside}

    assert resume(changed(name_another)) == 0
    assert "resuming from " in capsys.readouterr().out
    assert (tmp_path / "thesis.txt").read_text() == "precious"

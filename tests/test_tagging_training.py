import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tagged import LABELS, WORDS, write_images

pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("lightning", "torchvision")),
        reason="install the extra tagging",
    )
]
FIGURES = ("mAP", "CF1", "OF1")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The CSV files of 42 images to train on and 14 to measure with."""
    folder = tmp_path_factory.mktemp("images")
    return write_images(folder / "train", 42), write_images(folder / "val", 14, seed=1)


@pytest.fixture
def train(data):
    """Run the command in this process; returns its exit status."""
    from timm_tresnet.cli import main as cli

    def run(output, *words, annotations=None):
        return cli.main(
            [
                "train-tagger",
                str(annotations or data[0]),
                "--val",
                str(data[1]),
                "--output",
                str(output),
                *WORDS,
                *words,
            ]
        )

    return run


def run_processes(script, *arguments, launcher=(), check=True):
    """Run a script in a new interpreter, or several by a launcher."""
    command = [sys.executable, *launcher, str(script), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if check:
        assert process.returncode == 0, process.stdout + process.stderr
    return process


@pytest.fixture(scope="session")
def script(tmp_path_factory):
    """A script that is the command; with KILL_AT, a process sends itself the signal KILL_WITH in that step."""
    path = tmp_path_factory.mktemp("script") / "command.py"
    path.write_text(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "from timm_tresnet.cli import main as cli\n"
        "if 'KILL_AT' in os.environ:\n"
        "    from timm_tresnet.tagging.module import Tagger\n"
        "    step = Tagger.training_step\n"
        "    def training_step(self, batch, index):\n"
        "        if self.global_step == int(os.environ['KILL_AT']):\n"
        "            os.kill(os.getpid(), int(os.environ['KILL_WITH']))\n"
        "        return step(self, batch, index)\n"
        "    Tagger.training_step = training_step\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(cli.main(sys.argv[1:]))\n"
    )
    return path


def test_a_training_learns_and_ends_with_a_folder_that_classify_and_timm_take(train, data, tmp_path, capsys):
    import timm

    from timm_tresnet.cli import main as cli
    from timm_tresnet.utils.images import read_image
    from timm_tresnet.weights.labels import read_thresholds

    output = tmp_path / "tagger"
    assert train(output, "--epochs", "12", "--lr", "5e-3", "--cutout", "0", "--randaugment", "0") == 0
    printed = capsys.readouterr().out
    assert "epoch 12/12: loss " in printed
    rates = [float(line.split("mAP ")[1].split(",")[0]) for line in printed.splitlines() if line.startswith("epoch")]
    assert max(rates[-3:]) > 95
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "config.json", "model.safetensors"]

    model = timm.create_model(f"local-dir:{output}", pretrained=True).eval()
    assert tuple(model.pretrained_cfg["label_names"]) == tuple(sorted(LABELS))
    thresholds = read_thresholds(model.pretrained_cfg, 3)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    folder = data[1].parent
    assert cli.main(["classify", "--json", "--model", f"local-dir:{output}", str(folder)]) == 0
    right = 0
    for result in json.loads(capsys.readouterr().out):
        with torch.no_grad():
            probabilities = model(transform(read_image(Path(result["image"])))[None])[0].sigmoid().tolist()
        expected = {name for name, p, t in zip(sorted(LABELS), probabilities, thresholds, strict=True) if p >= t}
        assert {entry["label"] for entry in result["predictions"]} == expected
        right += 1
    assert right == 14


def test_partial_labels_are_trained_in_the_two_steps_of_the_paper(train, data, tmp_path, capsys):
    from timm_tresnet.tagging.annotations import read_annotations

    names = tmp_path / "names.csv"
    names.write_text("".join(f'{index},"{name}"\n' for index, name in enumerate(LABELS)), encoding="utf-8")
    partial = tmp_path / "partial.csv"
    lines = ["ImageID,LabelName,Confidence"]
    for index, example in enumerate(read_annotations(data[0]).examples):
        for label, name in enumerate(LABELS):
            if (index + label) % 3:  # a third of all labels is unknown
                file = example.path.relative_to(data[0].parent).with_suffix("")
                lines.append(f"{file},{label},{int(name in example.labels)}")
    partial.write_text("\n".join(lines))
    words = ["--images", str(data[0].parent), "--other-names", str(names), "--epochs", "1"]
    assert train(tmp_path / "first", *words, annotations=partial) == 0
    printed = capsys.readouterr().out
    assert "66.7% of all labels of all images are known, others --unknown ignore" in printed
    prior = tmp_path / "first.training" / "prior.csv"
    rows = dict(line.rsplit(",", 1) for line in prior.read_text(encoding="utf-8").splitlines())
    assert rows.pop("label") == "prior"
    assert len(rows) == 3
    assert all(0 < float(value) < 1 for value in rows.values())
    selective = ["--unknown", "selective", "--unknown-top-k", "0", "--prior", str(prior), "--prior-threshold", "0"]
    assert train(tmp_path / "second", *words, *selective, annotations=partial) == 0
    selective[3:] = ["1", "--pos-weight", "balanced"]
    assert train(tmp_path / "third", *words, *selective, annotations=partial) == 0
    losses = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    first = next(line for line in printed.splitlines() if line.startswith("epoch"))
    assert losses[0] == first  # every label is common: nothing unknown counts
    assert losses[1] != first


def test_a_run_that_is_killed_and_resumed_gives_the_same_bits(train, script, data, tmp_path, monkeypatch, capsys):
    words = ["--epochs", "3", "--head", "ml_decoder", "--model-kwargs"]  # whose dropout draws too
    words += ["layers=(1,1,1,1)", "width_factor=0.125", "decoder_embedding=8"]
    assert train(tmp_path / "whole", *words) == 0
    killed = tmp_path / "killed"
    monkeypatch.setenv("KILL_WITH", str(int(signal.SIGKILL)))
    monkeypatch.setenv("KILL_AT", "7")  # in the second of three epochs of five steps
    arguments = ["train-tagger", data[0], "--val", data[1], "--output", killed, *WORDS, *words]
    assert run_processes(script, *arguments, check=False).returncode == -signal.SIGKILL
    assert not killed.exists()
    monkeypatch.delenv("KILL_AT")
    capsys.readouterr()
    assert train(killed, *words, "--resume") == 0
    assert "resuming from " in capsys.readouterr().out
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", killed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "whole" / "config.json").read_bytes() == (killed / "config.json").read_bytes()


def test_a_run_interrupted_before_its_first_checkpoint_begins_again(train, script, data, tmp_path, monkeypatch):
    monkeypatch.setenv("KILL_WITH", str(int(signal.SIGINT)))
    monkeypatch.setenv("KILL_AT", "2")
    words = ["train-tagger", data[0], "--val", data[1], "--output", tmp_path / "tagger", *WORDS, "--epochs", "1"]
    process = run_processes(script, *words, check=False)
    assert process.returncode == 1
    # The last line, after Lightning's summary
    assert process.stdout.endswith("\ninterrupted; continue after the last finished epoch with --resume\n")
    assert "Traceback" not in process.stderr
    assert train(tmp_path / "tagger", "--epochs", "1", "--resume") == 0


def test_two_processes_train_one_network(data, tmp_path):
    output = tmp_path / "tagger"
    words = ["train-tagger", data[0], "--val", data[1], "--output", output, *WORDS, "--epochs", "2", "--sync-bn"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    process = run_processes("timm_tresnet", *words, launcher=launcher)
    assert process.stdout.count("epoch 2/2") == 1  # one of them speaks
    run = json.loads((tmp_path / "tagger.training" / "run.json").read_text())
    assert run["processes"] == 2
    config = json.loads((output / "config.json").read_text())
    assert config["label_names"] == sorted(LABELS)


def test_resuming_with_other_settings_or_data_is_refused(train, data, tmp_path, capsys):
    output = tmp_path / "tagger"
    assert train(output, "--epochs", "1") == 0
    (output / "README.md").unlink()
    (output / "config.json").unlink()
    (output / "model.safetensors").unlink()
    assert train(output, "--epochs", "2", "--lr", "0.01", "--resume") == 2
    error = capsys.readouterr().err
    assert "other epochs (1, now 2), lr (0.0001, now 0.01); resume it with the settings and data" in error
    changed = write_images(tmp_path / "other", 20)
    assert train(output, "--epochs", "1", "--resume", annotations=changed) == 2
    assert "other training images" in capsys.readouterr().err
    assert train(output, "--epochs", "1") == 2
    assert "resume it with --resume, or start again with --overwrite" in capsys.readouterr().err
    assert train(output, "--epochs", "1", "--resume") == 0  # nothing is left to train: written again
    assert output.exists()


def test_an_output_that_holds_something_is_left_alone(train, tmp_path, capsys):
    output = tmp_path / "tagger"
    output.mkdir()
    (output / "thesis.txt").write_text("precious")
    for words in ([], ["--overwrite"]):
        assert train(output, "--epochs", "1", *words) == 2
        assert "thesis.txt" in capsys.readouterr().err
    assert (output / "thesis.txt").read_text() == "precious"
    assert not (tmp_path / "tagger.training").exists()


def test_a_disk_that_is_full_leaves_the_last_checkpoint(train, tmp_path, capsys):
    output = tmp_path / "tagger"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        assert train(output, "--epochs", "1") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot train: " in capsys.readouterr().err
    assert not output.exists()
    assert not (tmp_path / "tagger.training" / "last.ckpt").exists()
    assert train(output, "--epochs", "1", "--resume") == 0


def test_checkpoints_hold_nothing_that_runs(train, tmp_path):
    train(tmp_path / "tagger", "--epochs", "1")
    checkpoint = torch.load(tmp_path / "tagger.training" / "last.ckpt", weights_only=True)
    assert checkpoint["tagging"]["best"]["epoch"] == 1


def test_a_checkpoint_from_elsewhere_that_wants_to_run_code_is_refused(train, tmp_path, capsys):
    import pickle

    output = tmp_path / "tagger"
    assert train(output, "--epochs", "1") == 0
    for path in output.iterdir():
        path.unlink()

    class Harm:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))

    (tmp_path / "tagger.training" / "last.ckpt").write_bytes(pickle.dumps(Harm(), protocol=2))
    assert train(output, "--epochs", "1", "--resume") == 2
    assert not (tmp_path / "harm").exists()
    assert "last.ckpt is not a checkpoint of this training: " in capsys.readouterr().err


def test_images_that_cannot_be_read_are_counted_and_the_rest_is_trained(train, tmp_path, capsys):
    annotations = write_images(tmp_path / "images", 24)
    (tmp_path / "images" / "0" / "0.png").write_bytes(b"damaged")
    assert train(tmp_path / "tagger", "--epochs", "1", annotations=annotations) == 0
    assert "skipped 1 unreadable training images: " in capsys.readouterr().out


def test_only_images_that_cannot_be_read_are_an_error(train, tmp_path, capsys):
    annotations = write_images(tmp_path / "images", 4)
    for path in (tmp_path / "images").glob("*/*.png"):
        path.write_bytes(b"damaged")
    assert train(tmp_path / "tagger", "--epochs", "1", annotations=annotations) == 2
    assert "none of the training images can be read" in capsys.readouterr().err


@pytest.mark.parametrize("count", [2, 9], ids=["fewer_than_a_batch", "one_left_over"])
def test_odd_numbers_of_images_train(train, tmp_path, count):
    annotations = write_images(tmp_path / "images", count)
    assert (
        train(tmp_path / "tagger", "--epochs", "1", "--labels", str(write_labels(tmp_path)), annotations=annotations)
        == 0
    )


def write_labels(folder):
    path = folder / "labels.txt"
    path.write_text("\n".join(LABELS), encoding="utf-8")
    return path


def test_one_label_trains_and_holds_out_by_itself(tmp_path, capsys):
    from timm_tresnet.cli import main as cli

    annotations = write_images(tmp_path / "images", 20)
    (tmp_path / "labels.txt").write_text(LABELS[1])
    words = ["--labels", str(tmp_path / "labels.txt"), "--skip-unknown", "--keep-empty", "--held-out", "0.3"]
    command = ["train-tagger", str(annotations), "--output", str(tmp_path / "tagger"), *WORDS, *words, "--epochs", "1"]
    assert cli.main(command) == 0
    assert "left out 2 unknown labels" in capsys.readouterr().out
    card = (tmp_path / "tagger" / "README.md").read_text()
    assert "14 images of" in card
    assert "6 images of" in card


def test_a_loss_that_is_not_finite_ends_the_training(train, tmp_path, capsys):
    assert train(tmp_path / "tagger", "--epochs", "2", "--opt", "sgd", "--lr", "1e30") == 2
    assert "the loss is not finite in epoch 1; use a lower --lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "tresnet_q", "--from-scratch"], "cannot make the network tresnet_q"),
        (["--opt", "adamm"], "adamm"),
        (["--image-size", "30"], "cannot be run on images of 30x30 pixels"),
        (["--labels", "nowhere.txt"], "nowhere.txt"),
        (["--val", "nowhere.csv"], "nowhere.csv"),
        (["--device", "cuda"], "cannot train"),
    ],
)
def test_mistakes_are_reported_in_a_sentence(train, tmp_path, capsys, words, message):
    if words[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert train(tmp_path / "tagger", "--epochs", "1", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "tagger").exists()


def test_gradients_accumulate_as_in_larger_batches(train, tmp_path):
    # Steps of 2 x 8 images; the average moves once for both.
    assert train(tmp_path / "tagger", "--epochs", "1", "--accumulate", "2") == 0
    checkpoint = torch.load(tmp_path / "tagger.training" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == checkpoint["tagging"]["averaged_steps"] == 3

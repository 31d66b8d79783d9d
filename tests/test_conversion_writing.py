import errno
import json
import os
import re
import signal
import stat
import sys
from pathlib import Path

import pytest
from converting import load_folder, save_checkpoint
from killing import run_in_fork
from safetensors import safe_open

from timm_tresnet import convert_checkpoint, write_folder
from timm_tresnet.cli import main as cli


@pytest.fixture
def conversion(tensors, tmp_path):
    return convert_checkpoint(save_checkpoint(tensors, tmp_path / "a.pth"))


def test_folder_holds_weights_config_and_card_and_nothing_else(conversion, tmp_path):
    write_folder(conversion, tmp_path / "new" / "folder", repo_id="owner/name")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert os.listdir(folder.parent) == ["folder"]
    assert json.loads((folder / "config.json").read_text())["architecture"] == "test_tresnet"
    assert "owner/name" in (folder / "README.md").read_text()
    (tmp_path / "probe").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {stat.S_IMODE((tmp_path / "probe").stat().st_mode)}


def test_config_says_what_is_known_and_weights_say_their_format(tensors, tmp_path):
    names = ["ä", *"bcdefghij"]
    file = save_checkpoint({"model": tensors, "idx_to_class": names}, tmp_path / "a.pth")
    for slope, model_args in ((None, {}), (0.2, {"model_args": {"negative_slope": 0.2}})):
        folder = tmp_path / str(slope)
        conversion = convert_checkpoint(file, negative_slope=slope)
        write_folder(conversion, folder)
        text = (folder / "config.json").read_text(encoding="utf-8")
        config = {"architecture": "test_tresnet", "num_classes": 10, **model_args}
        config |= {"pretrained_cfg": conversion.pretrained_cfg, "label_names": names}
        assert text == json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        with safe_open(folder / "model.safetensors", "pt") as weights:
            assert weights.metadata() == {"format": "pt"}


def test_what_comes_into_the_folder_meanwhile_is_not_overwritten(conversion, tmp_path):
    folder = tmp_path / "folder"
    write_folder(conversion, folder)
    with pytest.raises(FileExistsError, match="has thesis.tex, which are not overwritten"):
        write_folder(conversion, folder, overwrite=True, check=lambda partial: (folder / "thesis.tex").touch())
    assert len(os.listdir(folder)) == 4


def test_only_an_earlier_conversion_is_overwritten_and_only_on_demand(conversion, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_folder(conversion, folder)  # empty is as good as new
    (folder / "README.md").write_text("mine")

    def refuse(path, said, **options):
        with pytest.raises(FileExistsError, match=f"^{re.escape(f'{path} {said}')}$"):
            write_folder(conversion, path, **options)

    refuse(folder, "has README.md, config.json, model.safetensors; name another folder, or overwrite it")
    assert (folder / "README.md").read_text() == "mine"
    write_folder(conversion, folder, overwrite=True)
    assert (folder / "README.md").read_text() != "mine"
    (folder / "thesis.tex").touch()
    refuse(folder, "has thesis.tex, which are not overwritten; name another folder", overwrite=True)
    refuse(folder / "thesis.tex", "is a file; name a folder to write to")
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "folder"]


def test_a_failed_check_leaves_the_existing_folder(conversion, tmp_path):
    write_folder(conversion, tmp_path / "folder")
    before = (tmp_path / "folder" / "model.safetensors").stat().st_ino

    def check(folder):
        assert load_folder(folder).num_classes == 10
        raise ValueError("logits differ")

    with pytest.raises(ValueError, match="logits differ"):
        write_folder(conversion, tmp_path / "folder", overwrite=True, check=check)
    assert (tmp_path / "folder" / "model.safetensors").stat().st_ino == before
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "folder"]


def test_a_full_disk_leaves_nothing_and_a_later_run_works(conversion, tmp_path, monkeypatch):
    write_bytes = Path.write_bytes

    def fail(path, data):
        write_bytes(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        with pytest.raises(OSError, match="No space left on device"):
            write_folder(conversion, tmp_path / "folder")
    assert os.listdir(tmp_path) == ["a.pth"]
    write_folder(conversion, tmp_path / "folder")
    assert load_folder(tmp_path / "folder").num_classes == 10
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "folder"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and a limit on the size of files")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.usefixtures("conversion")
def test_a_limit_on_the_size_of_files_is_an_error_without_a_traceback(tmp_path, tmp_path_factory):
    import resource

    def convert():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        return cli.main(["convert", str(tmp_path / "a.pth"), "--output", str(tmp_path / "folder")])

    output = tmp_path_factory.mktemp("printed") / "printed"
    assert run_in_fork(convert, output) == 1
    printed = output.read_text()
    sentence = f"timm-tresnet: {tmp_path / 'folder'} would exceed the largest possible file size"
    assert printed.splitlines()[-1] == sentence
    assert "Traceback" not in printed
    assert os.listdir(tmp_path) == ["a.pth"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_killed_run_leaves_nothing_under_the_name_and_a_later_run_works(conversion, tmp_path):
    def kill(folder):
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            write_folder(conversion, tmp_path / "folder", check=kill)
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    (left,) = set(os.listdir(tmp_path)) - {"a.pth"}
    assert left.startswith(".folder-")
    assert left.endswith(".partial")
    write_folder(conversion, tmp_path / "folder")
    assert load_folder(tmp_path / "folder").num_classes == 10
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "folder"]

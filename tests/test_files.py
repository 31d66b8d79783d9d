import errno
import os
import signal
import stat
from pathlib import Path

import pytest

from timm_tresnet.utils.files import atomic_write


class Interruption(BaseException):
    """Ends a program rather than a function, as KeyboardInterrupt does."""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "two words.tar.gz"


def test_a_file_appears_when_it_is_complete(path):
    with atomic_write(path) as unfinished:
        unfinished.write_text("half")
        assert not path.exists()
        unfinished.write_text("all of it")
    assert path.read_text() == "all of it"
    assert os.listdir(path.parent) == [path.name]


def break_off(path, error):
    with atomic_write(path) as unfinished:
        unfinished.write_text("half")
        raise error


def test_an_error_of_the_operating_system_names_the_final_file(path):
    def write():
        with atomic_write(path) as unfinished:
            unfinished.mkdir()
            (unfinished / "weights").write_text("half")
            (unfinished / "weights" / "more").write_text("")

    with pytest.raises(NotADirectoryError) as raised:
        write()
    assert raised.value.filename == f"{path}/weights/more"


def test_without_room_the_error_names_the_file(path):
    with pytest.raises(OSError, match="No space left") as raised:
        break_off(path, OSError(errno.ENOSPC, "No space left on device"))
    assert raised.value.filename == str(path)


@pytest.fixture
def _ctrl_c_interrupts():
    """As in a terminal; a shell starts a process in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_interrupts")
@pytest.mark.parametrize("moment", range(3))
def test_ctrl_c_while_files_get_their_places_waits_for_the_last(moment, path, monkeypatch):
    replace, moments = os.replace, iter(range(9))

    def interrupt(source, target):
        if next(moments) == moment:
            signal.raise_signal(signal.SIGINT)
        replace(source, target)

    def write(text):
        with atomic_write(path) as unfinished:
            unfinished.write_text(text)
            unfinished.with_name("other").write_text(text)

    write("old")
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write("new")
    assert {each.name: each.read_text() for each in path.parent.iterdir()} == {path.name: "new", "other": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interruption])
def test_an_error_leaves_nothing(error, path):
    with pytest.raises(error):
        break_off(path, error)
    assert os.listdir(path.parent) == []


def test_an_error_keeps_the_file_that_was_there(path):
    path.parent.mkdir()
    path.write_text("old")
    with pytest.raises(ValueError, match="broken"):
        break_off(path, ValueError("broken"))
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == [path.name]


def test_a_killed_process_leaves_nothing_under_the_name(path, run_python):
    run_python(
        "-c",
        "import os, pathlib, signal, sys; from timm_tresnet.utils.files import atomic_write\n"
        "with atomic_write(pathlib.Path(sys.argv[1])) as unfinished:\n"
        "    unfinished.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)",
        path,
        check=False,
    )
    (left,) = os.listdir(path.parent)
    assert left.startswith(f".{path.name}-")


def test_an_earlier_file_is_replaced(path):
    path.parent.mkdir()
    path.write_text("old")
    with atomic_write(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_files_that_belong_together_appear_together_the_named_one_last(path, monkeypatch):
    replaced = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (replaced.append(target.name), replace(source, target)))
    names = [f"{path.name}.a", path.name, f"{path.name}.z"]
    with atomic_write(path) as unfinished:
        for name in names:
            unfinished.with_name(name).write_text(name)
        assert os.listdir(path.parent) == [unfinished.parent.name]
    assert replaced[-1] == path.name
    assert {entry.name: entry.read_text() for entry in path.parent.iterdir()} == {name: name for name in names}


def test_a_folder_appears_whole(path):
    with atomic_write(path, overwrite=False) as unfinished:
        (unfinished / "inner").mkdir(parents=True)
        (unfinished / "inner" / "file").touch()
        assert not path.exists()
    assert (path / "inner" / "file").exists()
    assert os.listdir(path.parent) == [path.name]


def test_a_relative_path_stays_where_it_was_when_the_folder_changes(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with atomic_write(Path("file")) as unfinished:
        unfinished.touch()
        monkeypatch.chdir("elsewhere")
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "file"]


def come_second(path):
    with atomic_write(path, overwrite=False) as unfinished:
        unfinished.write_text("mine")
        path.write_text("the rival's")


def test_a_file_created_meanwhile_stays_and_so_does_the_new_result(path):
    with pytest.raises(FileExistsError, match="was created meanwhile") as caught:
        come_second(path)
    assert path.read_text() == "the rival's"
    (left,) = (entry for entry in path.parent.iterdir() if entry != path)
    assert left.read_text() == "mine"
    assert str(left) in str(caught.value)


def test_a_written_file_has_the_usual_permissions(path, tmp_path):
    with atomic_write(path) as unfinished:
        unfinished.touch()
    (tmp_path / "other").touch()
    modes = {stat.S_IMODE(entry.stat().st_mode) for entry in (path, tmp_path / "other")}
    assert len(modes) == 1

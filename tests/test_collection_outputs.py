import csv
import errno
import importlib.util
import json
import os
import resource
import signal
from pathlib import Path

import pytest
from killing import run_killed

from timm_tresnet.collection.outputs import FORMATS, Output
from timm_tresnet.tagging.annotations import ReadingOptions, read_annotations

MADE_BY = {"weights_sha256": "a", "threshold": None, "preprocessing": {"input_size": (3, 8, 8)}}
needs_pyarrow = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="pyarrow, of the extra parquet, is not installed"
)
EVERY = [pytest.param(suffix, marks=needs_pyarrow if suffix == ".parquet" else ()) for suffix in FORMATS]
FILES = [Path(f"photos/{name}.jpg") for name in ("a", 'q"uo,te', "naïve\n\x1b", "b", "c;d", "e", "a", "f\udcff")]
BATCH = 3


def make_row(number, path):
    name = path.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    name = "photos/" + name.replace("\n", "\\n").replace("\x1b", "\\x1b")
    if number % 4 == 2:
        return {"image": name, "error": "not a file, but a folder"}
    labels = [["cat", "dog"], ["one; two", "[three"], [], ["ä, left"]][number % 4]
    entries = [{"label": label, "index": index, "probability": 0.5} for index, label in enumerate(labels)]
    return {"image": name, "predictions": entries}


def classify(path, process=0, processes=1, files=FILES, **others):
    """Do what the command does, with known results."""
    output = Output(path, MADE_BY, {"model": "x"}, resume=True, process=process, processes=processes, **others)
    if not process:
        output.prepare()
    with output:
        is_done = output.make_filter()
        for start in range(0, len(files), BATCH):
            wanted = [(start + offset, file) for offset, file in enumerate(files[start : start + BATCH])]
            wanted = [(number, file) for number, file in wanted if not is_done(file)]
            if start // BATCH % processes == process and wanted:
                output.write([make_row(number, file) for number, file in wanted])
    return output


def classify_all(path, processes=1, **others):
    outputs = [classify(path, process, processes, **others) for process in range(processes)]
    outputs[0].join_parts(BATCH)
    return path


def read_rows(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path).to_pylist()
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


@pytest.mark.parametrize("suffix", EVERY)
def test_rows_are_complete_and_in_order_with_a_settings_file_beside(suffix, tmp_path):
    path = classify_all(tmp_path / f"tags{suffix}")
    expected = [make_row(*pair) for pair in enumerate(FILES)]
    rows = read_rows(path)
    assert [row["image"] for row in rows] == [row["image"] for row in expected]
    if suffix == ".csv":
        assert rows[0] == {"image": "photos/a.jpg", "labels": "cat;dog", "probabilities": "0.5;0.5", "error": ""}
        assert (rows[1]["labels"], rows[2]["error"]) == ('["one; two", "[three"]', "not a file, but a folder")
    else:
        assert rows == expected
    assert sorted(os.listdir(tmp_path)) == [path.name, f"{path.name}.json"]
    note = json.loads((tmp_path / f"{path.name}.json").read_text())
    assert note == {"model": "x", "made_by": json.loads(json.dumps(MADE_BY))}


@pytest.mark.parametrize("suffix", EVERY)
@pytest.mark.parametrize("processes", [1, 2, 5])
def test_joined_parts_equal_the_file_of_one_process(suffix, processes, tmp_path):
    alone = classify_all(tmp_path / f"alone{suffix}")
    together = classify_all(tmp_path / f"together{suffix}", processes)
    assert together.read_bytes() == alone.read_bytes()
    assert len(os.listdir(tmp_path)) == 4


@pytest.mark.parametrize("suffix", EVERY)
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment_and_gone_on_with_the_file_is_the_same(suffix, processes, tmp_path):
    expected = classify_all(tmp_path / f"expected{suffix}", processes).read_bytes()
    moment = 0
    while run_killed(lambda: classify_all(tmp_path / f"{moment}{suffix}", processes), moment):  # noqa: B023
        assert classify_all(tmp_path / f"{moment}{suffix}", processes).read_bytes() == expected, moment
        moment += 1
    assert moment >= 2


@pytest.mark.parametrize("suffix", EVERY)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_killed_in_the_middle_of_a_line_and_gone_on_with_the_file_is_the_same(suffix, share, tmp_path):
    expected = classify_all(tmp_path / f"expected{suffix}").read_bytes()
    write, path = os.write, tmp_path / f"tags{suffix}"

    def be_killed():
        count = 0

        def write_and_die(descriptor, content):
            nonlocal count
            count += 1
            if count == 3:
                write(descriptor, content[: int(share * len(content))])
                os.kill(os.getpid(), signal.SIGKILL)
            return write(descriptor, content)

        os.write = write_and_die
        classify_all(path)

    assert run_killed(be_killed, 10**9)
    assert os.write is write
    assert classify_all(path).read_bytes() == expected


@pytest.mark.parametrize("suffix", EVERY)
def test_rows_are_as_long_as_all_labels_of_a_large_set(suffix, tmp_path):
    usual = csv.field_size_limit(131072)  # Python's own
    try:
        entries = [{"label": f"label {index}", "index": index, "probability": 1 / 3} for index in range(11221)]
        for _ in range(2):
            with Output(tmp_path / f"tags{suffix}", MADE_BY, resume=True) as output:
                output.prepare()
                if not output.done:
                    output.write([{"image": "a.jpg", "predictions": entries}])
        assert output.done == {"a.jpg": 1}
    finally:
        csv.field_size_limit(usual)


@pytest.mark.parametrize("suffix", EVERY)
def test_finished_files_are_skipped_and_new_ones_added(suffix, tmp_path):
    path = classify_all(tmp_path / f"tags{suffix}")
    before = path.read_bytes()
    output = classify(path)
    assert (output.done.total(), output.errors) == (len(FILES), 2)
    output.join_parts(BATCH)
    assert path.read_bytes() == before
    rows = read_rows(classify_all(path, 2, files=[Path("photos/0.jpg"), *FILES]))
    assert [row["image"] for row in rows] == [*(make_row(*pair)["image"] for pair in enumerate(FILES)), "photos/0.jpg"]


def test_csv_is_read_as_annotations(tmp_path):
    path = classify_all(tmp_path / "tags.csv", files=[Path("a.jpg"), Path("b.jpg")])
    text = path.read_text().replace("photos/", "")
    path.write_text(text)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).touch()
    annotations = read_annotations(path, ReadingOptions())
    assert [example.labels for example in annotations.examples] == [("cat", "dog"), ("[three", "one; two")]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_full_disk_leaves_whole_lines_and_is_named(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"tags{suffix}"
    expected = classify_all(tmp_path / f"expected{suffix}").read_bytes()
    write, room = os.write, [len(expected) // 2]

    def write_a_little(descriptor, content):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, content[: min(room[0], 7)])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", write_a_little)
    with pytest.raises(OSError, match="No space left on device") as caught:
        classify_all(path)
    assert caught.value.filename == str(path)
    assert expected.startswith(path.read_bytes())
    assert path.read_bytes().endswith(b"\n")
    monkeypatch.setattr(os, "write", write)
    assert classify_all(path).read_bytes() == expected


def test_a_limit_on_the_size_of_files_leaves_whole_lines(tmp_path):
    path = tmp_path / "tags.jsonl"
    expected = classify_all(tmp_path / "expected.jsonl").read_bytes()

    def be_limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        with pytest.raises(OSError, match="File too large"):
            classify_all(path)

    assert not run_killed(be_limited, 10**9)
    assert 0 < len(path.read_bytes()) <= 600
    assert classify_all(path).read_bytes() == expected


def open_again(path, made_by=MADE_BY, resume=True, processes=1):
    with Output(path, made_by, resume=resume, processes=processes):
        pass


@pytest.mark.parametrize("suffix", EVERY)
def test_nothing_is_overwritten(suffix, tmp_path):
    path = classify_all(tmp_path / f"tags{suffix}")
    for there in (path, path.with_name(f"{path.name}.json")):
        with pytest.raises(FileExistsError, match=f"{there.name} already exists; continue it with --resume"):
            open_again(path, resume=False)
        there.unlink()
    open_again(path, resume=False)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weights_sha256", "b", 'made with other settings: weights_sha256 "a", now "b"; name a new file'),
        ("threshold", 0.5, "threshold null, now 0.5"),
        ("preprocessing", {"input_size": (3, 9, 9)}, "input_size"),
        ("fast_jpeg", True, "fast_jpeg null, now true"),
    ],
)
def test_results_of_other_settings_are_refused(name, value, message, tmp_path):
    path = classify_all(tmp_path / "tags.jsonl")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        open_again(path, {**MADE_BY, name: value})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"made_by": 1}', None])
def test_results_without_a_settings_file_are_refused(content, tmp_path):
    path = classify_all(tmp_path / "tags.jsonl")
    note = path.with_name("tags.jsonl.json")
    note.unlink() if content is None else note.write_text(content)
    with pytest.raises(ValueError, match=r"to resume .*tags\.jsonl, its settings file .*tags\.jsonl\.json is needed"):
        open_again(path)


@pytest.mark.parametrize("suffix", EVERY)
def test_a_damaged_file_is_named(suffix, tmp_path):
    path = classify_all(tmp_path / f"tags{suffix}")
    content = path.read_bytes()
    wrong = {".jsonl": b"\xff\0" + content, ".csv": content + b'"a"b\xff,\n', ".parquet": content[:-2]}
    path.write_bytes(wrong[suffix])
    with pytest.raises(ValueError, match=rf"tags\{suffix} is damaged"):
        open_again(path)


def test_parts_of_another_number_of_processes_are_named(tmp_path):
    classify(tmp_path / "tags.jsonl", 0, 2)
    for processes in (1, 3):
        with pytest.raises(ValueError, match=r"tags\.0-of-2\.jsonl was written with another number of processes"):
            open_again(tmp_path / "tags.jsonl", processes=processes)


def test_parts_stay_until_all_are_there(tmp_path):
    output = classify(tmp_path / "tags.jsonl", 0, 2)
    with pytest.raises(ValueError, match=r"tags\.1-of-2\.jsonl is not on this machine"):
        output.join_parts(BATCH)
    assert (tmp_path / "tags.0-of-2.jsonl").exists()
    assert not (tmp_path / "tags.jsonl").exists()


def test_two_do_not_write_to_one_file(tmp_path):
    path = tmp_path / "tags.jsonl"
    classify_all(path)
    with Output(path, MADE_BY, resume=True), pytest.raises(ValueError, match="another process writes to"):
        open_again(path)
    open_again(path)


def test_paths_that_are_not_regular_files_are_refused(tmp_path):
    classify_all(tmp_path / "tags.jsonl").unlink()
    for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/full"), lambda path: path.symlink_to("no")):
        path = tmp_path / "tags.jsonl"
        make(path)
        with pytest.raises(ValueError, match="is not a regular file and cannot be resumed"):
            open_again(path)
        path.rmdir() if path.is_dir() else path.unlink()


def test_other_formats_and_a_missing_package_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"needs to end in one of \.jsonl, \.csv, \.parquet, got .*tags\.json"):
        open_again(tmp_path / "tags.json")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"\.parquet needs the package pyarrow.*\[parquet\]"):
        open_again(tmp_path / "tags.parquet")

import io
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import timm
import torch
from converting import save_checkpoint
from safetensors.torch import save_file

from timm_tresnet.conversion import read_checkpoint
from timm_tresnet.utils import archives
from timm_tresnet.utils.archives import SAFETENSORS, check_claims
from timm_tresnet.weights.loading import load_network

CLAIM = 2**26  # bytes, of a file of some 2**16
GLOBAL = b"\x80\x02cbuiltins\nbytearray\nJ" + struct.pack("<i", CLAIM) + b"\x85R."


def write_zip(path, *records, kind=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in records:
            archive.writestr(name, content)


def saved(tensors):
    """Records of torch.save."""
    content = io.BytesIO()
    torch.save(tensors, content)
    with zipfile.ZipFile(content) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def deflated(path):
    write_zip(path, *saved({"a": torch.zeros(CLAIM // 4)}))


def overlapping(path):
    """A central directory that names the same bytes again and again."""
    write_zip(path, ("a/data.pkl", pickle.dumps({}, 2)), ("a/data/0", bytes(2**20)), kind=zipfile.ZIP_STORED)
    data = path.read_bytes()
    start = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    end = data.index(b"PK\x05\x06")
    entries = b"".join(data[start:end].replace(b"a/data/0", b"a/data/%c" % number) for number in range(65, 165))
    tail = bytearray(data[end:])
    size = end - data.index(b"PK\x01\x02") - (end - start) + len(entries)
    tail[8:16] = struct.pack("<HHI", 101, 101, size)
    path.write_bytes(data[:start] + entries + bytes(tail))


def twice(path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_zip(path, ("a/data.pkl", pickle.dumps({}, 2)), ("a/data.pkl", GLOBAL), kind=zipfile.ZIP_STORED)


def behind_another(path):
    write_zip(path, *saved({"a": torch.zeros(3)}))
    path.write_bytes(b"PK\x03\x04" + bytes(30) + path.read_bytes())


def arrays(path):
    with path.open("wb") as file:
        np.savez_compressed(file, a=np.zeros(CLAIM // 8))


def pickled(content):
    return lambda path: path.write_bytes(content)


def in_zip(content):
    return lambda path: write_zip(path, ("a/data.pkl", content))


BOMBS = {  # how the file is made, and what is said of it
    "deflated_record": (deflated, r"its records declare \d+ bytes, more than 4 times the file.s \d+"),
    "overlapping_records": (overlapping, r"its records declare \d+ bytes"),
    "records_of_one_name": (twice, "two records have the same name"),
    "archive_behind_another": (behind_another, "damaged"),
    "npz": (arrays, "its records declare"),
    "zeros_out_of_a_number": (pickled(GLOBAL), "its pickle creates a bytearray"),
    "zeros_out_of_a_number_in_python_2": (pickled(GLOBAL.replace(b"builtins", b"__builtin__")), "creates a bytearray"),
    "zeros_out_of_a_number_in_a_zip": (in_zip(GLOBAL), "its pickle creates a bytearray"),
    "many_lists": (pickled(b"\x80\x02" + b"]" * 1000 + b"."), "more than 900 operations"),
    "number_of_an_object": (
        pickled(b"\x80\x02}r" + struct.pack("<I", 2**20) + b"."),
        "declares 1048576 objects after 2",
    ),
    "name_that_one_reader_alone_reads": (pickled(b"\x80\x02c\xc3\xa9\nx\n" + GLOBAL[2:]), "damaged file, or not"),
}


@pytest.mark.parametrize(("make", "said"), BOMBS.values(), ids=BOMBS)
def test_bomb_is_refused_before_torch_opens_it(make, said, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was opened"))
    monkeypatch.setattr(archives, "_MOST_OPERATIONS", 900)
    path = tmp_path / "a.pth"
    make(path)
    assert path.stat().st_size < 2**21
    with pytest.raises(ValueError, match=f"^cannot read {path}: .*{said}"):
        read_checkpoint(path)


def test_folder_with_a_bomb_is_refused_before_timm_opens_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was opened"))
    timm.models.save_for_hf(timm.create_model("test_tresnet"), tmp_path / "a", safe_serialization=True)
    (tmp_path / "a" / "model.safetensors").unlink()
    deflated(tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: its records declare"):
        load_network(f"local-dir:{tmp_path / 'a'}")


@pytest.mark.parametrize("length", [2**24 + 1, 2**33, 2**64 - 1])
def test_header_of_safetensors_is_bounded(length, tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length) + b"{")
        file.truncate(2**25)  # sparse
    with pytest.raises(ValueError, match=f"its header declares {length} bytes, at most {2**24} are possible"):
        check_claims(path)


@pytest.mark.parametrize("length", [0x180, 0x280, 0x480, 0x2580])
def test_safetensors_whose_first_byte_is_that_of_a_pickle_are_read(length, tmp_path):
    """The length of the header is a multiple of 8, so the first byte is 0x80 in one of 32 files."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(3.0)}, path, metadata={"note": ""})
    missing = length - struct.unpack("<Q", path.read_bytes()[:8])[0]
    save_file({"a": torch.arange(3.0)}, path, metadata={"note": "x" * missing})
    assert path.read_bytes()[:9] == struct.pack("<Q", length) + b"{"
    assert check_claims(path) == SAFETENSORS
    assert read_checkpoint(path)["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("compression", ["", "gz", "bz2", "xz"])
def test_other_archives_are_not_unpacked_at_all(compression, tmp_path, monkeypatch):
    monkeypatch.setattr(tarfile.TarFile, "extract", lambda *_, **__: pytest.fail("it was unpacked"))
    for name in ("storages", "\x80storages"):  # PyTorch's oldest form; and what begins like a pickle
        with tarfile.open(tmp_path / "a.tar", f"w:{compression}", encoding="latin-1") as archive:
            member = tarfile.TarInfo(name)
            member.size = 2**16
            archive.addfile(member, io.BytesIO(bytes(2**16)))
        with pytest.raises(ValueError, match=r"^cannot read .*a.tar: "):
            read_checkpoint(tmp_path / "a.tar")


@pytest.mark.parametrize("form", ["zip", "legacy", "deflated", "safetensors"])
def test_honest_files_pass(form, tensors, tmp_path):
    path = tmp_path / "a.pth"
    if form == "safetensors":
        save_file(tensors, path)
    elif form == "deflated":
        write_zip(path, *saved(tensors))
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    read = read_checkpoint(path)
    torch.testing.assert_close(dict(read), dict(tensors), rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(torch.serialization, "set_crc32_options"), reason="PyTorch 2.5 has no such setting")
def test_files_whose_checksums_pytorch_left_out_pass(tensors, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.testing.assert_close(dict(read_checkpoint(tmp_path / "a.pth")), dict(tensors), rtol=0, atol=0)


def test_a_wrong_checksum_of_the_pickle_is_damage(tensors, tmp_path):
    torch.save(tensors, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        (checksum,) = (record.CRC for record in archive.infolist() if record.filename.endswith("data.pkl"))
    content = (tmp_path / "a.pth").read_bytes()
    wrong = content.replace(struct.pack("<I", checksum), struct.pack("<I", checksum ^ 1))
    (tmp_path / "a.pth").write_bytes(wrong)
    with pytest.raises(ValueError, match="cannot read .*a.pth: damaged file"):
        read_checkpoint(tmp_path / "a.pth")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="not a file"):
        check_claims(tmp_path)


def test_checkpoint_of_a_training_passes(tmp_path, tensors):
    optimizer = torch.optim.Adam(torch.nn.Linear(3, 2).parameters())
    save_checkpoint({"state_dict": tensors, "optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "a.pth")
    assert check_claims(tmp_path / "a.pth") == archives.ZIP

import importlib
import os
import pickle
import random
import re
import shutil
import struct

import pytest
import reference
import timm
import torch
from converting import SMALL, save_checkpoint
from safetensors.torch import save_file

from timm_tresnet import convert_checkpoint
from timm_tresnet.conversion.reading import shorten_names


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_checkpoint_is_not_executed(legacy, tensors, tmp_path):
    marker = tmp_path / "executed"
    torch.save(
        {"model": tensors, "extra": Hostile(marker)}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy
    )
    with pytest.raises(ValueError, match="refused to read ") as caught:
        convert_checkpoint(tmp_path / "a.pth")
    assert str(caught.value) == (
        f"refused to read {tmp_path / 'a.pth'}: it needs code to be run, {os.mkdir.__module__}.mkdir, and weights need "
        "none. If you trust the file, load it with the code that wrote it and save only its state_dict"
    )
    assert not marker.exists()


def damage_header(data, claim):
    return struct.pack("<Q", claim(struct.unpack("<Q", data[:8])[0])) + data[8:]


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


CALLS = {
    "eval": Call(eval, "open('executed', 'w')"),
    "module": Call(shutil.copy, "a.pth", "executed"),
    "nested": Call(getattr, Call(importlib.import_module, "os"), "mkdir"),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_objects_beside_the_weights_are_not_run_but_named(call, legacy, tensors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": tensors, "extra": call}, "a.pth", _use_new_zipfile_serialization=not legacy)
    conversion = convert_checkpoint("a.pth")
    (note,) = (note for note in conversion.notes if note.startswith("not read and not run: "))
    assert call.call[0].__name__ in note
    assert os.listdir() == ["a.pth"]


def test_weights_inside_objects_are_refused(tmp_path):
    model = timm.create_model("test_tresnet")
    for name, content in (("whole.pth", model), ("inside.pth", {"model": model, "epoch": 7})):
        torch.save(content, tmp_path / name)
        with pytest.raises(
            ValueError, match=rf"refused to read .*{name}: it needs code to be run, timm_tresnet.models.network.TResNet"
        ):
            convert_checkpoint(tmp_path / name)


def test_files_that_ask_for_ever_more_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("timm_tresnet.conversion.reading._MOST_STAND_INS", 20)  # a file is read once for each
    kinds = [type(f"Kind{index}", (), {"__module__": __name__}) for index in range(30)]
    for kind in kinds:
        globals()[kind.__name__] = kind
    try:
        torch.save({"a": [kind() for kind in kinds]}, tmp_path / "a.pth")
    finally:
        for kind in kinds:
            del globals()[kind.__name__]
    with pytest.raises(ValueError, match="refused to read .*: it needs "):
        convert_checkpoint(tmp_path / "a.pth")


FOREIGN = "needs a file of torch.save or safetensors, got neither$"
DAMAGED = {  # and what is said of it
    "empty": (lambda data: b"", FOREIGN),
    "text": (lambda data: b"<html>403 Forbidden</html>", FOREIGN),
    "truncated": (lambda data: data[: len(data) // 2], r"damaged safetensors file: \w"),
    "header_cut": (lambda data: data[:100], r"damaged safetensors file: its header declares \d+ bytes"),
    "long_header": (lambda data: damage_header(data, lambda length: 10 * length), r"damaged safetensors file: \w"),
    "endless_header": (lambda data: damage_header(data, lambda length: 2**63), "damaged safetensors file: its header"),
    "no_json": (lambda data: data[:9] + b"\xff" * 50 + data[59:], r"damaged safetensors file: \w"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_safetensors_files_are_refused(damage, said, tensors, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"^cannot read {re.escape(str(path))}: {said}") as caught:
        convert_checkpoint(path)
    assert "None" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("length", [10, 1000, -1000])
def test_truncated_pickles_are_refused(length, legacy, tensors, tmp_path):
    torch.save(tensors, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:length])
    with pytest.raises(ValueError, match=r"cannot read .*a.pth: damaged file, or not written by torch.save"):
        convert_checkpoint(tmp_path / "a.pth")


def test_a_missing_file_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        convert_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_of_other_tools_are_refused(protocol, tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"body.conv1.0.weight": [1.0]}, protocol=protocol))
    with pytest.raises(ValueError, match=r"cannot read .*a.pth"):
        convert_checkpoint(tmp_path / "a.pth")


def convert_or_refuse(file, expected):
    """The weights, which then fit the network, or None, and then the error names the file."""
    try:
        weights = convert_checkpoint(file).state_dict
    except ValueError as caught:
        error = caught
    else:
        assert {n: t.shape for n, t in weights.items()} == {n: t.shape for n, t in expected.items()}
        return weights
    assert str(file) in str(error)
    return None


@pytest.fixture
def expected(tensors, tmp_path):
    return convert_checkpoint(save_checkpoint(tensors, tmp_path / "whole.pth")).state_dict


SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in range(2, 6))]


def mutate(data, generator):
    data = bytearray(data)
    kind = generator.choice(["flip", "zero", "cut", "insert", "swap"])
    position = generator.randrange(len(data))
    length = generator.randrange(1, 9)
    if kind == "flip":
        data[position] ^= 1 << generator.randrange(8)
    elif kind == "zero":
        data[position : position + length] = bytes(length)
    elif kind == "cut":
        del data[position : position + length]
    elif kind == "insert":
        data[position:position] = generator.randbytes(length)
    else:
        other = generator.randrange(len(data))
        data[position], data[other] = data[other], data[position]
    return bytes(data)


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_safetensors_headers_end_in_an_error_or_a_right_load(seed, tensors, expected, tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(tensors, file)
    whole = file.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    generator = random.Random(seed)
    refused = 0
    for case in range(90):
        head = mutate(whole[:8] if case % 10 == 0 else whole[:end], generator)
        file.write_bytes(head + whole[8 if case % 10 == 0 else end :])
        refused += convert_or_refuse(file, expected) is None
    assert refused > 45  # nearly every byte of a header matters


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_pickles_end_in_an_error_or_a_right_load(seed, expected, tmp_path):
    torch.manual_seed(0)
    tensors = reference.official_state_dict(**SMALL, counters=True)
    file = tmp_path / "a.pth"
    torch.save(tensors, file, _use_new_zipfile_serialization=bool(seed % 2))
    whole = file.read_bytes()
    generator = random.Random(seed)
    # The pickle is in front; in the legacy format, magic number and version come first.
    end = min(len(whole), 60_000)
    refused = 0
    for _ in range(60):
        file.write_bytes(mutate(whole[:end], generator) + whole[end:])
        refused += convert_or_refuse(file, expected) is None
    assert 0 < refused < 60


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_names_and_shapes_end_in_an_error_or_a_right_load(seed, tensors, expected, tmp_path):
    pytest.importorskip("safetensors", "0.7", "safetensors older than 0.7 cannot write complex numbers")
    file = tmp_path / "a.safetensors"
    generator = random.Random(seed)
    refused = 0
    for _ in range(60):
        changed = dict(tensors)
        for _ in range(generator.choice([1, 1, 2])):
            name = generator.choice(list(changed))
            tensor = changed.pop(name)
            kind = generator.choice(["drop", "rename", "block", "shape", "reshape", "dtype", "twice", "prefix"])
            if kind == "rename":
                name = mutate(name.encode(), generator).decode(errors="replace")
            elif kind == "block":
                name = name.replace(".0.", f".{generator.choice([1, 3, 50, 100, 10**9])}.", 1)
            elif kind == "shape":
                tensor = torch.zeros([generator.randrange(4) for _ in range(generator.randrange(5))])
            elif kind == "reshape":
                tensor = tensor.reshape(-1)
            elif kind == "dtype":
                tensor = tensor.to(generator.choice([torch.float16, torch.int32, torch.bool, torch.complex64]))
            elif kind == "twice":
                changed[f"module.{name}"] = tensor
            elif kind == "prefix":
                changed = {f"module.{other}": value for other, value in changed.items()}
            if kind != "drop":
                changed[name] = tensor.clone()
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, file)
        weights = convert_or_refuse(file, expected)
        if weights is None:
            refused += 1
        else:  # half precision is all that such a change can do to the numbers
            for name, tensor in weights.items():
                if not name.endswith("num_batches_tracked"):
                    torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
    assert 0 < refused < 60


def test_of_many_names_the_first_are_named():
    names = [f"n{index}" for index in range(21)]
    assert shorten_names(names[:20]) == ", ".join(names[:20])
    assert shorten_names(names) == f"{', '.join(names[:20])} and 1 more"
    assert shorten_names([]) == "nothing"
    assert shorten_names(["a" * 200, "b" * 201, "\n"]) == f"{'a' * 200}, {'b' * 200}..., \\n"

import os
import stat

import pytest
import timm
import torch
from safetensors.torch import load_file
from scripts import load_script


@pytest.fixture
def pack():
    return load_script("hub/test_tresnet/pack.py").pack


@pytest.fixture
def checkpoint(tmp_path):
    torch.save({"state_dict": timm.create_model("test_tresnet").state_dict()}, tmp_path / "last.pth.tar")
    return tmp_path / "last.pth.tar"


def test_weights_are_packed_in_half_precision_for_everyone_to_read(pack, checkpoint, tmp_path):
    output = tmp_path / "packed" / "weights.safetensors"
    pack(checkpoint, output)
    packed, weights = load_file(output), torch.load(checkpoint)["state_dict"]
    assert packed.keys() == weights.keys()
    for name, tensor in packed.items():
        assert tensor.dtype == (torch.float16 if weights[name].is_floating_point() else torch.int64)
        torch.testing.assert_close(tensor, weights[name].to(tensor.dtype), rtol=0, atol=0)
    assert os.listdir(output.parent) == ["weights.safetensors"]
    assert stat.S_IMODE(output.stat().st_mode) == 0o644


def test_weights_beyond_half_precision_leave_the_earlier_file(pack, checkpoint, tmp_path):
    weights = torch.load(checkpoint)["state_dict"]
    weights["head.fc.bias"][0] = 1e6
    torch.save({"state_dict": weights}, checkpoint)
    output = tmp_path / "weights.safetensors"
    output.write_text("earlier")
    with pytest.raises(RuntimeError, match="head.fc.bias of .* does not fit float16"):
        pack(checkpoint, output)
    assert output.read_text() == "earlier"
    assert sorted(os.listdir(tmp_path)) == ["last.pth.tar", "weights.safetensors"]

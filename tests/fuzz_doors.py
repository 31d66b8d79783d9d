"""The doors that tests/fuzz.py knocks at: how an input is made for each, and what is a right answer to it."""

import copy
import io
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import reference
import timm
import torch
from bad_servers import FAULTS, WHERE, Doors, find_disorder
from converting import SMALL
from hub_server import Fault, HubServer
from killing import run_killed
from PIL import Image
from publishing import direct_client, load_tools, make_insects
from safetensors.torch import load_file, save, save_file
from timm.models import save_for_hf

from timm_tresnet import ExportedModel, convert_checkpoint, export_model, write_folder
from timm_tresnet.cli import main as cli
from timm_tresnet.utils.images import SAMPLES

ANSWERED, REFUSED, SKIPPED = "answered", "refused in one sentence", "skipped and the others done"
WHOLE = "killed, whole or nothing left"
CAT = str(SAMPLES / "cat.jpg")
_ZOO: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 0.5, -0.5, 1e308, math.nan, math.inf, -math.inf, 2**31, 2**63, 10**30),
    *("", "x", "test_tresnet", "tresnet_m", "resnet50", "nan", "3", "\u0000", "\n---\n", "../../etc/passwd", "é" * 300),
    *([], [1], [1, 2, 3, 4], [None], ["a", "b"], [[]], {}, {"a": 1}, {"_target_": "os.system"}, [0] * 1000),
)


@dataclass
class Case:
    """An input.

    Args:
        run: gives it to a command and returns the exit status.
        judge: what kind of answer exit status, stdout and stderr are; raises an AssertionError if it is none.
        kept: files and folders to keep if it fails.
        note: what was done, in words.
    """

    run: Callable[[], int]
    judge: Callable[[int, str, str], str]
    kept: list[Path]
    note: str = ""


class Door:
    """Makes inputs, with what it needs in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder

    def make(self, draw: random.Random) -> Case:
        raise NotImplementedError


def judge_loading(status: int, out: str, err: str) -> str:
    """Of one model and one image."""
    if status == 0:
        assert not err, err
        (result,) = json.loads(out)
        assert result["predictions"]
        assert all(0 <= entry["probability"] <= 1 for entry in result["predictions"]), out
        return ANSWERED
    assert status == 2
    assert not out, out
    assert re.fullmatch(r"timm-tresnet: [^\n]+\n", err), err
    return REFUSED


class Configs(Door):
    """config.json of a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        arguments = {"num_classes": 10, "in_chans": 3, "negative_slope": 1e-3, "layers": [2, 2, 3, 1]}
        model = timm.create_model("test_tresnet", **arguments)
        labels = {"label_names": list("abcdefghij"), "label_descriptions": {"a": "an a"}}
        save_for_hf(model, folder / "model", model_args=arguments, model_config=labels, safe_serialization=True)
        self.good = (folder / "model" / "config.json").read_bytes()

    def make(self, draw: random.Random) -> Case:
        path = self.folder / "model" / "config.json"
        path.write_bytes(mutate_json(self.good, draw))
        words = ["classify", "--json", "--model", f"local-dir:{path.parent}", CAT]
        return Case(lambda: cli.main(words), judge_loading, [path])


class Artifacts(Door):
    """The JSON file beside an artifact."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.artifact = folder / "network.pt"
        export_model(timm.create_model("test_tresnet", pretrained=True).eval(), self.artifact, "torchscript")
        self.good = (folder / "network.pt.json").read_bytes()

    def make(self, draw: random.Random) -> Case:
        path = self.folder / "network.pt.json"
        path.write_bytes(mutate_json(self.good, draw))
        words = ["classify", "--json", "--engine", "torch", str(self.artifact), "--trust", CAT]
        return Case(lambda: cli.main(words), judge_loading, [path])


class Images(Door):
    """An image beside a good one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.good = []
        with Image.open(SAMPLES / "cat.jpg") as image:
            small = image.resize((70, 50))
        kinds = {
            "": ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"),
            "P": ("PNG", "GIF", "TIFF"),
            "CMYK": ("JPEG", "TIFF"),
        }
        kinds |= {
            "RGBA": ("PNG", "WEBP", "TIFF", "ICO", "TGA", "DDS"),
            "I;16": ("PNG", "TIFF"),
            "1": ("PNG", "TIFF", "XBM"),
        }
        kinds |= {"L": ("JPEG", "PNG", "PPM", "PCX", "SGI", "SPIDER", "IM", "ICNS", "EPS", "JPEG2000", "AVIF", "QOI")}
        for mode, formats in kinds.items():
            for name in formats:
                content = io.BytesIO()
                try:
                    (small.convert(mode) if mode else small).save(content, name)
                except (OSError, KeyError, ValueError):  # this build of Pillow does not write it
                    continue
                self.good.append((name, content.getvalue()))

    def make(self, draw: random.Random) -> Case:
        name, content = draw.choice(self.good)
        path = self.folder / f"image.{draw.choice((name.lower(), 'jpg', 'png', 'tif'))}"
        for old in self.folder.glob("image.*"):
            old.unlink()
        path.write_bytes(mutate_bytes(content, draw, draw.choice(self.good)[1]))
        words = ["classify", "--json", str(path), CAT]
        return Case(lambda: cli.main(words), self.judge, [path], name)

    def judge(self, status: int, out: str, err: str) -> str:
        mine, cat = json.loads(out)
        assert cat["predictions"][0]["label"] == "cat"
        if status == 0:
            assert not err, err
            assert all(0 <= entry["probability"] <= 1 for entry in mine["predictions"])
            return ANSWERED
        assert status == 1
        assert mine["error"]
        assert re.fullmatch(r"timm-tresnet: skipped [^\n]+\n", err), err
        return SKIPPED


class Checkpoints(Door):
    """A file of torch.save or safetensors beside a good one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.tensors = reference.official_state_dict(**SMALL, counters=True)
        torch.save(self.tensors, folder / "good.pth")
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / "good.safetensors")

    def make(self, draw: random.Random) -> Case:
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        path = self.folder / draw.choice(("bad.pth", "bad.safetensors"))
        for old in self.folder.glob("bad.*"):
            old.unlink()
        content = self.damage(path.suffix, draw)
        if draw.random() < 0.5:
            content = mutate_bytes(content, draw, (self.folder / f"good{path.suffix}").read_bytes())
        path.write_bytes(content)
        words = ["convert", str(path), str(self.folder / "good.pth"), "--output", str(out)]
        return Case(lambda: cli.main(words), self.judge, [path])

    def damage(self, suffix: str, draw: random.Random) -> bytes:
        """A file whose tensors, names or wrapping are wrong."""
        tensors: dict[Any, Any] = dict(self.tensors)
        for _ in range(draw.randrange(3)):
            name = draw.choice(list(tensors))
            tensor = tensors[name]
            damages: list[Callable[[], Any]] = [
                lambda tensor=tensor: tensor[..., None],
                lambda tensor=tensor: tensor.flatten(),
                lambda tensor=tensor: tensor * math.nan,
                lambda tensor=tensor: tensor.to(draw.choice((torch.float16, torch.int8, torch.bool, torch.float64))),
                lambda tensor=tensor: tensor[:0] if tensor.ndim else tensor,
            ]
            kind = draw.randrange(8)
            if kind < 5:
                tensors[name] = damages[kind]()
            elif kind == 5:
                del tensors[name]
            elif kind == 6:
                tensors[draw.choice(("module." + name, name.upper(), "", "x" * 500, "a.b.c"))] = tensors.pop(name)
            else:
                tensors[name] = tensors[draw.choice(list(tensors))]
        if suffix == ".safetensors":
            return save({str(name): tensor.contiguous().clone() for name, tensor in tensors.items()})
        if draw.random() < 0.3:
            tensors[draw.choice(list(tensors))] = draw.choice(_ZOO)
        wrappings: tuple[Any, ...] = (
            tensors,
            {"model": tensors},
            {"state_dict": {"model": tensors}},
            [tensors],
            {},
            None,
        )
        content = io.BytesIO()
        torch.save(draw.choices(wrappings, (8, 3, 1, 1, 1, 1))[0], content)
        return content.getvalue()

    def judge(self, status: int, out: str, err: str) -> str:
        assert all(re.fullmatch(r"timm-tresnet: \S.*", line) for line in err.splitlines()), err
        names = sorted(entry.name for entry in (self.folder / "out").iterdir())
        for name in names:
            assert len(list((self.folder / "out" / name).iterdir())) == 3, names
            json.loads((self.folder / "out" / name / "config.json").read_text())
        assert status == (0 if names == ["bad", "good"] else 1), (status, names)
        if status == 0:
            return ANSWERED
        assert names == ["good"], names
        assert len(err.splitlines()) == 1, err
        return SKIPPED


class Servers(Door):
    """Answers of a Hub to classify, verify and publish."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        hub, patch = HubServer().__enter__(), pytest.MonkeyPatch()  # both until this process ends
        direct_client(patch, hub, folder / "cache")
        huggingface_hub.utils.logging.set_verbosity_error()  # the client warns of each try
        for name in ("ETAG", "DOWNLOAD"):
            patch.setattr(f"huggingface_hub.constants.HF_HUB_{name}_TIMEOUT", 1)
        tools = load_tools(patch, hub)
        patch.setattr(tools["client"], "PATIENCE_S", 1)
        self.doors = Doors(hub, tools, make_insects(folder / "insects"))

    def make(self, draw: random.Random) -> Case:
        door = draw.choice(tuple(WHERE))
        request = draw.choice(WHERE[door])
        times = draw.choice((1, 2, -1, -1))
        if draw.random() < 0.5:
            name = draw.choice(tuple(FAULTS))
            fault = Fault(request, times=times, **FAULTS[name])
        else:
            name, seed = "mutated", draw.random()
            fault = Fault(request, times=times, change=lambda body: mutate_json(body, random.Random(seed)))
        repo_id, call = self.doors.prepare(door, fault)

        def judge(status: int, out: str, err: str) -> str:
            disorder = find_disorder(door, repo_id, status, out, err)
            assert not disorder, disorder
            if status == 0:
                return ANSWERED
            return SKIPPED if door == "verify" or "skipped" in err else REFUSED

        return Case(call, judge, [], f"{door}, {request}, {name}")


class Writers(Door):
    """Conversions and exports that are killed, each over what the one before has left."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.networks = {classes: timm.create_model("test_tresnet", num_classes=classes).eval() for classes in (3, 5)}
        self.conversions = {}
        for classes in self.networks:
            torch.save(reference.official_state_dict(**SMALL, num_classes=classes), folder / f"{classes}.pth")
            self.conversions[classes] = convert_checkpoint(folder / f"{classes}.pth")

    def make(self, draw: random.Random) -> Case:
        path = self.folder / "out" / draw.choice(("folder", "network.pt"))
        classes, moment = draw.choice((3, 5)), draw.randrange(16)

        def write() -> None:
            if path.suffix:
                export_model(self.networks[classes], path, "torchscript")
            else:
                write_folder(self.conversions[classes], path, overwrite=True)

        def judge(killed: int, out: str, err: str) -> str:
            if path.exists() and path.suffix:
                exported = ExportedModel(path, "torch", trust=True)
                expected = self.networks[exported.num_classes](torch.ones(1, 3, 64, 64))
                torch.testing.assert_close(exported(torch.ones(1, 3, 64, 64)), expected, rtol=1e-3, atol=1e-4)
            elif path.exists():
                held = json.loads((path / "config.json").read_text())["num_classes"]
                weights = load_file(path / "model.safetensors")
                torch.testing.assert_close(weights, self.conversions[held].state_dict, rtol=0, atol=0)
                assert f"| classes | {held} |" in (path / "README.md").read_text()
            if killed:
                return WHOLE
            left = [entry.name for entry in path.parent.iterdir() if entry.name.startswith(f".{path.name}-")]
            assert path.exists()
            assert not left, left
            return ANSWERED

        return Case(lambda: run_killed(write, moment), judge, [], f"{path.name}, {moment}")


DOORS = {  # with the share of inputs that each gets
    "configs": (Configs, 0.2),
    "images": (Images, 0.3),
    "checkpoints": (Checkpoints, 0.15),
    "artifacts' JSON": (Artifacts, 0.15),
    "servers' answers": (Servers, 0.15),
    "killed writers": (Writers, 0.05),
}


def mutate_json(content: bytes, draw: random.Random) -> bytes:
    """JSON with some values replaced, removed or moved; now and then nothing, or damaged bytes."""
    try:
        value = json.loads(content)
    except ValueError:
        return mutate_bytes(content, draw, content)
    for _ in range(draw.choice((0, 1, 1, 1, 1, 2, 4))):
        value = _mutate_value(value, draw)
    mutated = json.dumps(value).encode()
    return mutate_bytes(mutated, draw, content) if draw.random() < 0.15 else mutated


def _mutate_value(value: Any, draw: random.Random) -> Any:
    root = holder = [copy.deepcopy(value)]
    key: Any = 0
    while isinstance(holder[key], dict | list) and holder[key] and draw.random() < 0.85:
        holder = holder[key]
        key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
    kind = draw.randrange(5)
    if kind == 0 and holder is not root:
        del holder[key]
    elif kind == 1 and isinstance(holder[key], int | float):
        holder[key] *= draw.choice((-1, 0, 0.5, 2, 1000, 1e30))
    elif kind == 2 and isinstance(holder, dict):
        holder[draw.choice(("unknown", "checkpoint_path", "pretrained", "features_only", "dtype", ""))] = holder.pop(
            key
        )
    else:
        holder[key] = draw.choice(_ZOO)
    return root[0]


def mutate_bytes(content: bytes, draw: random.Random, other: bytes) -> bytes:
    """Bytes that are changed, cut, repeated, inserted, or taken from another file; most near the beginning."""
    data = bytearray(content)
    for _ in range(draw.choice((0, 1, 1, 1, 2, 8))):
        at = int(len(data) * draw.random() ** draw.choice((1, 3)))
        kind = draw.randrange(7)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at:at] = draw.randbytes(draw.choice((1, 4, 100)))
        elif kind == 2:
            data[at : at + 4] = draw.choice((b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\1\0"))
        elif kind == 3:
            data[at : at + draw.choice((1, 20, 2000))] = b""
        elif kind == 4:
            data[at:] = other[at:]
        elif data:
            data[min(at, len(data) - 1)] ^= 1 << draw.randrange(8)
    return bytes(data)

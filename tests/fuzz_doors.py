"""The doors (entry points) that tests/fuzz.py tries: how to make an input for each, and which answers are right."""

import argparse
import asyncio
import contextlib
import copy
import io
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Iterator
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
from tagged import WORDS, write_images
from timm.models import save_for_hf
from timm.utils import CheckpointSaver

from timm_tresnet import ExportedModel, convert_checkpoint, export_model, write_folder
from timm_tresnet.cli import main as cli
from timm_tresnet.demo import request_filter as gate
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


class RequestFilter:
    """Makes inputs; its files are in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder

    def make(self, draw: random.Random) -> Case:
        raise NotImplementedError


def judge_loading(status: int, out: str, err: str) -> str:
    """Of one model and one image."""
    if status == 0:
        assert re.fullmatch(r"(timm-tresnet: class names: [^\n]+\n)?", err), err
        (result,) = json.loads(out)
        assert result["predictions"]
        assert all(0 <= entry["probability"] <= 1 for entry in result["predictions"]), out
        return ANSWERED
    assert status == 2
    assert not out, out
    assert re.fullmatch(r"timm-tresnet: [^\n]+\n", err), err
    return REFUSED


class Configs(RequestFilter):
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


class Artifacts(RequestFilter):
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


class Images(RequestFilter):
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


class Checkpoints(RequestFilter):
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


class Servers(RequestFilter):
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


class Writers(RequestFilter):
    """Conversions and exports that are killed, each on top of the previous one's leftovers."""

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


class Annotated(RequestFilter):
    """Annotations of images, of every kind that train-tagger reads; it ends where the training would begin."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        patch = pytest.MonkeyPatch()  # until this process ends
        patch.setattr("timm_tresnet.tagging.training.train_network", lambda *arguments, **options: None)
        names, labels = ["a.png", "b/c.png", "ä, d.png"], ["cat", "a; b", "ä"]
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(folder / name)
        (folder / "link.png").symlink_to("/etc/hostname")
        coco = {
            "images": [{"id": number, "file_name": name, "width": 8} for number, name in enumerate(names)],
            "categories": [{"id": number + 1, "name": name} for number, name in enumerate(labels)],
            "annotations": [{"id": 9 + n, "image_id": n % 3, "category_id": n % 2 + 1} for n in range(5)],
        }
        rows = [{"file_name": name, "labels": labels[:2]} for name in names]
        self.good = {
            "json": json.dumps(coco).encode(),
            "jsonl": "\n".join(map(json.dumps, rows)).encode(),
            "csv": 'file,labels\na.png,cat;ä\nb/c.png,"[""a; b""]"\n"ä, d.png",cat\n'.encode(),
        }

    def make(self, draw: random.Random) -> Case:
        kind = draw.choice(tuple(self.good))
        content = self.good[kind]
        if kind == "json":
            content = mutate_json(content, draw)
        elif kind == "jsonl":
            lines = content.split(b"\n")
            at = draw.randrange(len(lines))
            lines[at] = mutate_json(lines[at], draw)
            content = b"\n".join(lines)
        else:
            content = mutate_bytes(content, draw, self.good[draw.choice(tuple(self.good))])
        if draw.random() < 0.2:
            name = draw.choice((b"/etc/hostname", b"../x.png", b"link.png", b"b/../../x", b"a.png\0", b"\x1b[2J.png"))
            content = content.replace(b"a.png", name)
        path = self.folder / f"bad.{kind}"
        path.write_bytes(content)
        flags = ("--skip-missing", "--skip-unknown", "--keep-empty", "--outside")
        words = [
            "train-tagger",
            str(path),
            "--output",
            str(self.folder / "out"),
            *draw.sample(flags, draw.randrange(3)),
        ]
        return Case(lambda: cli.main(words), judge_training, [path], " ".join(words[4:]))


class Resumed(RequestFilter):
    """last.ckpt of a training that is to go on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from timm_tresnet.tagging import resuming  # needs Lightning

        data = [write_images(folder / name, 8, seed) for seed, name in enumerate(("train", "val"))]
        self.words = ["train-tagger", str(data[0]), "--val", str(data[1]), *WORDS, "--epochs", "2"]
        self.words += ["--output", str(folder / "tagger"), "--resume"]
        save = resuming.AtomicCheckpoints.save_checkpoint

        def save_and_stop(self: Any, *arguments: Any, **options: Any) -> None:
            save(self, *arguments, **options)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resuming.AtomicCheckpoints, "save_checkpoint", save_and_stop)
            with contextlib.suppress(KeyboardInterrupt, SystemExit):
                cli.main(self.words)
        self.work = folder / "tagger.training"
        self.good = (self.work / "last.ckpt").read_bytes()
        self.run = (self.work / "run.json").read_bytes()

    def make(self, draw: random.Random) -> Case:
        shutil.rmtree(self.folder / "tagger", ignore_errors=True)
        path = self.work / "last.ckpt"
        (self.work / "run.json").write_bytes(mutate_json(self.run, draw) if draw.random() < 0.1 else self.run)
        content = self.good
        if draw.random() < 0.7:
            value = torch.load(io.BytesIO(content), weights_only=True)
            for _ in range(draw.choice((1, 1, 2))):
                value = _mutate_value(value, draw)
            changed = io.BytesIO()
            torch.save(value, changed)
            content = changed.getvalue()
        if draw.random() < 0.3:
            content = mutate_bytes(content, draw, self.run)
        path.write_bytes(content)
        return Case(lambda: cli.main(self.words), judge_training, [path])


def judge_training(status: int, out: str, err: str) -> str:
    """Judge a training: it succeeds, or explains in a sentence why not."""
    if status == 0:
        assert not err, err
        return ANSWERED
    assert status == 2
    assert re.fullmatch(r"timm-tresnet: cannot train: [^\n\x1b]+\n", err), err
    return REFUSED


class Payloads(RequestFilter):
    """Events of the demo's page, as a visitor's own program sends them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        file = {"path": "/tmp/gradio/1/a.jpg", "url": "http://127.0.0.1/x", "meta": {"_type": "gradio.FileData"}}
        event = {
            "data": [{**file, "size": 3, "orig_name": "a.jpg"}],
            "fn_index": 1,
            "session_hash": "x",
            "event_data": None,
        }
        self.good = json.dumps(event).encode()

    def make(self, draw: random.Random) -> Case:
        body = mutate_json(self.good, draw)
        if draw.random() < 0.5:
            address = draw.choice(
                (b"http://x/a", b"HTTP://x", b"\\u0068ttp://x", b"//x", b"file:///a", b"data:,a", b"")
            )
            body = body.replace(b"/tmp/gradio/1/a.jpg", address)
        path = draw.choice(("queue/join", "queue/join", "upload", "run/predict", "proxy=http://x", "cancel"))
        read: list[Any] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            read.append((await receive())["body"])
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def ask() -> int:
            answers: list[Any] = []

            async def receive() -> dict[str, Any]:
                return {"type": "http.request", "body": body, "more_body": False}

            async def send(message: Any) -> None:
                answers.append(message)

            scope = {"type": "http", "method": "POST", "path": f"/gradio_api/{path}", "headers": []}
            await gate.RequestFilter(app, 2**20, set)(scope, receive, send)
            return answers[0]["status"]

        def judge(status: int, out: str, err: str) -> str:
            if status != 200:
                assert status in (400, 404, 413)
                assert not read
                return REFUSED
            assert path in ("queue/join", "upload", "cancel")
            if path != "upload":
                assert all(
                    each.startswith("/") and each[1:2] != "/" for each in _find(json.loads(read[0] or "0"), "path")
                )
                assert not list(_find(json.loads(read[0] or "0"), "url"))
            return ANSWERED

        return Case(lambda: asyncio.run(ask()), judge, [], f"{path} {body!r}")


def _find(value: Any, name: str) -> Iterator[Any]:
    """Find the values of a name anywhere in a payload."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if key == name:
            yield each
        yield from _find(each, name)


class Runs(RequestFilter):
    """Folders that timm's train.py leaves: its checkpoints with arguments and optimizer, args.yaml, summary.csv."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        model = timm.create_model("test_tresnet", num_classes=3)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        model(torch.rand(2, 3, 32, 32)).sum().backward()
        optimizer.step()
        words = {"model": "test_tresnet", "num_classes": 3, "input_size": None, "img_size": 64, "mean": [0.0] * 3}
        words |= {"std": [1.0] * 3, "interpolation": "bilinear", "crop_pct": 0.9, "class_map": "", "data_dir": "/x"}
        saver = CheckpointSaver(
            model, optimizer, argparse.Namespace(**words), checkpoint_dir=str(folder), decreasing=False
        )
        saver.save_checkpoint(0, metric=50.0)
        (folder / "args.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in words.items()))
        (folder / "summary.csv").write_text("epoch,train_loss,eval_loss,eval_top1\n0,1.0,1.0,50.0\n")
        self.good = {path.name: path.read_bytes() for path in folder.iterdir()}

    def make(self, draw: random.Random) -> Case:
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        for name, content in self.good.items():
            (self.folder / name).write_bytes(content)
        name = draw.choice(("last.pth.tar", "last.pth.tar", "last.pth.tar", "args.yaml", "summary.csv"))
        content = self.good[name]
        if name == "last.pth.tar" and draw.random() < 0.7:
            with torch.serialization.safe_globals([argparse.Namespace]):
                value = torch.load(io.BytesIO(content), weights_only=True)
            if draw.random() < 0.6:
                words = vars(value["args"])
                words[draw.choice(list(words))] = draw.choice(_ZOO)
            else:
                value = _mutate_value(value, draw)
            changed = io.BytesIO()
            torch.save(value, changed)
            content = changed.getvalue()
        else:
            content = mutate_bytes(content, draw, self.good["summary.csv"])
        (self.folder / name).write_bytes(content)
        words = ["convert", str(self.folder / "last.pth.tar"), "--output", str(out)]
        return Case(lambda: cli.main(words), self.judge, [self.folder / name], name)

    def judge(self, status: int, out: str, err: str) -> str:
        assert not re.search(r"[\x00-\x09\x0b-\x1f]", out + err)
        assert all(re.fullmatch(r"timm-tresnet: \S.*", line) for line in err.splitlines()), err
        folder = self.folder / "out"
        if status == 0:
            assert sorted(entry.name for entry in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
            json.loads((folder / "config.json").read_text())
            return ANSWERED
        assert status == 1
        assert len(err.splitlines()) == 1, err
        assert not folder.exists()
        return REFUSED


DOORS = {  # with the share of inputs that each gets
    "configs": (Configs, 0.15),
    "images": (Images, 0.2),
    "checkpoints": (Checkpoints, 0.1),
    "artifacts' JSON": (Artifacts, 0.1),
    "servers' answers": (Servers, 0.1),
    "killed writers": (Writers, 0.03),
    "annotations": (Annotated, 0.12),
    "last.ckpt": (Resumed, 0.04),
    "demo's payloads": (Payloads, 0.1),
    "run folders": (Runs, 0.06),
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

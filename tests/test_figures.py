"""Numbers in README.md and docs/ agree with the files in benchmarks/results/ named beside them."""

import functools
import inspect
import json
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import timm

from timm_tresnet import TResNet
from timm_tresnet.bench.results import format_spread
from timm_tresnet.bench.sizes import count_size
from timm_tresnet.tresnet import default_cfgs
from timm_tresnet.variants import ARCHITECTURES, IMAGENET_TOP1
from timm_tresnet.weights.catalogue import load_catalogue

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILE = re.compile(r"benchmarks/results/([\w.]+\.json)")

ROWS = {  # a row's label in the tables -> its name in the files
    "ResNet-50": "resnet50",
    "ResNet-50, channels-last": "resnet50",
    "ResNet-50, compiled": "resnet50, compiled",
    "ResNet-50, compiled likewise": "resnet50, compiled",
    "timm's built-in": "built-in",
    "timm's built-in, channels-last": "built-in",
    "timm's built-in, NCHW": "built-in, NCHW",
    '`recompute="none"`': "none",
    '`recompute="activations"`': "activations",
    '`recompute="activations"`, the default': "activations",
    '`recompute="expansions"`': "expansions",
    "`set_grad_checkpointing()`": "checkpointing",
    "`set_grad_checkpointing()`, as it was": "checkpointing",
    "`freeze_batch_norm_2d`": "frozen-bn",
    "`--split-bn`": "split-bn",
    "budget 0.8": "0.8",
    "budget 0.5": "0.5",
    "budget 0.3": "0.3",
    "the whole body": "regions-body",
    "each stage": "regions-stages",
    "two blocks": "regions-pairs",
    "each block": "regions-blocks",
    "as they are": "activations",
    "ours, channels-last, not folded": "eager",
    "ours, `fold_batch_norms`": "folded",
    "ours, `optimize_for_inference`": "compiled",
    "ours, `optimize_for_inference`, bfloat16": "compiled, bfloat16",
    "ours, ONNX Runtime": "onnx",
    "ours, ONNX Runtime, int8": "onnx, int8",
    "ours, OpenVINO": "openvino",
    "ours, OpenVINO, int8": "openvino, int8",
    "ours, OpenVINO, bfloat16": "openvino, bfloat16",
    "float32": "float32",
    "ONNX Runtime, int8": "onnx, int8",
    "OpenVINO, int8": "openvino, int8",
}

CPUS = {"AVX-512": "Xeon", "AVX2": "EPYC"}  # what a header says of a CPU -> its name in the files


def _with_ratio(field: str) -> Callable[[dict[str, Any]], list[str]]:
    def texts(row: dict[str, Any]) -> list[str]:
        number = f"{row[f'{field}_mb']:.1f}"
        return [number, f"{number} ({row[f'{field}_ratio']:.2f}x)"]

    return texts


def _spread(field: str) -> Callable[[dict[str, Any]], list[str]]:
    def texts(row: dict[str, Any]) -> list[str]:
        if field not in row:
            return [f"{row['step_ratio']:.2f}x"] if "step_ratio" in row else []
        spread = format_spread(row[field])
        return [spread.split()[0] if spread.endswith("(1.00-1.00)") else spread]

    return texts


def _median(row: dict[str, Any]) -> list[str]:
    return [f"{statistics.median(row['ratios']):.2f}x"]


COMPILED = "compiled: "  # before a header whose column is of compiled networks

COLUMNS = {  # how a header begins -> what a cell may say of a row
    "kept for backward, MB an image": _with_ratio("kept"),
    "peak of a step, MB an image": _with_ratio("peak"),
    "step time": _spread("step_ratios"),
    "largest batch in 16 GB": lambda row: [str(row["largest_batch"])],
    "speed": _spread("ratios"),
    "of the convolution peak": lambda row: [f"{row['share_of_peak'] * 100:.0f} %"],
    "images/s": lambda row: [f"{statistics.median(row['images_per_s']):,.0f}"],
    "CPU": _median,
    "H100": _median,
    "top-1, %": lambda row: [f"{row['top1']:.2f}"],
    "same class as float32, %": lambda row: [f"{row['agreement']:.2f}"],
}


@functools.cache
def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def find_row(name: str, row: str, **fields: Any) -> dict[str, Any]:
    (found,) = (each for each in load(name)["rows"] if each["row"] == row and fields.items() <= each.items())
    return found


@dataclass
class Table:
    """A table of Markdown: cells as they stand, and the files that its section names."""

    place: str
    header: list[str]
    rows: list[list[str]]
    files: list[str]


def read_tables(page: Path) -> Iterator[Table]:
    for section in re.split(r"^#+ ", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        title = section.split("\n", 1)[0]
        for match in re.finditer(r"(?:^\|.*\n)+", section, re.MULTILINE):
            lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in match[0].splitlines()]
            files = list(dict.fromkeys(FILE.findall(section)))
            yield Table(f"{page.relative_to(ROOT)}, {title}", lines[0], lines[2:], files)


MEASURED = [
    table
    for page in (ROOT / "docs" / f"{name}.md" for name in ("training", "inference", "measurements"))
    for table in read_tables(page)
    if table.files and table.header[1] != "built-in" and table.header[0] not in ("data set", "learning rate", "files")
]


@pytest.mark.parametrize("table", MEASURED, ids=[f"{table.place}, {table.header[-1]}" for table in MEASURED])
def test_cells_are_what_the_files_say(table):
    for label, *cells in table.rows:
        batch = None
        for column, cell in zip(table.header[1:], cells, strict=True):
            header, name_of_row = column.removeprefix(COMPILED), ROWS[label]
            if header != column:
                name_of_row = "compiled" if name_of_row == "built-in" else f"compiled-{name_of_row}"
            texts = next((texts for beginning, texts in COLUMNS.items() if header.startswith(beginning)), None)
            assert texts, f"{table.place}: nobody knows what a column {header!r} is"
            batch = re.search(r"batch (\d+)", header) or batch
            rows = [
                row
                for name in table.files
                for row in load(name)["rows"]
                if row["row"] == name_of_row
                and ("GPU" in table.place or ("H100" in header) == bool(load(name)["hardware"]["gpu"]))
                and all(cpu in load(name)["hardware"]["cpu"] for has, cpu in CPUS.items() if has in header)
                and (not batch or row.get("batch_size", int(batch[1])) == int(batch[1]))
            ]
            if cell:
                allowed = {text for row in rows if _has(row, header) for text in texts(row)}
                assert cell in allowed, f"{table.place}: {label}, {header}: {cell} is none of {sorted(allowed)}"
            else:
                assert not any(_has(row, header) for row in rows), f"{table.place}: {label}, {header} is empty"


def _has(row: dict[str, Any], header: str) -> bool:
    """Whether a table's file has a row's number; files have different rows."""
    return header != "largest batch in 16 GB" or "largest_batch" in row


def test_cells_of_collections_are_what_the_file_says():
    (table,) = (table for table in read_tables(ROOT / "docs" / "measurements.md") if table.header[0] == "files")
    (name,) = table.files
    for cells, files in zip(table.rows, ("small files", "photographs of 12 megapixels"), strict=True):
        for row, cell in zip(("timm's inference.py", "classify", "classify --fast-jpeg"), cells[1:], strict=True):
            if not cell:
                assert files == "small files"
                continue
            found = find_row(name, row, files=files)
            speed = statistics.median(found["images"] / seconds for seconds in found["seconds"])
            assert cell == (f"{speed:,.0f}" if row.startswith("timm") else format_spread(found["ratios"])), row


def test_ratios_of_larger_variants_are_what_the_files_say():
    (table,) = (table for table in read_tables(ROOT / "docs" / "measurements.md") if table.header[1] == "built-in")
    assert len(table.rows) == len(table.files) == 3
    for label, *cells in table.rows:
        name = f"training_memory_{label.strip('`').removeprefix('tresnet_')}_epyc_3.json"
        assert name in table.files
        first, *others = (find_row(name, row) for row in ("built-in", "activations", "expansions", "checkpointing"))
        expected = [f"{first['kept_mb']:.1f}, {first['peak_mb']:.1f}"]
        assert cells == expected + [f"{row['kept_ratio']:.2f}x, {row['peak_ratio']:.2f}x" for row in others]


def test_scores_of_taggers_are_what_the_file_says():
    (table,) = (table for table in read_tables(ROOT / "docs" / "heads.md") if table.header[0] == "head, loss")
    heads = {"ML-Decoder": "ml_decoder", "linear": "linear"}
    losses = {"asymmetric loss": "asl", "binary cross-entropy": "bce"}
    (name,) = table.files
    assert len(table.rows) == len({row["row"] for row in load(name)["rows"]})
    for label, *cells in table.rows:
        head, loss = label.split(", ")
        runs = [row for row in load(name)["rows"] if row["row"] == f"{heads[head]}, {losses[loss]}"]
        scores = {metric: [run[metric] for run in runs] for metric in ("mAP", "CF1", "OF1")}
        least, most = min(scores["mAP"]), max(scores["mAP"])
        means = [f"{statistics.mean(scores[metric]):.2f}" for metric in ("mAP", "CF1", "OF1")]
        assert cells == [means[0], f"{statistics.stdev(scores['mAP']):.2f}", f"{least:.2f}-{most:.2f}", *means[1:]]
        assert len(runs) == 3


def test_accuracies_after_transfer_are_what_the_file_says():
    (table,) = (table for table in read_tables(ROOT / "docs" / "measurements.md") if table.header[0] == "data set")
    (name,) = table.files
    assert [header.split(":")[0] for header in table.header[2:]] == ["transfer", "scratch"]
    assert len(table.rows) == len({(row["data"], row["images_per_class"]) for row in load(name)["rows"]}) == 6
    data = {"MNIST": "mnist", "scikit-learn's digits": "digits"}
    for label, count, *cells in table.rows:
        for arm, cell in zip(("transfer", "scratch"), cells, strict=True):
            fields = {"row": arm, "data": data[label], "images_per_class": int(count)}
            runs = [row["top1"] for row in load(name)["rows"] if fields.items() <= row.items()]
            assert len(runs) == 3
            assert cell == f"{statistics.mean(runs):.2f} ({min(runs):.2f}-{max(runs):.2f})"


def test_learning_rates_of_transfer_are_the_best_of_those_tried():
    (table,) = (table for table in read_tables(ROOT / "docs" / "measurements.md") if table.header[0] == "learning rate")
    (name,) = table.files
    assert table.header[1:] == ["transfer: top-1, %", "scratch: top-1, %"]
    assert len(table.rows) == len({row["lr"] for row in load(name)["rows"]})
    for rate, *cells in table.rows:
        assert cells == [f"{find_row(name, arm, lr=float(rate))['top1']:.2f}" for arm in ("transfer", "scratch")]
    (final,) = (
        table.files[0] for table in read_tables(ROOT / "docs" / "measurements.md") if "data set" in table.header
    )
    for arm in ("transfer", "scratch"):
        tried = [row for row in load(name)["rows"] if row["row"] == arm]
        assert load(final)["settings"][f"{arm}_lr"] == [max(tried, key=lambda row: row["top1"])["lr"]]
    assert load(name)["settings"]["part"] == "validation"
    assert load(final)["settings"]["part"] == "test"


# ---- sentences


def _batch(row: str) -> int:
    return find_row("training_memory_m_float16_h200.json", row)["largest_batch"]


def _speed(row: str, reference: str) -> float:
    name = "inference_float16_h100.json"
    speeds = zip(find_row(name, row)["images_per_s"], find_row(name, reference)["images_per_s"], strict=True)
    return statistics.median(ours / theirs for ours, theirs in speeds)


def _peak(name: str, row: str) -> float:
    return find_row(name, row, batch_size=8)["peak_gflop_per_s"]


def _bfloat16_copies_mb() -> float:
    weights = timm.create_model("tresnet_m", device="meta").named_parameters()
    return sum(2 * weight.numel() for name, weight in weights if ".bn." not in name) / 1e6


def _bfloat16(row: str) -> float:
    file, copies_mb = "training_memory_m_bfloat16_96px_epyc_3.json", _bfloat16_copies_mb()
    ours, theirs = (16 * find_row(file, each)["kept_mb"] - copies_mb for each in (row, "built-in"))
    return ours / theirs


def _range(field: str) -> str:
    return format_spread(find_row("paper_tables_epyc_3.json", "tresnet_m")[field]).replace("x", "")


def _memory(row: str, field: str = "peak_ratio") -> float:
    return find_row("training_memory_m_epyc_8.json", row)[field]


def _average(images_per_class: int, name: str, field: str = "top1") -> float:
    return find_row(f"transfer_{name}_epyc_1.json", "transfer", images_per_class=images_per_class)[field]


_WORDS = {3: ("third", "three"), 6: ("sixth", "six")}


def _quotient(row: str, other: str) -> int:
    return round(_memory(row) / _memory(other))


def _acceptance() -> tuple[str, ...]:
    page = (ROOT / "tests" / "ACCEPTANCE.md").read_text(encoding="utf-8")
    return re.search(r"^(\d+) rows: (\d+) equal to the last bit", page, re.MULTILINE).groups()[::-1]


CLAIMS: dict[str, list[tuple[str, Callable[[], tuple[Any, ...]]]]] = {  # page -> sentences and their numbers
    "README.md": [
        ("a step peaks at {:.2f}x of timm's own", lambda: (_memory("activations"),)),
        (
            "{} images instead of {} in 16 GB of an H200, at {:.2f}x of the step time",
            lambda: (
                _batch("activations"),
                _batch("built-in"),
                statistics.median(find_row("training_memory_m_float16_h200.json", "activations")["step_ratios"]),
            ),
        ),
        ("{} of {} rows of their flags", _acceptance),
        (
            "{:.2f}x of timm's own on an H100 with `optimize_for_inference`",
            lambda: (statistics.median(find_row("inference_float16_h100.json", "compiled")["ratios"]),),
        ),
        (
            "int8 runs at {:.2f}x of timm's own float32 on a Xeon with AMX, at {:.2f}x on a CPU without int8",
            lambda: tuple(
                statistics.median(find_row(f"inference_{cpu}.json", "openvino, int8", batch_size=8)["ratios"])
                for cpu in ("xeon_1", "epyc_2")
            ),
        ),
        ("knows {} public weights", lambda: (len(load_catalogue()),)),
    ],
    "docs/training.md": [("peaks at a {} of ResNet-50's", lambda: _WORDS[_quotient("resnet50", "checkpointing")])],
    "docs/measurements.md": [
        (
            "{:.1f} and {:.1f} times ResNet-50's batch, {:.1f} and {:.1f} times the built-in's",
            lambda: tuple(
                _batch(ours) / _batch(theirs)
                for theirs in ("resnet50", "built-in")
                for ours in ("activations", "expansions")
            ),
        ),
        (
            "{:.2f} times ResNet-50's speed compiled, {:.2f} times eager",
            lambda: (_speed("compiled", "resnet50, compiled"), _speed("eager", "resnet50")),
        ),
        (
            "{:.0f} GFLOP/s in float32, {:.0f} in bfloat16, {:.0f} and {:.0f} in int8",
            lambda: (
                _peak("inference_epyc_2.json", "eager"),
                _peak("inference_epyc_2.json", "compiled, bfloat16"),
                _peak("inference_epyc_2_7bit.json", "onnx, int8"),
                _peak("inference_epyc_2.json", "openvino, int8"),
            ),
        ),
        (
            "{:.0f} GFLOP/s in float32, {:.0f} in bfloat16 and {:.0f} in int8",
            lambda: tuple(
                _peak("inference_xeon_1.json", row) for row in ("eager", "compiled, bfloat16", "openvino, int8")
            ),
        ),
        ("peaks at less than a {1} of ResNet-50's", lambda: (None, _WORDS[_quotient("resnet50", "expansions")][0])),
        ("bfloat16 copies, {:.0f} MB", lambda: (_bfloat16_copies_mb(),)),
        (
            '{:.2f}x with `"activations"`, {:.2f}x with `"expansions"` and {:.2f}x with checkpointing',
            lambda: tuple(_bfloat16(row) for row in ("activations", "expansions", "checkpointing")),
        ),
        ("{} in inference and {} in training", lambda: (_range("inference_ratios"), _range("train_ratios"))),
        (
            "150 steps: {:.2f} % without the warm-up, {:.2f} % with it, {:.2f} % with the last weights",
            lambda: (_average(10, "no_warmup"), _average(10, "warmup"), _average(10, "warmup", "top1_last")),
        ),
        (
            "750 steps: {:.2f} % without the warm-up, {:.2f} % with it, {:.2f} % with the last weights",
            lambda: (_average(50, "no_warmup"), _average(50, "warmup"), _average(50, "warmup", "top1_last")),
        ),
    ],
}
SENTENCES = [(page, *claim) for page, claims in CLAIMS.items() for claim in claims]


@pytest.mark.parametrize(("page", "sentence", "numbers"), SENTENCES, ids=[claim[1] for claim in SENTENCES])
def test_sentences_have_the_numbers_of_the_files(page, sentence, numbers):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    assert sentence.format(*numbers()) in text


def test_every_bullet_of_what_you_get_has_a_number_that_is_checked_here():
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## What you get")[1].split("\n## ")[0]
    bullets = [" ".join(bullet.split()) for bullet in text.split("\n- ")[1:]]
    patterns = [re.sub(r"\\{.*?\\}", r"[\\d.]+", re.escape(sentence)) for sentence, _ in CLAIMS["README.md"]]
    # counted below, by tests/conftest.py and by tests/test_recipes.py
    others = [r"21 of them", r"4 heads", r"with 2 processes", r"10 recipes"]
    assert bullets
    for bullet in bullets:
        assert any(re.search(pattern, bullet) for pattern in patterns + others), bullet


def test_ingredients_are_as_many_as_the_table_has_arguments():
    (table,) = (table for table in read_tables(ROOT / "docs" / "start.md") if table.header[0] == "argument")
    names = [name for row in table.rows for name in re.findall(r"`(\w+)`", row[0])]
    assert len(names) == len(set(names)) == 21
    assert set(names) <= set(inspect.signature(TResNet).parameters)
    (heads,) = (table for table in read_tables(ROOT / "docs" / "heads.md") if table.header[0] == "`head`")
    assert len(heads.rows) == 4


# ---- variants and weights


def format_variant(name):
    """A variant's line in docs/models.md, from its row."""
    row = ARCHITECTURES[name]
    params, macs = count_size(row, 224, 1000)
    blocks = ", ".join(map(str, row["layers"])) + (
        ", bottlenecks throughout" if row.get("v2") or "block" in row else ""
    )
    blocks += ", FReLU" if row.get("act_layer") == "frelu" else ""
    return f"| `{name}` | {blocks} | {row.get('width_factor', 1.0)} | {params / 1e6:.1f} M | {macs / 1e9:.1f} |"


def test_variants_are_those_of_the_rows():
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    (table,) = (table for table in read_tables(ROOT / "docs" / "models.md") if table.header[1] == "blocks per stage")
    lines = [f"| {' | '.join(row)} |" for row in table.rows]
    assert lines == [format_variant(name) for name in ARCHITECTURES if name != "test_tresnet"]
    params, _ = count_size(ARCHITECTURES["test_tresnet"], 64, 10)
    assert f"has {params / 1e6:.2f} M parameters, ten classes" in text


def test_weights_are_those_of_the_registry():
    (table,) = (table for table in read_tables(ROOT / "docs" / "models.md") if table.header[-1] == "ImageNet-1k top-1")
    found = {}
    for label, *cells in table.rows:
        found[re.match(r"`(.+)`", label)[1]] = ["(default)" in label, *cells]
    expected = {}
    for architecture, configs in default_cfgs.items():
        for tag, config in configs.cfgs.items():
            name = f"{architecture}.{tag}"
            if config.hf_hub_id == "timm/":
                top1 = f"{IMAGENET_TOP1[name]:.2f}" if name in IMAGENET_TOP1 else ""
                default = tag == configs.tags[0]
                expected[name] = [default, str(config.num_classes), str(config.input_size[-1]), top1]
    assert found == expected


# ---- files and pictures


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_commands_are_those_of_the_files_that_they_made(page):
    text = " ".join(page.read_text(encoding="utf-8").split())
    for command in re.findall(r"`(python benchmarks/[^`]*--json [^`]*)`", text):
        (name,) = FILE.findall(command)
        assert load(name)["command"] == command
    for name in FILE.findall(text):
        assert (RESULTS / name).is_file(), f"{page}: there is no {name}"


def test_readme_shows_the_picture_of_its_files():
    described = []
    for name in ("readme_memory.svg", "readme_memory_dark.svg"):
        root = ElementTree.parse(RESULTS / name).getroot()
        described += [element.text for element in root.iter("{http://purl.org/dc/elements/1.1/}description")]
    light, dark = map(json.loads, described)
    assert light == dark
    for row, peaks in light["peak_gb"].items():
        assert len(peaks) == len(light["files"])
        for name in light["files"]:
            batch = load(name)["settings"]["batch_size"]
            assert peaks[str(batch)] == round(find_row(name, row)["peak_mb"] * batch / 1e3, 3)

"""notebooks/fine_tune.ipynb: its form, and a run of all cells with small data."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from timm_tresnet.utils.images import SAMPLES, read_image

NEEDED = ("ipykernel", "nbclient", "nbformat", "onnx", "onnxruntime", "onnxscript")
pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, NEEDED)), reason="needs pip install '.[notebook,export]'"
)
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "fine_tune.ipynb"


@pytest.fixture
def notebook():
    import nbformat

    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture
def photographs(tmp_path):
    """Crops of two photographs, in class folders."""
    for index, name in enumerate(("cat", "horse")):
        image = read_image(SAMPLES / f"{name}.jpg")
        for split, start, count in (("train", 0, 12), ("val", 12, 6)):
            folder = tmp_path / "photographs" / split / name
            folder.mkdir(parents=True)
            for number in range(start, start + count):
                left, top = 13 * number % (image.width - 140), (7 * number + index) % (image.height - 140)
                crop = image.crop((left, top, left + 140, top + 140))
                crop.resize((96, 96), Image.Resampling.BILINEAR).save(folder / f"{number:02}.png")
    return tmp_path / "photographs"


def run(notebook, folder, **parameters):
    """Run every cell in a fresh kernel with other parameters; return the output of each by its id."""
    from nbclient import NotebookClient

    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    for name in parameters:
        assert re.search(rf"\b{name}\b", cell.source)
    cell.source += "".join(f"\n{name} = {value}" for name, value in parameters.items())
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return {
        cell.id: "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # Jupyter's
def test_notebook_fine_tunes_classifies_and_exports(notebook, photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    printed = run(
        notebook, tmp_path, MODEL="'test_tresnet'", DATA=f"Path({str(photographs)!r})", EPOCHS=3, BATCH_SIZE=8
    )
    assert printed["install"] == ""
    assert printed["download"] == "2 classes: cat, horse\n"
    assert printed["model"].startswith("timm_tresnet.models.network, 0.7 M parameters\n24 photographs to train on, 12 ")
    ratios = [float(ratio) for ratio in re.findall(r"MB an image  ([\d.]+)x", printed["memory"])]
    assert ratios[0] == 1
    assert 0.6 > ratios[1] > ratios[2]
    accuracies = re.findall(r"epoch \d: loss [\d.]+, accuracy ([\d.]+)%", printed["train"])
    assert len(accuracies) == 3
    assert float(accuracies[-1]) > 90
    for table in (printed["save"], printed["export"]):
        for name in ("cat", "horse"):
            assert re.search(rf"val/{name}/12\.png +(?:[\d.]+% +\S+ +)?{name}\b", table), table
    assert "logits equal PyTorch's" in printed["export"]
    assert (tmp_path / "tuned" / "model.safetensors").exists()
    assert (tmp_path / "tuned.onnx").exists()


def test_notebook_is_kept_without_outputs_and_installs_what_it_needs(notebook):
    import nbformat

    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert "%pip install -q '{source}[export]'" in notebook.cells[1].source
    assert notebook.metadata["colab"]["name"] == NOTEBOOK.name
    assert notebook.metadata["kernelspec"]["name"] == "python3"

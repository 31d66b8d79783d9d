"""The demo, a page of Gradio: drop a photograph, see what networks find on it and where. Needs the extra `demo`."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio
import timm.models

from timm_tresnet.demo.explanation import Explanation, explain_image
from timm_tresnet.utils.images import FORMATS, SAMPLES, find_images, read_image
from timm_tresnet.weights.loading import load_network
from timm_tresnet.weights.preprocessing import explain_assumed

_LARGEST_FILE = "20mb"
_KEPT_S = 3600  # how long a photograph stays on the server, and how often that is looked after
_WAITING = 20  # photographs; more are refused
_LABELS = 5
_NARROWEST = 260  # pixels of a column, before it moves below its neighbour
_NONE = "nothing"
_LOADED = 3  # networks at once

_ABOUT = """# TResNet, side by side
Drop a photograph, choose weights, and see what the network finds, where
([Grad-CAM](https://arxiv.org/abs/1610.02391)) and how long it takes. The models in the package, called `test_…`, are
tiny and know a few classes."""


def list_weights() -> tuple[list[str], list[str]]:
    """Names of the weights that load without being converted: in the package, a variant's own first; on the Hub."""
    configs = {
        name: timm.models.get_pretrained_cfg(name) for name in timm.list_models(module="tresnet", pretrained=True)
    }
    embedded = [name for name, config in configs.items() if config.file]
    embedded.sort(key=lambda name: timm.models.get_pretrained_cfg(name.partition(".")[0]).tag != configs[name].tag)
    return embedded, [name for name, config in configs.items() if config.hf_hub_id and name not in embedded]


def build_demo(weights: Sequence[str], beside: str | None = None) -> gradio.Blocks:
    """Build the page.

    Strangers' files go through `timm_tresnet.utils.images.read_image`, their choice of weights is one of the list, and
    nothing is sent elsewhere: no analytics, no fonts of others.

    Args:
        weights: names to choose from, as `weights.loading.load_network` takes them; the first is chosen at first.
        beside: which of them is chosen for the second column; None for none.

    Returns:
        The page, to be served by `serve_demo`.
    """
    folders = sorted(SAMPLES.parent.iterdir(), key=lambda folder: folder != SAMPLES)  # of every model in the package
    samples = [str(path) for path in find_images(folders)]
    keeping = (_KEPT_S, _KEPT_S)
    with gradio.Blocks(title="TResNet", analytics_enabled=False, delete_cache=keeping, fill_width=True) as page:
        gradio.Markdown(_ABOUT)
        shown = gradio.State()  # path of the photograph, in the server
        with gradio.Row():
            with gradio.Column(scale=2, min_width=_NARROWEST):
                suffixes = [suffix for suffixes in FORMATS.values() for suffix in suffixes]
                photograph = gradio.File(label="Photograph", file_types=suffixes, height=140, elem_id="photograph")
                thumbnails = gradio.Dataset(
                    label="Or one of these",
                    components=[gradio.Image(render=False)],
                    samples=[[path] for path in samples],
                    type="index",
                    elem_id="samples",
                )
                first = gradio.Dropdown(list(weights), value=weights[0], label="Weights", elem_id="first")
                second = gradio.Dropdown(
                    [_NONE, *weights], value=beside or _NONE, label="Beside them", elem_id="second"
                )
                message = gradio.Markdown(visible=False, elem_id="message")
            columns = [_add_column(name) for name in ("first", "second")]
        outputs = [message, *(part for column in columns for part in column)]
        settings: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "networks", "concurrency_limit": 1}
        chosen = [shown, first, second]
        photograph.upload(lambda path: path, photograph, shown, api_visibility="private")
        photograph.clear(lambda: None, None, shown, api_visibility="private")
        thumbnails.click(
            lambda index: (samples[index], None), thumbnails, [shown, photograph], api_visibility="private"
        )
        for changed in (shown, first, second):
            changed.change(_show, chosen, outputs, **settings)
    return page.queue(max_size=_WAITING, api_open=False)


def serve_demo(page: gradio.Blocks, host: str | None = None, port: int | None = None) -> None:
    """Serve the page until the process is interrupted, and say where.

    Args:
        page: from `build_demo`.
        host: address to listen at; None for what GRADIO_SERVER_NAME says, as on a Space, else loopback.
        port: None for what GRADIO_SERVER_PORT says, else the first free one from 7860 on.

    Raises:
        OSError: if there is no such address, or the port is taken.
    """
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # that nobody fetches
        share=False,
        ssr_mode=False,
        max_file_size=_LARGEST_FILE,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"The demo is at {url} until this is interrupted (Ctrl-C).", flush=True)
    page.block_thread()


def _add_column(name: str) -> list[Any]:
    with gradio.Column(scale=3, min_width=_NARROWEST, visible=False, elem_id=f"{name}-column") as column:
        note = gradio.Markdown(elem_id=f"{name}-note")
        picture = gradio.Image(show_label=False, interactive=False, buttons=[], elem_id=f"{name}-picture")
        labels = gradio.Label(show_label=False, num_top_classes=_LABELS, elem_id=f"{name}-labels")
    return [column, note, picture, labels]


_load = functools.lru_cache(maxsize=_LOADED)(load_network)


def _show(path: str | None, *names: str) -> list[Any]:
    """What the message and the columns become."""
    hidden = [gradio.update(visible=False), "", None, None]
    if path is None:
        return [gradio.update(visible=False), *hidden * len(names)]
    try:
        image = read_image(Path(path))
    except ValueError as error:
        message = gradio.update(value=f"**This file cannot be shown to a network:** {error}", visible=True)
        return [message, *hidden * len(names)]
    columns = [hidden if name == _NONE else _fill_column(name, image) for name in names]
    return [gradio.update(visible=False), *(part for column in columns for part in column)]


def _fill_column(name: str, image: Any) -> list[Any]:
    try:
        explanation = explain_image(_load(name), image, _LABELS)
    except ValueError as error:
        absent = gradio.update(value=None, visible=False)
        return [gradio.update(visible=True), f"### {name}\n{error}", absent, absent]
    return [
        gradio.update(visible=True),
        _describe(name, explanation),
        gradio.update(value=explanation.heat_map, visible=True),
        gradio.update(value=explanation.probabilities, visible=True),
    ]


def _describe(name: str, explanation: Explanation) -> str:
    rows, columns = explanation.cells
    assumed = explain_assumed(_load(name))
    return (
        f"### {name}\n{explanation.classify_ms:.0f} ms for the network, {explanation.explain_ms:.0f} ms for the heat "
        f"map: where “{next(iter(explanation.probabilities))}” is, {rows}×{columns} cells."
        + (f"\n\n{assumed}" if assumed else "")
    )

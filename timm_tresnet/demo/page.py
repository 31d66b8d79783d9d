"""The demo, a Gradio page: drop a photograph, compare what networks see in it and where. Needs the extra `demo`."""

import asyncio
import contextlib
import html
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio
import timm.models
from huggingface_hub import constants
from PIL import Image
from starlette.middleware import Middleware

from timm_tresnet.demo.explanation import Explanation, explain_image
from timm_tresnet.demo.networks import Networks
from timm_tresnet.demo.request_filter import RequestFilter
from timm_tresnet.utils.images import FORMATS, SAMPLES, find_images, read_image
from timm_tresnet.weights.loading import load_network
from timm_tresnet.weights.preprocessing import explain_assumed

_LARGEST_FILE = 20 * 10**6  # bytes
_LARGEST_PIXELS = 2**28  # bytes of a photograph's pixels in memory: 64 megapixels in colour
_FORM = 2**14  # bytes of the form around an uploaded file
_KEPT_S = 3600  # how long a photograph stays on the server, and the interval of its removal
_WAITING = 20  # events in the queue; more are refused
_PATIENCE_S = 60  # for one event
_POLL_S = 2  # interval of asking for weights that are loading
_LABELS = 5
_PREVIEW = (480, 480)  # pixels
_NARROWEST = 260  # pixels; a narrower column moves below its neighbour
_NONE = "nothing"

_ABOUT = """# TResNet, side by side
Drop a photograph, choose weights, and see what the network finds, where
([Grad-CAM](https://arxiv.org/abs/1610.02391)) and how long it takes. The models in the package, called `test_…`, are
tiny and know only a few classes."""
_BAR = (
    '<div style="margin:.35em 0"><div style="display:flex;justify-content:space-between">'
    "<span>{name}</span><span>{probability:.0%}</span></div>"
    '<div style="height:.4em;background:var(--border-color-primary)">'
    '<div style="height:100%;width:{probability:.1%};background:var(--color-accent)"></div></div></div>'
)
_CHIP = (
    '<span style="display:inline-block;padding:.15em .7em;margin:.15em .3em .15em 0;border-radius:1em;{style}">{name} '
    '<small style="opacity:.8">{probability:.0%}</small></span>'
)
_TAG = "background:var(--color-accent);color:white"
_CLOSE = "border:1px solid var(--border-color-primary);opacity:.6"  # below its threshold


def list_weights() -> tuple[list[str], list[str]]:
    """Return names of weights that load without conversion: those in the package, default tags first; on the Hub."""
    look_up: Callable[[str], Any] = timm.models.get_pretrained_cfg
    configs = {name: look_up(name) for name in timm.list_models(module="tresnet", pretrained=True)}
    embedded = [name for name, config in configs.items() if config.file]
    embedded.sort(key=lambda name: look_up(name.partition(".")[0]).tag != configs[name].tag)
    return embedded, [name for name, config in configs.items() if config.hf_hub_id and name not in embedded]


def build_demo(weights: Sequence[str], beside: str | None = None, keep_ratio: bool = False) -> gradio.Blocks:
    """Build the page.

    Uploaded files are read by `timm_tresnet.utils.images.read_image`, and weights can only be chosen from the list.
    The page sends nothing to third parties: no analytics, no external fonts. No event waits for a download; the page
    asks again.

    Args:
        weights: names to choose from, see `weights.loading.load_network`; the first is preselected.
        beside: the name preselected for the second column; None for none.
        keep_ratio: show networks whole photographs in their aspect ratio.

    Returns:
        The page, for `serve_demo`.
    """
    folders = sorted(SAMPLES.parent.iterdir(), key=lambda folder: folder != SAMPLES)  # of all models
    samples = [str(path) for path in find_images(folders)]
    keeping = (_KEPT_S, _KEPT_S)
    explain = _Explainer(Networks(load_network), keep_ratio).explain
    with gradio.Blocks(title="TResNet", analytics_enabled=False, delete_cache=keeping, fill_width=True) as page:
        gradio.Markdown(_ABOUT)
        shown = gradio.State()  # path of the photograph, in the server
        with gradio.Row():
            with gradio.Column(scale=2, min_width=_NARROWEST):
                suffixes = [suffix for suffixes in FORMATS.values() for suffix in suffixes]
                photograph = gradio.File(label="Photograph", file_types=suffixes, height=140, elem_id="photograph")
                preview = gradio.Image(
                    show_label=False, interactive=False, buttons=[], visible=False, elem_id="preview"
                )
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
            columns = [(choice, *_add_column(name)) for choice, name in ((first, "first"), (second, "second"))]
        # One event at a time, so that each has all of the machine's memory and cores.
        settings: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "networks", "concurrency_limit": 1}
        taken = [shown, preview, message]
        photograph.upload(_read_photograph, photograph, taken, **settings)
        photograph.clear(lambda: _clear_photograph(), None, taken, api_visibility="private")

        async def take_sample(index: int) -> list[Any]:
            return [*await _read_photograph(samples[index]), None]

        thumbnails.click(take_sample, thumbnails, [*taken, photograph], **settings)
        for choice, timer, *parts in columns:
            for event in (shown.change, choice.change, timer.tick):
                event(explain, [shown, choice], [timer, *parts], **settings)
    return page.queue(max_size=_WAITING, api_open=False)


def serve_demo(page: gradio.Blocks, host: str | None = None, port: int | None = None) -> None:
    """Print the page's address and serve it until the process is interrupted.

    While it is served, the Hub login of this machine is disabled, so that visitors cannot use it.

    Args:
        page: from `build_demo`.
        host: address to listen on; None for GRADIO_SERVER_NAME (set on a Space), else loopback.
        port: port to listen on; None for GRADIO_SERVER_PORT, else the first free port from 7860 on.

    Raises:
        OSError: if the address does not exist or the port is in use.
    """
    request_filter = Middleware(RequestFilter, largest=_LARGEST_FILE + _FORM, uploaded=lambda: page.upload_file_set)
    with _without_login():
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # no download
            share=False,
            ssr_mode=False,
            max_file_size=_LARGEST_FILE,
            footer_links=[],
            run_history=False,
            app_kwargs={"middleware": [request_filter]},
            quiet=True,
            prevent_thread_lock=True,
        )
        print(f"The demo is at {url} until this is interrupted (Ctrl-C).", flush=True)
        page.block_thread()


@contextlib.contextmanager
def _without_login() -> Iterator[None]:
    """Hide the Hub's tokens, in the environment and in files, from its client."""
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE")
    environment = {name: os.environ.pop(name) for name in names if name in os.environ}
    before = constants.HF_TOKEN_PATH, constants.HF_HUB_DISABLE_IMPLICIT_TOKEN
    constants.HF_TOKEN_PATH, constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = os.devnull, True
    try:
        yield
    finally:
        constants.HF_TOKEN_PATH, constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = before
        os.environ.update(environment)


def _add_column(name: str) -> list[Any]:
    timer = gradio.Timer(_POLL_S, active=False)
    with gradio.Column(scale=3, min_width=_NARROWEST, visible=False, elem_id=f"{name}-column") as column:
        note = gradio.Markdown(elem_id=f"{name}-note")
        picture = gradio.Image(show_label=False, interactive=False, buttons=[], elem_id=f"{name}-picture")
        labels = gradio.HTML(elem_id=f"{name}-labels")
    return [timer, column, note, picture, labels]


def _read(path: str) -> Image.Image:
    return read_image(Path(path), most_bytes=_LARGEST_PIXELS)


async def _read_photograph(path: str | None) -> list[Any]:
    """Return the updates of state, preview and message for a photograph."""
    if path is None:
        return _clear_photograph()
    try:
        image = await _run_with_timeout(_read, path)
    except ValueError as error:
        said = f"**This file cannot be shown to a network:** {html.escape(str(error))}"
        return [None, gradio.update(value=None, visible=False), gradio.update(value=said, visible=True)]
    image.thumbnail(_PREVIEW)
    return [path, gradio.update(value=image, visible=True), gradio.update(visible=False)]


def _clear_photograph() -> list[Any]:
    return [None, gradio.update(value=None, visible=False), gradio.update(visible=False)]


async def _run_with_timeout(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run work in a thread and return its result, or raise a ValueError if it takes too long."""
    try:
        return await asyncio.wait_for(asyncio.to_thread(work, *arguments), _PATIENCE_S)
    except TimeoutError as error:
        raise ValueError(f"it takes more than {_PATIENCE_S} seconds; try again later") from error


class _Explainer:
    """Fills a column of the page with an explanation."""

    def __init__(self, networks: Networks, keep_ratio: bool = False) -> None:
        self._networks, self._keep_ratio = networks, keep_ratio
        self._working = threading.Lock()  # also held by work that goes on after its event timed out

    async def explain(self, path: str | None, name: str) -> list[Any]:
        """Return the updates of the timer and the parts of the column."""
        if path is None or name == _NONE:
            return [gradio.Timer(active=False), gradio.update(visible=False), "", None, ""]
        try:
            network = self._networks.get(name)
            if network is None:
                return _make_updates(
                    f"### {name}\nThese weights are loading; the page updates by itself.", waiting=True
                )
            explanation = await _run_with_timeout(self._explain, network, path)
        except ValueError as error:
            return _make_updates(f"### {name}\n{html.escape(str(error))}")
        return _make_updates(_describe(name, network, explanation), explanation)

    def _explain(self, network: Any, path: str) -> Explanation:
        if not self._working.acquire(timeout=_PATIENCE_S):
            raise ValueError("the machine is busy; try again later")
        try:
            return explain_image(network, _read(path), _LABELS, self._keep_ratio)
        finally:
            self._working.release()


def _make_updates(note: str, explanation: Explanation | None = None, waiting: bool = False) -> list[Any]:
    there = explanation is not None
    return [
        gradio.Timer(active=waiting),
        gradio.update(visible=True),
        note,
        gradio.update(value=None if explanation is None else explanation.heat_map, visible=there),
        gradio.update(value="" if explanation is None else _draw_labels(explanation), visible=there),
    ]


def _draw_labels(explanation: Explanation) -> str:
    """Return HTML: bars of the classes or, for a tagger, chips of the tags."""
    if explanation.thresholds is not None:
        return _draw_tags(explanation)
    bars = explanation.probabilities.items()
    return "".join(_BAR.format(name=html.escape(name), probability=probability) for name, probability in bars)


def _draw_tags(explanation: Explanation) -> str:
    """Return chips of the tags that reach their thresholds, then of the most probable other tags."""
    tags = explanation.tags
    others = {name: value for name, value in explanation.probabilities.items() if name not in tags}
    said = "Below their thresholds:" if tags else "No tag reaches its threshold. The most probable tags:"
    return f"<div>{_draw_chips(tags, _TAG)}</div>" + (
        f'<div style="margin-top:.8em;font-size:.85em">{said}<br>{_draw_chips(others, _CLOSE)}</div>' if others else ""
    )


def _draw_chips(tags: dict[str, float], style: str) -> str:
    return "".join(
        _CHIP.format(name=html.escape(name), probability=probability, style=style) for name, probability in tags.items()
    )


def _describe(name: str, network: Any, explanation: Explanation) -> str:
    rows, columns = explanation.cells
    assumed = explain_assumed(network)
    return (
        f"### {name}\n{explanation.classify_ms:.0f} ms for the network, {explanation.explain_ms:.0f} ms for the heat "
        f"map of “{html.escape(next(iter(explanation.probabilities)))}”, {rows}×{columns} cells."
        + (f"\n\n{html.escape(assumed)}" if assumed else "")
    )

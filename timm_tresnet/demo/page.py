"""The demo, a page of Gradio: drop a photograph, see what networks find on it and where. Needs the extra `demo`."""

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

from timm_tresnet.demo.door import Door
from timm_tresnet.demo.explanation import Explanation, explain_image
from timm_tresnet.demo.networks import Networks
from timm_tresnet.utils.images import FORMATS, SAMPLES, find_images, read_image
from timm_tresnet.weights.loading import load_network
from timm_tresnet.weights.preprocessing import explain_assumed

_LARGEST_FILE = 20 * 10**6  # bytes
_LARGEST_PIXELS = 2**28  # bytes of a photograph's pixels in memory: 64 megapixels in colour
_FORM = 2**14  # bytes around an uploaded file
_KEPT_S = 3600  # how long a photograph stays on the server, and how often that is looked after
_WAITING = 20  # events; more are refused
_PATIENCE_S = 60  # for an event
_POLL_S = 2  # until weights have arrived
_LABELS = 5
_PREVIEW = (480, 480)  # pixels
_NARROWEST = 260  # pixels of a column, before it moves below its neighbour
_NONE = "nothing"

_ABOUT = """# TResNet, side by side
Drop a photograph, choose weights, and see what the network finds, where
([Grad-CAM](https://arxiv.org/abs/1610.02391)) and how long it takes. The models in the package, called `test_…`, are
tiny and know a few classes."""
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
    """Names of the weights that load without being converted: in the package, a variant's own first; on the Hub."""
    look_up: Callable[[str], Any] = timm.models.get_pretrained_cfg
    configs = {name: look_up(name) for name in timm.list_models(module="tresnet", pretrained=True)}
    embedded = [name for name, config in configs.items() if config.file]
    embedded.sort(key=lambda name: look_up(name.partition(".")[0]).tag != configs[name].tag)
    return embedded, [name for name, config in configs.items() if config.hf_hub_id and name not in embedded]


def build_demo(weights: Sequence[str], beside: str | None = None) -> gradio.Blocks:
    """Build the page.

    Strangers' files go through `timm_tresnet.utils.images.read_image`, their choice of weights is one of the list, and
    nothing is sent elsewhere: no analytics, no fonts of others. No event waits for a download: the page asks again.

    Args:
        weights: names to choose from, as `weights.loading.load_network` takes them; the first is chosen at first.
        beside: which of them is chosen for the second column; None for none.

    Returns:
        The page, to be served by `serve_demo`.
    """
    folders = sorted(SAMPLES.parent.iterdir(), key=lambda folder: folder != SAMPLES)  # of every model in the package
    samples = [str(path) for path in find_images(folders)]
    keeping = (_KEPT_S, _KEPT_S)
    show = _Shower(Networks(load_network)).show
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
        # One at a time: each is short, and has the machine's memory and cores.
        settings: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "networks", "concurrency_limit": 1}
        taken = [shown, preview, message]
        photograph.upload(_take, photograph, taken, **settings)
        photograph.clear(lambda: _take_none(), None, taken, api_visibility="private")

        async def take_sample(index: int) -> list[Any]:
            return [*await _take(samples[index]), None]

        thumbnails.click(take_sample, thumbnails, [*taken, photograph], **settings)
        for choice, timer, *parts in columns:
            for event in (shown.change, choice.change, timer.tick):
                event(show, [shown, choice], [timer, *parts], **settings)
    return page.queue(max_size=_WAITING, api_open=False)


def serve_demo(page: gradio.Blocks, host: str | None = None, port: int | None = None) -> None:
    """Serve the page until the process is interrupted, and say where.

    What visitors cause carries no login of the Hub's: that of this machine is not used while the page is served.

    Args:
        page: from `build_demo`.
        host: address to listen at; None for what GRADIO_SERVER_NAME says, as on a Space, else loopback.
        port: None for what GRADIO_SERVER_PORT says, else the first free one from 7860 on.

    Raises:
        OSError: if there is no such address, or the port is taken.
    """
    door = Middleware(Door, largest=_LARGEST_FILE + _FORM, uploaded=lambda: page.upload_file_set)
    with _without_login():
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # nobody fetches it
            share=False,
            ssr_mode=False,
            max_file_size=_LARGEST_FILE,
            footer_links=[],
            run_history=False,
            app_kwargs={"middleware": [door]},
            quiet=True,
            prevent_thread_lock=True,
        )
        print(f"The demo is at {url} until this is interrupted (Ctrl-C).", flush=True)
        page.block_thread()


@contextlib.contextmanager
def _without_login() -> Iterator[None]:
    """Have the Hub's client know no token: neither of the environment nor of a file."""
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


async def _take(path: str | None) -> list[Any]:
    """What a photograph makes of the state, its picture and the message."""
    if path is None:
        return _take_none()
    try:
        image = await _in_time(_read, path)
    except ValueError as error:
        said = f"**This file cannot be shown to a network:** {html.escape(str(error))}"
        return [None, gradio.update(value=None, visible=False), gradio.update(value=said, visible=True)]
    image.thumbnail(_PREVIEW)
    return [path, gradio.update(value=image, visible=True), gradio.update(visible=False)]


def _take_none() -> list[Any]:
    return [None, gradio.update(value=None, visible=False), gradio.update(visible=False)]


async def _in_time(work: Callable[..., Any], *arguments: Any) -> Any:
    """What comes of work in a thread, in time."""
    try:
        return await asyncio.wait_for(asyncio.to_thread(work, *arguments), _PATIENCE_S)
    except TimeoutError as error:
        raise ValueError(f"it takes more than {_PATIENCE_S} seconds; try again later") from error


class _Shower:
    """Fills a column of the page."""

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self._working = threading.Lock()  # held by what goes on after its event has ended, too

    async def show(self, path: str | None, name: str) -> list[Any]:
        """What the timer and the parts of the column become."""
        if path is None or name == _NONE:
            return [gradio.Timer(active=False), gradio.update(visible=False), "", None, ""]
        try:
            network = self._networks.get(name)
            if network is None:
                return _fill(f"### {name}\nThese weights are on their way; this page looks after them.", waiting=True)
            explanation = await _in_time(self._explain, network, path)
        except ValueError as error:
            return _fill(f"### {name}\n{html.escape(str(error))}")
        return _fill(_describe(name, network, explanation), explanation)

    def _explain(self, network: Any, path: str) -> Explanation:
        if not self._working.acquire(timeout=_PATIENCE_S):
            raise ValueError("the machine is busy; try again later")
        try:
            return explain_image(network, _read(path), _LABELS)
        finally:
            self._working.release()


def _fill(note: str, explanation: Explanation | None = None, waiting: bool = False) -> list[Any]:
    there = explanation is not None
    return [
        gradio.Timer(active=waiting),
        gradio.update(visible=True),
        note,
        gradio.update(value=None if explanation is None else explanation.heat_map, visible=there),
        gradio.update(value="" if explanation is None else _draw_labels(explanation), visible=there),
    ]


def _draw_labels(explanation: Explanation) -> str:
    """Bars of the classes; of a tagger, chips of the tags."""
    if explanation.thresholds is not None:
        return _draw_tags(explanation)
    bars = explanation.probabilities.items()
    return "".join(_BAR.format(name=html.escape(name), probability=probability) for name, probability in bars)


def _draw_tags(explanation: Explanation) -> str:
    """Chips of the tags that reach their thresholds, then of those that come closest."""
    tags = explanation.tags
    others = {name: value for name, value in explanation.probabilities.items() if name not in tags}
    said = "Below their thresholds:" if tags else "No tag reaches its threshold. The most probable ones:"
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
        f"map: where “{html.escape(next(iter(explanation.probabilities)))}” is, {rows}×{columns} cells."
        + (f"\n\n{html.escape(assumed)}" if assumed else "")
    )

"""The demo as users have it: a server of its own, asked over HTTP and by a headless Chromium."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from timm_tresnet.utils.images import SAMPLES

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("captum", "gradio"))), reason="needs pip install '.[demo]'"
)
ROOT = Path(__file__).parents[1]
EMBEDDED = "test_tresnet.r64_cifar10"
NOTHING_ELSE = """
import socket

connect = socket.socket.connect

def connect_to_this_machine(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
        print("asked for", address, flush=True)
        raise OSError(f"no way to {address}")
    return connect(self, address)

socket.socket.connect = connect_to_this_machine
"""


class Demo:
    """A running demo: its address and its output so far."""

    def __init__(self, code, log, **variables):
        self.log = log
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("GRADIO", "HF_"))}
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
            **variables,
        }
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", NOTHING_ELSE + code], env=environment, stdout=output, stderr=output
            )
        while "The demo is at " not in log.read_text():
            assert self.process.poll() is None, log.read_text()
        self.url = log.read_text().partition("The demo is at ")[2].split()[0]

    def stop(self):
        self.process.terminate()
        self.process.wait()

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read().decode()

    def upload(self, content, name="a.jpg"):
        """Upload a file; returns its path in the server."""
        head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        body = head.encode() + content + b"\r\n--b--\r\n"
        request = urllib.request.Request(f"{self.url}gradio_api/upload", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)[0]

    def peak_mib(self):
        """The most memory that the server has had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024

    def call(self, index, *data, session=None):
        """What a stranger's own client gets from a function of the page."""
        session = session or f"session{index}"
        body = json.dumps({"data": data, "fn_index": index, "session_hash": session}).encode()
        request = urllib.request.Request(
            f"{self.url}gradio_api/queue/join?", body, {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=60).close()
        events = self.get(f"gradio_api/queue/data?session_hash={urllib.parse.quote(session)}").split("\n\n")
        messages = [json.loads(event.removeprefix("data: ")) for event in events if event]
        return next(message for message in messages if message["msg"] == "process_completed")


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """A tagger, and its folder."""
    model = timm.create_model("test_tresnet", num_classes=3, pretrained_cfg_overlay={"notes": ("multi-label",)})
    torch.nn.init.zeros_(model.head.fc.weight)
    model.head.fc.bias.data = torch.tensor([0.0, 2.0, -2.0])
    folder = tmp_path_factory.mktemp("tagger")
    timm.models.save_for_hf(
        model, folder, safe_serialization=True, model_config={"label_names": ["fur", "whiskers", "wheels"]}
    )
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def demo(tmp_path_factory, second):
    words = ["demo", "--model", EMBEDDED, "--model", second, "--model", "tresnet_m.miil_in1k"]
    code = f"from timm_tresnet.cli.main import main; main({words})"
    running = Demo(code, tmp_path_factory.mktemp("demo") / "log")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def page(demo):
    """A page of the demo in a browser, and every address that the browser has asked for."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    with playwright.sync_playwright() as driver:
        program = next(filter(None, map(shutil.which, names)), driver.chromium.executable_path)
        if not Path(program).exists():
            pytest.skip("needs a browser: apt-get install chromium, or playwright install chromium")
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 720})
        page.set_default_timeout(60_000)
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(demo.url)
        yield page
        browser.close()


def upload(page, path):
    field, held = (page.locator(f"#photograph {part}") for part in ("input[type=file]", "[data-testid=download-link]"))
    field.or_(held).first.wait_for(state="attached")
    if held.count():
        page.locator("#photograph button[aria-label=Clear]").click()
    field.set_input_files(path)


def choose(page, column, name):
    page.locator(f"#{column} input").click()
    page.get_by_role("option", name=name, exact=True).click()


def wait_for(page, selector, text):
    page.locator(selector).get_by_text(text).first.wait_for()


# ---- in a browser


def test_photograph_is_uploaded_classified_and_explained_side_by_side(page, second):
    upload(page, SAMPLES / "cat.jpg")
    wait_for(page, "#first-note", "map of “cat”, 4×4 cells")
    assert EMBEDDED in page.inner_text("#first-note")
    assert page.inner_text("#first-labels").split()[:2] == ["cat", "97%"]
    preview = page.locator("#preview img")
    assert preview.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
    assert second in page.inner_text("#second-note")
    tags, others = (page.locator(f"#second-labels span[style*='{part}']") for part in ("accent", "opacity:.6"))
    assert tags.all_inner_texts() == ["whiskers 88%", "fur 50%"]
    assert others.all_inner_texts() == ["wheels 12%"]
    assert "Below their thresholds:" in page.inner_text("#second-labels")
    assert page.locator("#first-labels span[style*='accent']").count() == 0  # bars of classes, not tags
    for column in ("first", "second"):
        picture = page.locator(f"#{column}-picture img")
        picture.wait_for()
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 320
        with Image.open(io.BytesIO(page.request.get(picture.get_attribute("src")).body())) as shown:
            colours = shown.convert("RGB").resize((4, 4), Image.Resampling.BOX)
        assert len(colours.getcolors()) > 8
    assert not page.locator("#message").is_visible()


def test_sample_is_a_click_away_and_other_weights_are_shown_at_once(page):
    page.locator("#samples").get_by_role("button").nth(3).click()
    wait_for(page, "#first-note", "map of “horse”")
    page.locator("#preview img").wait_for()
    choose(page, "second", EMBEDDED)
    wait_for(page, "#second-note", "map of “horse”")
    choose(page, "second", "nothing")
    page.locator("#second-column").wait_for(state="hidden")
    assert page.inner_text("#first-labels").startswith("horse")


BAD = {  # what is uploaded, and what is said about it
    "text.jpg": (b"not an image at all", "not an image in JPEG, PNG, WEBP, BMP, GIF, TIFF"),
    "cut.jpg": ((SAMPLES / "cat.jpg").read_bytes()[:2000], "truncated"),
    "empty.png": (b"", "not an image in JPEG"),
    "script.gif": (b"GIF89a<script>document.title = 'mine'</script>", "cannot be shown to a network"),
}


@pytest.mark.parametrize(("name", "content", "said"), [(name, *rest) for name, rest in BAD.items()], ids=BAD)
def test_bad_upload_is_answered_with_a_message_and_the_next_one_with_its_class(name, content, said, page, tmp_path):
    (tmp_path / name).write_bytes(content)
    upload(page, tmp_path / name)
    wait_for(page, "#message", said)
    assert "cannot be shown to a network" in page.inner_text("#message")
    page.locator("#first-column").wait_for(state="hidden")
    upload(page, SAMPLES / "airplane.jpg")
    wait_for(page, "#first-note", "map of “airplane”")
    assert not page.locator("#message").is_visible()
    assert page.title() == "TResNet"


def test_weights_that_cannot_be_had_are_a_message_in_their_column(page):
    upload(page, SAMPLES / "deer.jpg")
    choose(page, "second", "tresnet_m.miil_in1k")  # loading at first, then a failure
    wait_for(page, "#second-note", "cannot load the model tresnet_m.miil_in1k")
    assert not page.locator("#second-labels").is_visible()
    wait_for(page, "#first-note", "map of “deer”")
    choose(page, "second", "nothing")


def test_file_of_another_kind_is_refused_and_one_in_capitals_is_not(page, tmp_path):
    (tmp_path / "notes.txt").write_text("not an image")
    upload(page, tmp_path / "notes.txt")
    page.get_by_text("Invalid file type").first.wait_for()
    shutil.copy(SAMPLES / "horse.jpg", tmp_path / "HORSE.JPG")
    upload(page, tmp_path / "HORSE.JPG")
    wait_for(page, "#first-note", "map of “horse”")


def test_browser_and_server_contact_no_third_party(page, demo):
    assert len(page.asked) > 10
    assert [url for url in page.asked if not url.startswith((demo.url, "data:", "blob:"))] == []
    assert "asked for" not in demo.log.read_text()
    assert "Traceback" not in demo.log.read_text()


# ---- by strangers' own clients


def find_function(demo, output):
    """Index of the first function that writes to a component, by its label or kind."""
    config = json.loads(demo.get("config"))
    kinds = {part["id"]: (part["type"], part["props"].get("label")) for part in config["components"]}
    return next(
        each["id"] for each in config["dependencies"] if output in [kinds[number][0] for number in each["outputs"]]
    )


def test_weights_outside_the_list_are_refused(demo):
    answer = demo.call(find_function(demo, "timer"), None, "hf-hub:somebody/else")
    assert answer["success"] is False
    assert "hf-hub:somebody/else is not in the list of choices" in answer["output"]["error"]


@pytest.mark.parametrize("path", ["/etc/hostname", str(ROOT / "pyproject.toml")])
def test_files_of_the_server_cannot_be_named(path, demo):
    file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.jpg"}
    assert demo.call(find_function(demo, "state"), file)["success"] is False
    assert f"InvalidPathError: Cannot move {path} to the gradio cache dir" in demo.log.read_text()
    with pytest.raises(urllib.error.HTTPError, match="403"):
        demo.get(f"gradio_api/file={path}")


FILE = {"path": "http://93.184.215.14/a.jpg", "meta": {"_type": "gradio.FileData"}, "orig_name": "a.jpg"}


def test_no_address_is_fetched_for_a_visitor(demo):
    upload, show = find_function(demo, "state"), find_function(demo, "timer")
    for index, data in (upload, [FILE]), (upload, [{**FILE, "url": FILE["path"]}]), (show, [FILE, FILE]):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            demo.call(index, *data)
    for path in (f"file={FILE['path']}", f"proxy={FILE['path']}"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            demo.get(f"gradio_api/{path}")
    uploaded = {**FILE, "path": demo.upload((SAMPLES / "cat.jpg").read_bytes()), "url": FILE["path"]}
    answer = demo.call(upload, uploaded)
    assert answer["success"]
    assert "asked for" not in demo.log.read_text()


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "buckets"), ("GET", "records?bucket_id=a/b"), ("POST", "connect"), ("GET", "records/a/b/assets/c")],
)
def test_run_history_is_off(method, path, demo):
    request = urllib.request.Request(f"{demo.url}gradio_api/run-history/{path}", b"{}", method=method)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(request, timeout=60)
    assert json.loads(demo.get("config"))["run_history"] is False


def test_photograph_that_unfolds_is_refused_before_it_is_decoded(demo):
    content = io.BytesIO()
    Image.new("I;16", (9000, 9000)).save(content, "PNG")
    assert len(content.getvalue()) < 200_000
    before = demo.peak_mib()
    file = {**FILE, "path": demo.upload(content.getvalue(), "a.png")}
    answer = demo.call(find_function(demo, "state"), file)
    assert "take 648 MB, more than 268" in json.dumps(answer["output"]["data"])
    assert demo.peak_mib() < before + 100


def test_silent_hub_blocks_no_other_visitor_and_gets_no_login(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        asked = []

        def listen():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = silent.accept()
                    asked.append((connection, connection.recv(10_000)))

        threading.Thread(target=listen, daemon=True).start()
        words = ["demo", "--model", "tresnet_m.miil_in1k", "--model", EMBEDDED]
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        (tmp_path / "token").write_text("hf_of_the_file")
        variables = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret"}
        code = f"from timm_tresnet.cli.main import main; main({words})"
        demo = Demo(code, tmp_path / "log", **variables)
        try:
            upload, show = find_function(demo, "state"), find_function(demo, "timer")
            file = {**FILE, "path": demo.upload((SAMPLES / "cat.jpg").read_bytes())}
            for name, said in (("tresnet_m.miil_in1k", "are loading"), (EMBEDDED, "map of “cat”")) * 2:
                session = f"one {name}"
                assert demo.call(upload, file, session=session)["success"]
                for _ in range(600):  # the network in the package is on its way for a moment too
                    said_now = str(demo.call(show, None, name, session=session)["output"]["data"])
                    if said in said_now:
                        break
                    threading.Event().wait(0.05)
                else:
                    raise AssertionError(said_now)
            for _ in range(1200):
                if any(content for _, content in asked):
                    break
                threading.Event().wait(0.05)
        finally:
            demo.stop()
        said_to_hub = b"".join(content for _, content in asked)
        assert b"HTTP/1.1" in said_to_hub
        assert b"uthorization" not in said_to_hub
        assert b"hf_" not in said_to_hub


def test_page_counts_nobody_and_only_this_machine_reaches_it(demo):
    config = json.loads(demo.get("config"))
    assert config["analytics_enabled"] is False
    assert demo.url.startswith("http://127.0.0.1:")
    assert all(each["api_visibility"] == "private" for each in config["dependencies"])


def test_large_files_are_refused(demo):
    boundary = "----boundary"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
    body = head.encode() + bytes(21 * 10**6) + f"\r\n--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(urllib.request.Request(f"{demo.url}gradio_api/upload", body, headers), timeout=60)


# ---- the Space


def test_space_serves_the_weights_that_its_card_names(tmp_path):
    from huggingface_hub import RepoCard

    space = ROOT / "hub" / "space"
    card = RepoCard.load(space / "README.md").data
    code = f"import runpy; runpy.run_path({str(space / card['app_file'])!r}, run_name='__main__')"
    running = Demo(code, tmp_path / "log", GRADIO_SERVER_NAME="127.0.0.1")
    try:
        config = json.loads(running.get("config"))
    finally:
        running.stop()
    (choices,) = (part["props"]["choices"] for part in config["components"] if part["props"].get("label") == "Weights")
    offered = [name for name, _ in choices]
    assert [f"timm/{name}" for name in offered if name != EMBEDDED] == card["models"]
    for name in offered:
        assert timm.models.get_pretrained_cfg(name).has_weights
    assert card["sdk"] == "gradio"
    assert card["title"] == config["title"] + ", side by side"

"""Messages when the Hub cannot be reached, without its client's retries."""

import json
import socket
import threading

import pytest
import timm
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from timm_tresnet.weights import hub
from timm_tresnet.weights.hub import require_hub
from timm_tresnet.weights.loading import load_network, look_up_weights


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """Let the Hub be at an address, with an empty cache and no proxy."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return lambda address: monkeypatch.setattr(constants, "ENDPOINT", address)


@pytest.fixture
def closed():
    """A port of this machine without a server."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def refuse(*arguments, **options):
    raise AssertionError("the client of the Hub was asked, and would try again and again")


def test_a_server_that_does_not_answer_is_named_with_the_reason(endpoint, closed):
    endpoint(f"http://127.0.0.1:{closed}")
    with pytest.raises(LocalEntryNotFoundError) as caught:
        require_hub("a/b", "config.json", "other.json")
    assert str(caught.value) == (
        "config.json of a/b is not in the cache, and 127.0.0.1 cannot be reached (Connection refused); connect to the "
        "network, set HF_ENDPOINT to a mirror, or use a folder, local-dir:FOLDER"
    )


@pytest.mark.parametrize(
    ("address", "port"),
    [("https://hub.invalid", 443), ("http://hub.invalid", 80), ("https://hub.invalid:8080/api", 8080)],
)
def test_the_server_is_asked_for_at_its_port(address, port, endpoint, monkeypatch):
    endpoint(address)
    asked = []

    def connect(address, timeout):
        asked.append((address, 0 < timeout <= 10))
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", connect)
    require_hub("a/b", "config.json")
    assert asked == [(("hub.invalid", port), True)]


def test_a_folder_for_downloads_is_looked_into(endpoint, closed, tmp_path):
    endpoint(f"http://127.0.0.1:{closed}")
    folder = tmp_path / "mine" / "models--a--b" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    require_hub("a/b", "config.json", revision=folder.name, cache_dir=tmp_path / "mine")
    with pytest.raises(LocalEntryNotFoundError, match="is not in the cache"):
        require_hub("a/b", "config.json", revision=folder.name)


def test_a_name_that_nobody_knows_is_a_reason(endpoint, monkeypatch):
    endpoint("https://huggingface.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **options: fail_to_resolve())
    with pytest.raises(LocalEntryNotFoundError, match="cannot be reached \\(Name or service not known\\)"):
        require_hub("a/b", "config.json")


def fail_to_resolve():
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_looking_up_a_name_is_given_a_limit(endpoint, monkeypatch):
    endpoint("https://huggingface.invalid")
    monkeypatch.setattr(hub, "_PATIENCE_S", 0.1)
    ended = threading.Event()

    def connect(*words, **options):
        ended.wait(60)
        raise OSError("too late")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(LocalEntryNotFoundError, match="no answer in 0 s"):
        require_hub("a/b", "config.json")
    ended.set()


def test_a_server_that_listens_is_left_to_the_client(endpoint):
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint(f"http://127.0.0.1:{server.getsockname()[1]}")
        assert require_hub("a/b", "config.json") is None
        server.settimeout(60)
        server.accept()[0].close()  # it was there that was asked


@pytest.mark.parametrize("kind", ["offline", "proxy", "cached"])
def test_what_the_client_can_do_without_the_server_is_left_to_it(endpoint, closed, monkeypatch, tmp_path, kind):
    endpoint(f"http://127.0.0.1:{closed}")
    names = ("a/b", "other.json", "config.json")
    with pytest.raises(LocalEntryNotFoundError, match="cannot be reached"):
        require_hub(*names)
    if kind == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif kind == "proxy":
        monkeypatch.setenv("http_proxy", "http://proxy.invalid:3128")
        monkeypatch.setenv("no_proxy", "")
    else:
        repository = tmp_path / "models--a--b"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
        (repository / "snapshots" / ("0" * 40) / "config.json").write_text("{}")
    assert require_hub(*names) is None


def test_models_and_commands_ask_before_the_client(endpoint, closed, monkeypatch):
    endpoint(f"http://127.0.0.1:{closed}")
    monkeypatch.setattr("timm.models._hub.hf_hub_download", refuse)
    monkeypatch.setattr("timm_tresnet.weights.loading.hf_hub_download", refuse)
    with pytest.raises(LocalEntryNotFoundError, match="tresnet_m needs model.safetensors from .* cannot be reached"):
        timm.create_model("tresnet_m", pretrained=True, layers=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="cannot load the model hf-hub:a/b: config.json of a/b is not in the cache"):
        load_network("hf-hub:a/b")
    assert timm.create_model("test_tresnet", pretrained=True)  # in the package


def test_a_commit_in_the_cache_is_looked_up_without_the_server(endpoint, closed, tmp_path):
    endpoint(f"http://127.0.0.1:{closed}")
    folder = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    config = {"architecture": "test_tresnet", "num_classes": 3, "model_args": {"width_factor": 0.125}}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {}}))
    found = look_up_weights(f"hf-hub:a/b@{folder.name}")
    assert (found.architecture, found.model_args) == ("test_tresnet", {"width_factor": 0.125})
    for other in ("a/b", f"a/b@{'1' * 40}"):
        with pytest.raises(ValueError, match=f"weights hf-hub:{other}: config.json of a/b is not in the cache"):
            look_up_weights(f"hf-hub:{other}")
    # Right field by field, but no network comes of it.
    (folder / "config.json").write_text(json.dumps({**config, "model_args": {"act_layer": "x"}, "pretrained_cfg": {}}))
    for load in (load_network, look_up_weights):
        with pytest.raises(
            ValueError, match=r"@0+: config.json of a/b describes a network that cannot run: .*act_layer"
        ):
            load(f"hf-hub:a/b@{folder.name}")

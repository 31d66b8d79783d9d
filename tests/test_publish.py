"""hub/publish.py and hub/verify.py with the real huggingface_hub client, against a stand-in for the Hub on loopback."""

import dataclasses
import json
import re
import shutil
import time

import pytest
import reference
import torch
from hub_server import Fault
from huggingface_hub import HfApi
from publishing import HUB, PUBLIC_WEIGHT, make_insects
from safetensors.torch import load_file, save_file

from timm_tresnet import convert_checkpoint, write_folder
from timm_tresnet.conversion import description
from timm_tresnet.conversion.card import PLACEHOLDER, make_card
from timm_tresnet.weights.catalogue import load_catalogue

# huggingface_hub 2.4 uploads LFS files with an argument that its transport, httpx2, deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")

REPO = "owner/insects"


@pytest.fixture
def publish(tools, folder):
    return lambda *options: tools["publish"].main([str(folder), "--repo", REPO, *options])


@pytest.fixture(scope="module")
def insects(tmp_path_factory):
    return make_insects(tmp_path_factory.mktemp("module") / "insects")


@pytest.fixture
def folder(insects, tmp_path):
    return shutil.copytree(insects, tmp_path / "insects")


def find_requests(hub, pattern):
    return [path for method, path, _ in hub.requests if re.search(pattern, f"{method} {path}")]


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"].update(changes.pop("pretrained_cfg", {}))
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


# ---- publish


def test_dry_run_says_what_would_be_sent_and_changes_nothing(hub, publish, folder, capsys):
    assert publish() == 0
    output = capsys.readouterr().out
    for name in ("README.md", "config.json", "model.safetensors"):
        assert re.search(rf"new +{name}", output)
    assert "owner/insects will be created" in output
    assert hub.repositories == {}
    assert {method for method, _, _ in hub.requests} <= {"GET", "HEAD"}


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.thorough)], ids=["heads", "every"])
def test_official_files_of_every_kind_come_back_from_the_hub_with_the_official_logits(
    every, hub, tools, run_child, tmp_path, monkeypatch
):
    kinds = {  # one of each head, or of those that differ in no more than sizes and in who published it
        (public.head, *((public.multi_label, *public.slopes.items()) if every else ())): dataclasses.replace(
            public, architecture="test_tresnet", tag=name.replace(".", "_")
        )
        for name, public in load_catalogue().items()
        if public.head in ("linear", "bottleneck", "ml_decoder")  # the others are backbones, without logits
    }
    catalogue = {public.name: public for public in kinds.values()}
    for module in (description, tools["checks"]):
        monkeypatch.setattr(module, "load_catalogue", lambda: catalogue)
    x = torch.rand(1, 3, 64, 64)
    expected = {"x": x}
    for name, public in catalogue.items():
        tensors = reference.official_state_dict(
            (2, 2, 3, 1), planes=16, num_classes=public.num_classes, head=public.head
        )
        torch.save({"model": tensors}, tmp_path / "official.pth")
        write_folder(convert_checkpoint(tmp_path / "official.pth", public_weight=name), tmp_path / name)
        slopes = {
            "slope": public.negative_slope or 1e-3,
            "stem_slope": public.stem_negative_slope or 1e-2,
        }
        expected[f"owner/{name}"] = reference.official_forward(tensors, x, **slopes)
    save_file(expected, tmp_path / "expected")

    by_script, *others = catalogue
    for name in others:
        assert tools["publish"].main([str(tmp_path / name), "--repo", f"owner/{name}", "--push"]) == 0
    run_child(
        """
import runpy
import sys
import warnings

warnings.filterwarnings("ignore", "Use 'content=<...>' to upload raw", DeprecationWarning)  # as above
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
""",
        HUB / "publish.py",
        tmp_path / by_script,
        *("--repo", f"owner/{by_script}", "--push", "--revision-tag", "v1"),
        HF_TOKEN="hf_test",
        HF_HOME=str(tmp_path / "hf_home_of_publisher"),
    )
    run_child(
        """
import sys
import timm
import torch
from safetensors.torch import load_file

expected = load_file(sys.argv[1])
x = expected.pop("x")
expected[f"{sys.argv[2]}@v1"] = expected[sys.argv[2]]
for name, logits in expected.items():
    model = timm.create_model(f"hf-hub:{name}", pretrained=True).eval()
    assert type(model).__module__ == "timm_tresnet.models.network"
    with torch.no_grad():
        assert (model(x) - logits).norm() <= 1e-5 * logits.norm(), name
""",
        tmp_path / "expected",
        f"owner/{by_script}",
    )
    assert tools["verify"].main(["--weights", *hub.repositories]) == 0


def test_card_names_the_repository_it_is_published_in(hub, publish, folder):
    assert PLACEHOLDER in (folder / "README.md").read_text(encoding="utf-8")
    assert publish("--push") == 0
    (*_, revision) = hub.repositories[REPO].revisions.values()
    card = (revision / "README.md").read_text(encoding="utf-8")
    assert f'timm.create_model("hf-hub:{REPO}", pretrained=True)' in card
    assert PLACEHOLDER not in card


def test_update_sends_what_changed_and_shows_the_difference(hub, publish, folder, capsys):
    publish("--push")
    hub.requests.clear()
    edit_config(folder, label_names=["ant", "bee", "cricket"])
    capsys.readouterr()
    assert publish() == 0
    output = capsys.readouterr().out
    assert re.search(r"changed +config\.json", output)
    assert re.search(r"same +README\.md", output)
    assert re.search(r"same +model\.safetensors", output)
    assert re.search(r'^-.*"cicada"', output, re.MULTILINE)
    assert re.search(r'^\+.*"cricket"', output, re.MULTILINE)
    assert publish("--push") == 0
    assert find_requests(hub, "^PUT|lfs") == []
    (*_, revision) = hub.repositories[REPO].revisions.values()
    assert json.loads((revision / "config.json").read_text())["label_names"][2] == "cricket"


def test_publishing_the_same_again_makes_no_commit(hub, publish):
    publish("--push")
    commits = list(hub.repositories[REPO].revisions)
    assert publish("--push", "--revision-tag", "v1") == 0
    assert list(hub.repositories[REPO].revisions) == commits
    assert hub.repositories[REPO].tags == {"v1": commits[-1]}
    assert publish("--push", "--revision-tag", "v1") == 0


def test_files_that_only_the_repository_has_stay(hub, publish, capsys):
    hub.commit(REPO, {"notes.txt": b"by hand"})
    assert publish("--push") == 0
    assert re.search(r"stays +notes\.txt", capsys.readouterr().out)
    (*_, revision) = hub.repositories[REPO].revisions.values()
    assert (revision / "notes.txt").read_bytes() == b"by hand"


def test_interrupted_push_goes_on_where_it_was(hub, publish, folder, capsys):
    hub.faults.append(Fault(r"POST .*/commit/main", break_off_at=0))  # the weights have arrived, the connection goes
    assert publish("--push") == 1
    assert len(find_requests(hub, "^PUT")) == 1
    assert list(hub.repositories[REPO].revisions.values())[-1].joinpath("config.json").exists() is False
    assert publish("--push", "--revision-tag", "v1") == 0
    assert len(find_requests(hub, "^PUT")) == 1
    (*_, revision) = hub.repositories[REPO].revisions.values()
    assert (revision / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_upload_that_breaks_off_is_sent_again(hub, publish, folder):
    hub.faults.append(Fault(r"PUT .*", break_off_at=10_000))
    assert publish("--push") == 0
    (*_, revision) = hub.repositories[REPO].revisions.values()
    assert (revision / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_hub_that_fails_and_recovers_gets_everything(hub, publish, capsys):
    # The client itself repeats uploads, but not the downloads that the upload is verified with.
    hub.faults += [Fault(r"PUT .*", status=503, times=2), Fault(r"GET .*/resolve/.*\.safetensors", status=502)]
    assert publish("--push", "--revision-tag", "v1") == 1
    assert "the Hub failed: run this again later" in capsys.readouterr().err
    (*_, commit) = hub.repositories[REPO].revisions
    assert publish("--push", "--revision-tag", "v1") == 0
    assert hub.repositories[REPO].tags == {"v1": commit}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            Fault(r"POST /api/repos/create", status=401, times=-1),
            "does not accept your login: log in with `hf auth login`",
        ),
        (
            Fault(r"POST /api/repos/create", status=403, times=-1),
            "your token does not allow this for owner/insects",
        ),
        (Fault(r"GET /api/models/.*", status=403, code="GatedRepo", times=-1), "is gated: accept its conditions"),
        (
            Fault(r"POST .*/commit/main", status=404, code="RevisionNotFound", times=-1),
            "does not have the requested file or revision",
        ),
        (Fault(r"POST .*/commit/main", status=412, times=-1), "changed by someone else meanwhile"),
        (Fault(r"POST .*/commit/main", status=500, times=-1), "the Hub failed: run this again later"),
        (Fault(r"PUT .*", status=503, times=-1), "the Hub failed: run this again later"),
        (Fault(r"GET /api/models/.*", break_off_at=0, times=-1), "the request to the Hub about owner/insects failed"),
    ],
    ids=[
        "login",
        "no_right_to_write",
        "gated",
        "revision",
        "overtaken",
        "commit_fails",
        "upload_fails",
        "no_connection",
    ],
)
def test_refusals_say_what_to_do(hub, publish, fault, message, capsys):
    hub.faults.append(dataclasses.replace(fault))
    assert publish("--push", "--revision-tag", "v1") == 1
    assert message in capsys.readouterr().err
    assert not any(repository.tags for repository in hub.repositories.values())


@pytest.mark.parametrize(
    "headers",
    [{"Retry-After": "86400"}, pytest.param({"ratelimit": '"api";r=0;t=86400'}, marks=pytest.mark.thorough)],
    ids=["retry", "rate"],
)
@pytest.mark.parametrize("request_", [r"PUT .*", r"POST .*/batch", r"POST .*/commit/main", r"GET .*/tree/.*"])
def test_no_answer_makes_it_wait_for_long(request_, headers, hub, publish, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    if "tree" in request_:  # of a repository that is there
        assert publish("--push") == 0
    hub.faults.append(Fault(request_, status=429, headers=headers, times=-1))
    assert publish("--push") == 1
    assert "asks to wait for 86400 seconds" in capsys.readouterr().err
    assert sum(waited) <= 60


def test_transfer_that_no_bound_reaches_is_not_used(hub, publish, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    assert publish("--push") == 0
    assert find_requests(hub, "PUT /lfs-objects/")
    assert not find_requests(hub, "xet")


def test_short_waits_are_waited_for(hub, publish, monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    hub.faults.append(Fault(r"PUT .*", status=429, headers={"Retry-After": "7"}, times=1))
    assert publish("--push") == 0
    assert 8.0 in waited


def test_answer_that_only_trickles_has_a_deadline(hub, tools, publish, monkeypatch, capsys):
    assert publish("--push") == 0
    monkeypatch.setattr(tools["client"], "PATIENCE_S", 0.2)
    monkeypatch.setattr(tools["client"], "LEAST_RATE", 10**6)
    hub.faults.append(Fault(r"GET .*/resolve/.*safetensors", trickle=0.05, times=-1))  # a byte's patience is never lost
    capsys.readouterr()
    assert tools["verify"].main(["--weights", REPO]) == 1
    assert "is too slow or asks for a long wait for owner/insects" in capsys.readouterr().out


@pytest.mark.parametrize("request_", [r"POST .*/commit/main", r"POST .*/preupload/main", r"POST .*/batch"])
def test_repository_that_a_refusal_leaves_empty_is_named(request_, hub, publish, capsys):
    hub.faults.append(Fault(request_, status=403, times=-1))
    assert publish("--push") == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith("owner/insects was created and is empty: run this again, or delete it on its page")
    assert len(hub.repositories[REPO].revisions) == 1
    assert publish("--push") == 1  # it was there before
    assert "was created" not in capsys.readouterr().err


def test_commit_of_someone_else_in_between_is_not_overwritten(tools, hub, folder):
    api = tools["client"].connect()
    hub.commit(REPO, {"README.md": b"first"})
    plan = tools["publish"].make_plan(api, tools["publish"].read_folder(folder, REPO), REPO)
    hub.commit(REPO, {"README.md": b"second"})
    with pytest.raises(OSError, match="412"):
        tools["publish"].push(api, plan)
    (*_, revision) = hub.repositories[REPO].revisions.values()
    assert (revision / "README.md").read_bytes() == b"second"


def test_what_arrives_changed_is_reported_and_not_tagged(hub, publish, monkeypatch, capsys):
    commit = hub.commit
    monkeypatch.setattr(hub, "commit", lambda repo_id, files: commit(repo_id, {**files, "config.json": b"{}"}))
    assert publish("--push", "--revision-tag", "v1") == 1
    assert "other bytes than were sent for config.json" in capsys.readouterr().err
    assert hub.repositories[REPO].tags == {}


def test_tag_of_another_revision_is_refused_before_anything_is_sent(hub, publish, folder, capsys):
    publish("--push", "--revision-tag", "v1")
    edit_config(folder, label_names=["ant", "bee", "cricket"])
    hub.requests.clear()
    assert publish("--push", "--revision-tag", "v1") == 1
    assert "tag v1 of owner/insects is already commit" in capsys.readouterr().err
    assert {method for method, _, _ in hub.requests} <= {"GET", "HEAD"}


def remove_card(folder):
    (folder / "README.md").unlink()


def add_pickle(folder):
    (folder / "pytorch_model.bin").touch()


def truncate_header(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:1000])


def lengthen_header(folder):
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    (folder / "model.safetensors").write_bytes((10 * length).to_bytes(8, "little") + content[8:])


def name_other_repository(folder):
    card = make_card(PUBLIC_WEIGHT, "test_tresnet", 3, "owner/birds")
    (folder / "README.md").write_text(card, encoding="utf-8")


def reshape_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    weights["head.fc.bias"] = torch.zeros(4)
    save_file(weights, folder / "model.safetensors")


def rename_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] = weights.pop("head.fc.bias")
    save_file(weights, folder / "model.safetensors")


DAMAGES = {  # what is done to a folder, and what is said about it
    "no_card": (remove_card, ["README.md is missing"]),
    "pickle": (add_pickle, ["pytorch_model.bin is a pickle"]),
    "no_header": (truncate_header, ["model.safetensors has no readable header"]),
    "header_too_long": (lengthen_header, ["model.safetensors has no readable header"]),
    "card_is_another's": (name_other_repository, ["README.md tells its readers to load hf-hub:owner/birds"]),
    "shape": (reshape_tensor, ["misshapen", "head.fc.bias (4,) instead of (3,)"]),
    "name": (rename_tensor, ["missing tensors", "head.fc.bias", "unexpected tensors", "classifier.bias"]),
    "config_is_no_json": (
        lambda folder: (folder / "config.json").write_text("{"),
        ["config.json is not JSON"],
    ),
    "config_is_not_timm's": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "resnet"}'),
        ["config.json needs architecture, which is missing"],
    ),
    "architecture": (
        lambda folder: edit_config(folder, architecture="tresnet_q"),
        ["config.json needs architecture to be a TResNet", 'got "tresnet_q"'],
    ),
    "labels": (
        lambda folder: edit_config(folder, label_names=["ant", "bee"]),
        ["config.json names 2 classes but has num_classes 3"],
    ),
    "preprocessing": (
        lambda folder: edit_config(folder, pretrained_cfg={"crop_mode": "center"}),
        ["config.json has crop_mode 'center', public weight test_tresnet.insects has 'squash'"],
    ),
    "card_has_no_metadata": (
        lambda folder: (folder / "README.md").write_text("# insects\n"),
        ["README.md has no metadata"],
    ),
    "card_has_bad_metadata": (
        lambda folder: (folder / "README.md").write_text("---\nlicense: [mit\n---\n# insects\n"),
        ["README.md has metadata that the Hub cannot read"],
    ),
    "card_has_another_licence": (
        lambda folder: (folder / "README.md").write_text("---\nlicense: gpl\nlibrary_name: timm\n---\n# insects\n"),
        ["README.md has license 'gpl' instead of 'mit'"],
    ),
    "card_has_another_result": (
        lambda folder: (folder / "README.md").write_text(
            (folder / "README.md").read_text(encoding="utf-8").replace("value: 61.5", "value: 99.9"), encoding="utf-8"
        ),
        ["README.md has results [99.9], public weight test_tresnet.insects has 61.5"],
    ),
}


@pytest.mark.parametrize(("damage", "findings"), DAMAGES.values(), ids=DAMAGES)
def test_unfit_folder_is_refused_before_a_request(hub, publish, folder, damage, findings, capsys):
    damage(folder)
    assert publish("--push") == 1
    output = capsys.readouterr().err
    for finding in findings:
        assert finding in output
    assert hub.requests == []


# ---- a Space


@pytest.fixture
def space(tmp_path):
    return shutil.copytree(HUB / "space", tmp_path / "space")


@pytest.fixture
def publish_space(tools, space):
    return lambda *options: tools["publish"].main([str(space), "--repo", "owner/demo", "--space", *options])


def test_space_is_created_with_its_sdk_and_comes_back_as_it_was_sent(hub, publish_space, space, run_child, capsys):
    assert publish_space() == 0
    assert "the Space owner/demo will be created" in capsys.readouterr().out
    assert hub.repositories == {}
    (space / "__pycache__").mkdir()
    (space / "__pycache__" / "app.pyc").touch()
    assert publish_space("--push", "--revision-tag", "v1") == 0
    assert list(hub.repositories) == ["spaces/owner/demo"]
    (*_, commit) = hub.repositories["spaces/owner/demo"].revisions
    assert hub.repositories["spaces/owner/demo"].tags == {"v1": commit}
    files = {path.name: path.read_bytes() for path in (HUB / "space").iterdir() if path.is_file()}
    assert {"app.py", "README.md", "requirements.txt"} <= {*files}
    printed = run_child(
        """
from pathlib import Path
from huggingface_hub import HfApi
folder = Path(HfApi().snapshot_download("owner/demo", revision="v1", repo_type="space"))
print(*sorted(path.name for path in folder.iterdir()))
print((folder / "app.py").read_text(), end="")
"""
    )
    names, _, app = printed.partition("\n")
    assert names.split() == sorted([".gitattributes", *files])
    assert app.encode() == files["app.py"]


def test_update_of_a_space_shows_the_difference_in_its_app(hub, publish_space, space, capsys):
    publish_space("--push")
    (space / "app.py").write_text((space / "app.py").read_text() + "# more\n")
    capsys.readouterr()
    assert publish_space("--push") == 0
    output = capsys.readouterr().out
    assert re.search(r"changed +app\.py", output)
    assert re.search(r"same +README\.md", output)
    assert "\n+# more" in output
    (*_, revision) = hub.repositories["spaces/owner/demo"].revisions.values()
    assert (revision / "app.py").read_bytes() == (space / "app.py").read_bytes()
    assert publish_space("--push") == 0
    assert len(hub.repositories["spaces/owner/demo"].revisions) == 3  # the first is the Hub's own


def replace_in_card(old, new):
    def damage(space):
        card = (space / "README.md").read_text(encoding="utf-8")
        assert old in card
        (space / "README.md").write_text(card.replace(old, new), encoding="utf-8")

    return damage


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (lambda space: (space / "requirements.txt").unlink(), "requirements.txt is missing"),
        (lambda space: (space / "app.py").unlink(), "README.md has app_file 'app.py', which does not exist"),
        (lambda space: (space / "weights.pth").touch(), "weights.pth is a pickle"),
        (lambda space: (space / "README.md").write_text("# demo\n"), "README.md has no metadata"),
        (replace_in_card("sdk: gradio", "sdk: docker"), "README.md has sdk 'docker' instead of 'gradio'"),
        (replace_in_card("sdk_version", "version"), "README.md has no sdk_version, which the Hub needs"),
        (replace_in_card("colorTo: green", "colorTo: teal"), "README.md has colorTo 'teal' instead of one of red, "),
        (replace_in_card("short_description: ", "short_description: " + "x" * 60), "of more than 60 characters"),
    ],
    ids=["requirements", "app", "pickle", "metadata", "sdk", "version", "colour", "description"],
)
def test_unfit_space_is_refused_before_a_request(hub, publish_space, space, damage, finding, capsys):
    damage(space)
    assert publish_space("--push") == 1
    assert finding in capsys.readouterr().err
    assert hub.requests == []


# ---- verify


def copy_of_published(folder):
    """Commit a folder by hand, with the content that publishing gives it."""
    return {
        path.name: path.read_bytes().replace(PLACEHOLDER.encode(), f"hf-hub:{REPO}".encode())
        for path in folder.iterdir()
    }


@pytest.mark.parametrize(
    ("damage", "findings"),
    [
        pytest.param(*case, id=name, marks=pytest.mark.thorough if index % 4 else [])  # the checks are publish's
        for index, (name, case) in enumerate(DAMAGES.items())
    ],
)
def test_audit_finds_what_is_wrong_with_a_repository(hub, tools, folder, damage, findings, capsys):
    damage(folder)
    hub.commit(REPO, copy_of_published(folder))
    assert tools["verify"].main([REPO]) == 1
    output = capsys.readouterr().out
    for finding in findings:
        assert finding in output


def test_audit_of_a_sound_repository_reads_the_header_of_its_weights_alone(hub, tools, folder, capsys):
    hub.commit(REPO, copy_of_published(folder))
    assert tools["verify"].main([REPO]) == 0
    assert capsys.readouterr().out == "owner/insects: nothing to report\n"
    weights = [(method, status) for method, path, status in hub.requests if path.endswith(".safetensors")]
    assert weights == [("GET", 206)]


def test_audit_notices_a_card_with_the_placeholder(hub, tools, folder, capsys):
    hub.commit(REPO, {path.name: path.read_bytes() for path in folder.iterdir()})
    assert tools["verify"].main([REPO]) == 1
    assert f"README.md tells its readers to load {PLACEHOLDER}" in capsys.readouterr().out


def test_audit_notices_weights_that_end_early(hub, tools, folder, capsys):
    files = copy_of_published(folder)
    files["model.safetensors"] = files["model.safetensors"][:-200_000]
    hub.commit(REPO, files)
    assert tools["verify"].main([REPO]) == 1
    assert "but its tensors need" in capsys.readouterr().out


def test_audit_goes_on_behind_a_repository_that_it_cannot_see(hub, tools, folder, capsys):
    hub.commit(REPO, copy_of_published(folder))
    assert tools["verify"].main(["owner/nothing", f"{REPO}@nowhere", REPO]) == 1
    nothing, nowhere, sound = capsys.readouterr().out.splitlines()
    assert nothing.startswith("owner/nothing: owner/nothing does not exist, or is private")
    assert nowhere.startswith(f"{REPO}@nowhere: {REPO} does not have the requested file or revision")
    assert sound == f"{REPO}: nothing to report"


def test_audit_notices_bytes_that_are_not_those_the_hub_lists(hub, tools, folder, monkeypatch, capsys):
    hub.commit(REPO, copy_of_published(folder))
    tree = HfApi.list_repo_tree

    def list_others(self, *args, **kwargs):
        for file in tree(self, *args, **kwargs):
            if file.path == "model.safetensors":
                file.lfs.sha256 = "0" * 64
            yield file

    monkeypatch.setattr(HfApi, "list_repo_tree", list_others)
    assert tools["verify"].main([REPO]) == 0
    assert tools["verify"].main(["--weights", REPO]) == 1
    assert "the downloaded model.safetensors does not have the hash that the Hub lists" in capsys.readouterr().out


# ---- interruptions


INTERRUPTIONS = (("before", 1), ("before", -1), ("after", 1))  # request lost, Hub gone, answer lost


@pytest.mark.parametrize(
    ("exists", "step"),
    [(False, 2), *(pytest.param(exists, 1, marks=pytest.mark.thorough) for exists in (False, True))],
    ids=["some", "new", "update"],
)
def test_push_interrupted_between_any_two_requests_ends_in_the_same_state(
    hub, tools, publish, exists, step, monkeypatch
):
    monkeypatch.setattr(tools["publish"], "find_problems", lambda *arguments: [])  # the folder is sound, to save time

    def publish_once(*faults):
        for held in (hub.repositories, hub.objects, hub.requests):
            held.clear()
        if exists:
            hub.commit(REPO, {"README.md": b"# insects\n", "notes.txt": b"by hand"})
        hub.faults[:] = faults
        publish("--push", "--revision-tag", "v1")
        hub.faults.clear()

    def find_state():
        repository = hub.repositories[REPO]
        (*_, commit) = repository.revisions
        assert repository.tags == {"v1": commit}
        folder = repository.revisions[commit]
        return len(repository.revisions), {path.name: path.read_bytes() for path in folder.iterdir()}

    publish_once()
    expected, count = find_state(), len(hub.requests)
    assert count > 10
    for moment in range(0, count, step):
        drop, times = INTERRUPTIONS[(moment + exists) % 3]
        harmless = [Fault(".*", times=moment)] if moment else []
        publish_once(*harmless, Fault(".*", drop=drop, times=times))
        assert publish("--push", "--revision-tag", "v1") == 0
        assert find_state() == expected, moment


def test_repository_that_someone_else_creates_meanwhile_is_not_built_upon(tools, hub, folder, publish):
    plan = tools["publish"].make_plan(tools["client"].connect(), tools["publish"].read_folder(folder, REPO), REPO)
    hub.commit(REPO, {"README.md": b"theirs"})
    with pytest.raises(OSError, match="409"):
        tools["publish"].push(tools["client"].connect(), plan)
    assert len(hub.repositories[REPO].revisions) == 1
    assert publish("--push") == 0  # having seen the new plan


def test_commit_of_someone_else_during_the_push_is_seen_and_a_second_run_ends_well(hub, publish, monkeypatch, capsys):
    publish("--push")
    hub.commit(REPO, {"README.md": b"# other\n"})
    take_fault = hub.take_fault

    def take_after_theirs(request):
        (*_, newest) = hub.repositories[REPO].revisions.values()
        if "preupload" in request and not (newest / "notes.txt").exists():
            hub.commit(REPO, {"notes.txt": b"theirs"})
        return take_fault(request)

    monkeypatch.setattr(hub, "take_fault", take_after_theirs)
    capsys.readouterr()
    assert publish("--push") == 1
    assert "changed by someone else meanwhile" in capsys.readouterr().err
    assert publish("--push") == 0
    (*_, revision) = hub.repositories[REPO].revisions.values()
    assert (revision / "notes.txt").read_bytes() == b"theirs"
    assert b"# test_tresnet.insects" in (revision / "README.md").read_bytes()

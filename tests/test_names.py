"""Names that were typed wrongly, wherever a command takes the name of a model."""

import pytest

from timm_tresnet.bench.measuring import make_network
from timm_tresnet.cli import main as cli
from timm_tresnet.utils.names import suggest
from timm_tresnet.variants import DEPRECATED, WEIGHTS, explain_unknown


def test_the_closest_names_are_asked_about():
    assert suggest("tresnet_xxl", ["tresnet_xl", "resnet"]) == "; did you mean tresnet_xl?"
    assert suggest("AB", ["ab", "abc", "abd"], limit=3) == "; did you mean ab, abd or abc?"
    assert suggest("q", ["tresnet_m"]) == ""


@pytest.mark.parametrize("name", [*WEIGHTS, *DEPRECATED, "tresnet_m", "test_tresnet"])
def test_names_that_there_are_need_no_explanation(name):
    assert explain_unknown(name) is None


@pytest.mark.parametrize(
    ("name", "explanation"),
    [
        ("tresnet_mm", "there is no model tresnet_mm; did you mean tresnet_m, "),
        ("TResNet-M", "there is no model TResNet-M; did you mean tresnet_m"),
        ("tresnet_m.miil_1k", "tresnet_m has no weights 'miil_1k'; did you mean miil_in1k?"),
        ("tresnet_s.q", "tresnet_s has no weights 'q'; it has untrained"),
        ("q", "there is no model q; see `timm-tresnet list`"),
        (
            "timm/tresnet_m",
            "there is no model timm/tresnet_m; did you mean a repository of the Hub, hf-hub:timm/tresnet_m?",
        ),
        ("tuned", "there is no model tuned; did you mean the folder, local-dir:tuned?"),
    ],
    ids=["variant", "case", "tag", "tags", "nothing", "repository", "folder"],
)
def test_other_names_are_explained(name, explanation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuned").mkdir()
    assert explain_unknown(name).startswith(explanation)


@pytest.mark.parametrize(
    "words",
    [["classify", "--model"], ["export", "--format", "onnx", "--output", "out.onnx"]],
    ids=lambda words: words[0],
)
def test_commands_suggest_the_intended_name(words, capsys):
    assert cli.main([*words, "tresnet_mm"]) == 2
    assert "did you mean tresnet_m, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", "timm knows no model 'resnet5O'; did you mean resnet50"),
        ("tresnet_m.miil_1k", "timm knows no weights 'tresnet_m.miil_1k'; did you mean tresnet_m.miil_in1k"),
        ("built-in:tresnet_mm", "got 'tresnet_mm'; did you mean tresnet_m?"),
    ],
)
def test_benchmarks_suggest_the_intended_name(name, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        make_network(name)

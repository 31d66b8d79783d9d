import dataclasses
import re

import pytest
import timm
from huggingface_hub import ModelCard
from PIL import Image
from publishing import PUBLIC_WEIGHT
from timm.models import save_for_hf

from timm_tresnet.conversion.card import PLACEHOLDER, cite, make_card
from timm_tresnet.weights.catalogue import NOTHING_KNOWN, load_catalogue

CATALOGUE = load_catalogue()
LINEAR = CATALOGUE["tresnet_m.miil_in21k_ft_in1k"]
MULTI_LABEL = CATALOGUE["tresnet_l.asl_coco_448"]
ML_DECODER = CATALOGUE["tresnet_v2_l.ml_decoder_coco_448"]
QUERY2LABEL = CATALOGUE["tresnet_v2_l.q2l_coco_448"]
PRETRAINING = CATALOGUE["tresnet_v2_l.ml_decoder_openimages_pretrain"]
UNLICENSED = CATALOGUE["tresnet_v2_l.csl_openimages"]


def find_code(card):
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


@pytest.mark.parametrize("public", CATALOGUE.values(), ids=CATALOGUE)
def test_card_of_every_public_weight_has_metadata_that_the_hub_client_reads(public):
    card = ModelCard(make_card(public, public.architecture, public.converted_classes, "owner/name"))
    assert card.data.library_name == "timm"
    assert card.data.license == public.license
    assert ("multi-label" in card.data.tags) == public.multi_label
    assert public.metric is None or public.metric.published in card.text
    assert (public.paper or "arXiv:2003.13630").removeprefix("arXiv:") in card.text
    if public.head == "unknown":
        assert card.data.pipeline_tag == "image-feature-extraction"
        assert card.data.eval_results is None
    else:
        assert card.data.pipeline_tag == "image-classification"
        if public.metric is None:
            assert card.data.eval_results is None
            return
        (result,) = card.data.eval_results
        assert (result.metric_value, result.dataset_name) == (public.metric.value, public.dataset)
        assert result.source_name == public.metric.published


def test_metadata_names_result_source_and_dataset():
    data = ModelCard(make_card(LINEAR, LINEAR.architecture, 1000)).data
    assert data.datasets == ["ILSVRC/imagenet-1k"]
    assert data.model_name == LINEAR.name
    (result,) = data.eval_results
    assert (result.dataset_type, result.metric_type) == ("ILSVRC/imagenet-1k", "accuracy")
    assert result.source_url == "https://github.com/Alibaba-MIIL/ImageNet21K"


TRESNET = "[arXiv:2003.13630](https://arxiv.org/abs/2003.13630)"
CITATION = """```bibtex
@misc{arxiv2003.13630,
  title = {TResNet: High Performance GPU-Dedicated Architecture},
  author = {Tal Ridnik and Hussam Lawen and Asaf Noy and Emanuel Ben Baruch and Gilad Sharir and Itamar Friedman},
  year = {2020},
  eprint = {2003.13630},
  archivePrefix = {arXiv}
}
```"""


def read_prose(card):
    """Its paragraphs without the examples, and the rows of its table."""
    paragraphs = [each for each in ModelCard(card).text.split("\n\n") if "```python" not in each]
    text = re.sub(r"```python\n.*?```", "", ModelCard(card).text, flags=re.DOTALL)
    prose = [each.strip() for each in text.split("\n\n") if each.strip() and not each.lstrip().startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for each in paragraphs for line in each.splitlines()
            if line.startswith("|")]  # fmt: skip
    return prose, [row for row in rows if row[0].strip("-: ")]


def test_card_of_a_public_weight_says_this_and_nothing_else():
    prose, rows = read_prose(make_card(PUBLIC_WEIGHT, "test_tresnet", 3, "owner/insects"))
    code = "(https://github.com/owner/insects)"
    assert prose == [
        "# test_tresnet.insects",
        f"An image classifier: TResNet ({TRESNET}), variant `test_tresnet`, for timm with the plugin timm-tresnet. The "
        f"weights of {TRESNET}, converted from `insects.pth` of its [code]{code}.",
        "## Use",
        "With timm and timm-tresnet installed; the preprocessing comes with the weights.",
        *("### Classification", "### Feature maps", "### Embeddings", "### Fine-tuning"),
        *("## Training data", "Insects."),
        *("## Licence", f"mit, as the [official code]{code}."),
        *("## Citation", CITATION),
    ]
    zeros, ones = "[0.0, 0.0, 0.0]", "[1.0, 1.0, 1.0]"
    assert rows == [
        ["classes", "3"],
        ["image", f"RGB, resized to 64 × 64 pixels whatever its shape (bilinear); mean {zeros}, std {ones}"],
        ["top-1 accuracy on Insects", "61.5 %, published in owner/insects, README.md"],
    ]
    data = ModelCard(make_card(PUBLIC_WEIGHT, "test_tresnet", 3)).data
    (result,) = data.eval_results
    assert (data.model_name, data.datasets, data.tags) == (
        "test_tresnet.insects", None, ["image-classification", "timm", "tresnet"],
    )  # fmt: skip
    assert (result.task_type, result.dataset_type, result.dataset_name) == (
        "image-classification", "insects", "Insects",
    )  # fmt: skip
    assert (result.metric_type, result.metric_name, result.metric_value) == ("accuracy", "top-1 accuracy", 61.5)
    assert result.source_url == "https://github.com/owner/insects"


def test_card_of_ones_own_weight_says_what_was_given_and_nothing_else():
    facts = dataclasses.replace(
        NOTHING_KNOWN, dataset="My birds", license="mit", multi_label=True, threshold=0.7, input_size=(64, 96)
    )
    prose, rows = read_prose(make_card(facts, "tresnet_s", 4))
    assert prose == [
        "# tresnet_s",
        f"A multi-label image classifier: TResNet ({TRESNET}), variant `tresnet_s`, for timm with the plugin "
        "timm-tresnet. Converted from a checkpoint trained on My birds.",
        "## Use",
        "With timm and timm-tresnet installed; the preprocessing comes with the weights.",
        *("### Classification", "### Feature maps", "### Embeddings", "### Fine-tuning"),
        *("## Training data", "My birds."),
        *("## Licence", "mit, as given at the conversion of the weights."),
        *("## Citation", CITATION),
    ]
    assert rows == [
        ["classes", "4"],
        ["outputs", "one sigmoid a class; an image can have any number of classes"],
        ["threshold", "an image has each class with a probability of at least 0.7"],
        ["image", "RGB, 64 × 96 pixels"],
    ]


def test_card_of_a_backbone_of_unknown_training_says_so():
    prose, rows = read_prose(make_card(None, "tresnet_m", 0, "owner/insects"))
    assert prose[:2] == [
        "# insects",
        f"An image feature extractor: TResNet ({TRESNET}), variant `tresnet_m`, for timm with the plugin timm-tresnet. "
        "Converted from a checkpoint of unknown training.",
    ]
    assert prose[4:] == ["### Feature maps", "### Embeddings", "### Fine-tuning", "## Citation", CITATION]
    assert rows == []


def test_pretraining_files_and_papers_of_public_weights_are_named():
    public = dataclasses.replace(
        PUBLIC_WEIGHT, pretraining="Birds", files=("a.pth", "b.pth"), paper="arXiv:2104.10972", code="see the paper",
        license=None, multi_label=True,
    )  # fmt: skip
    prose, _ = read_prose(make_card(public, "test_tresnet", 3))
    paper = "[arXiv:2104.10972](https://arxiv.org/abs/2104.10972)"
    assert prose[1].endswith(f"The weights of {paper}, converted from `a.pth` or `b.pth` of its code (see the paper).")
    assert "Birds, then Insects." in prose
    unlicensed = "The authors name no licence for these weights. Ask them before you use the weights."
    assert prose[prose.index("## Licence") + 1] == unlicensed
    assert prose[-1] == CITATION
    assert cite(["arXiv:2104.10972", "arXiv:2003.13630"]) == f"{prose[-2]}\n\n{CITATION}"
    assert prose[-2].startswith(
        "```bibtex\n@misc{arxiv2104.10972,\n  title = {ImageNet-21K Pretraining for the Masses},"
    )


def test_unknown_weights_get_a_card_that_claims_nothing():
    card = ModelCard(make_card(None, "tresnet_m", 17, "owner/insects"))
    assert card.data.to_dict() == {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "tresnet"],
    }
    assert card.text.startswith("# insects\n")
    assert "| classes | 17 |" in card.text
    assert not re.search(r"## (Training data|Licence)|None|accuracy|mAP", card.text)


def test_unknown_facts_of_a_public_weight_are_left_out():
    card = make_card(UNLICENSED, UNLICENSED.architecture, 9605)
    assert "None" not in card
    assert "license:" not in card
    assert "| image |" not in card
    assert "name no licence" in card


def test_result_of_a_head_that_is_not_converted_is_no_result_of_the_backbone():
    card = make_card(QUERY2LABEL, QUERY2LABEL.architecture, 0)
    assert "model-index" not in card
    assert "89.2 %, published in SlongLiu/query2labels, README.md; with the published head" in card
    assert "### Classification" not in card


def test_results_of_query2label_are_those_of_the_converted_network():
    card = make_card(QUERY2LABEL, QUERY2LABEL.architecture, 80)
    assert "| mAP on MS-COCO 2014 | 89.2 %, published in SlongLiu/query2labels, README.md |" in card


def test_results_of_ml_decoder_are_those_of_the_converted_network():
    card = make_card(ML_DECODER, ML_DECODER.architecture, 80)
    assert "| mAP on MS-COCO 2014 | 90.1 %, published in Alibaba-MIIL/ML_Decoder, MODEL_ZOO.md |" in card
    assert "one sigmoid a class" in card


def test_weights_without_a_result_claim_none():
    card = make_card(PRETRAINING, PRETRAINING.architecture, 9605)
    assert "model-index" not in card
    assert "%" not in card
    assert "resized to 448" not in card


def test_weights_without_a_paper_are_those_of_their_code_and_say_their_threshold():
    public = CATALOGUE["tresnet_d.ml_danbooru_6_30000"]
    card = make_card(public, public.architecture, 12547)
    assert "`TResnet-D-FLq_ema_6-30000.ckpt` of their authors' [code](https://github.com/7eu7d7/ML-Danbooru)" in card
    assert "| threshold | an image has each class with a probability of at least 0.7 |" in card
    assert card.count("@misc") == 1


def test_preprocessing_is_described_as_the_public_weight_has_it():
    assert "shorter side resized to 256 pixels, then the central 224 × 224" in make_card(LINEAR, "tresnet_m", 1000)
    assert "resized to 448 × 448 pixels whatever its shape" in make_card(MULTI_LABEL, "tresnet_l", 80)


@pytest.mark.parametrize(
    ("crop_mode", "crop_pct", "resized", "said"),
    [
        ("center", 0.875, (512, 256), "resized to cover 256 × 365 pixels, then the central 224 × 320"),
        ("squash", 1.0, (320, 224), "resized to 224 × 320 pixels whatever its shape"),
    ],
)
def test_preprocessing_of_images_that_are_not_square_is_described_as_timm_does_it(crop_mode, crop_pct, resized, said):
    public = dataclasses.replace(LINEAR, input_size=(224, 320), crop_mode=crop_mode, crop_pct=crop_pct)
    resize, crop = timm.data.create_transform((3, 224, 320), crop_mode=crop_mode, crop_pct=crop_pct).transforms[:2]
    image = resize(Image.new("RGB", (1000, 500)))
    assert image.size == resized
    assert crop(image).size == (320, 224)
    assert said in make_card(public, "tresnet_m", 1000)


def test_examples_load_the_repository_or_a_placeholder():
    for repo_id, name in (("owner/name", "hf-hub:owner/name"), (None, PLACEHOLDER)):
        examples = find_code(make_card(LINEAR, "tresnet_m", 1000, repo_id))
        assert [f'"{name}"' in code for code in examples] == [True] * 4


@pytest.mark.parametrize(
    ("public", "num_classes"),
    [(LINEAR, 7), (MULTI_LABEL, 3), (QUERY2LABEL, 0), (None, 7)],
    ids=["classes", "labels", "no_classes", "unknown"],
)
def test_every_example_runs(public, num_classes, tmp_path, monkeypatch, capsys):
    model = timm.create_model("test_tresnet", num_classes=num_classes)
    model_config = {"label_names": [f"name {index}" for index in range(num_classes)]}
    save_for_hf(model, tmp_path / "FOLDER", model_config=model_config, safe_serialization=True)
    Image.new("RGB", (90, 70), (90, 120, 20)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    examples = find_code(make_card(public, "test_tresnet", num_classes))
    assert len(examples) == (4 if num_classes else 3)
    for example in examples:
        exec(example, {})
    printed = capsys.readouterr().out
    assert printed.count("name ") == min(5, num_classes)
    assert printed.count("torch.Size") == 4


BREAKING_OUT = {
    "newlines": "Insects\n\n# Heading\n\n| a | b |",
    "end_of_metadata": "Insects\n---\nlicense: mit\n---\n",
    "quotes": "\"Insects\" 'x' `x` ```",
    "yaml_tag": "!!python/object/apply:os.system ['id']",
    "yaml": "{a: [b, &c d], *e",
    "comment": "Insects # no: comment",
    "markdown": "**Insects** [x](javascript:x) ![x](http://x) | x | \\| ~~x~~",
    "html": "<script>alert(1)</script><!-- &amp; -->",
    "separators": "Insects\r# x\u2028# y\x85# z",
}


def skeleton(card):
    """What kinds of lines a card has, and how many bars those of its tables."""
    lines = ModelCard(card).text.splitlines()
    kinds = [re.match(r"#+ |```|\||<|", line)[0] for line in lines]
    return [
        (kind, line.replace(r"\|", "").count("|") if kind == "|" else 0)
        for kind, line in zip(kinds, lines, strict=True)
    ]


@pytest.mark.parametrize("text", BREAKING_OUT.values(), ids=BREAKING_OUT)
def test_no_text_breaks_out_of_the_metadata_or_the_tables(text):
    def make(text):
        metric = dataclasses.replace(LINEAR.metric, name=text, published=text)
        texts = {
            "dataset": text,
            "pretraining": text,
            "license": text,
            "code": text,
            "files": (text,),
            "metric": metric,
        }
        texts |= {"interpolation": text}
        return make_card(dataclasses.replace(LINEAR, **texts), LINEAR.architecture, 1000, "owner/name")

    card = make(text)
    data = ModelCard(card).data
    assert (data.license, data.library_name) == (text, "timm")
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_name, result.source_name) == (text, text, text)
    assert skeleton(card) == skeleton(make("Insects"))
    prose = re.sub(r"(?<!\\)(```.*?```|`[^`]*`)", "", ModelCard(card).text, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<|(?<!\\)\]\((?!https://arxiv.org/abs/[\d.]+\))|(?<!\\)!\[|(?<!\\)\*\*", prose)


def test_metrics_are_named_as_the_hub_names_them():
    (result,) = ModelCard(make_card(MULTI_LABEL, "tresnet_l", MULTI_LABEL.num_classes)).data.eval_results
    assert (result.metric_name, result.metric_type) == ("mAP", "map")


@pytest.mark.parametrize("repo_id", ["owner/na\nme", 'owner/name"', "owner/<b>", "owner/a b", "owner", "a/b/c", ""])
def test_names_that_are_no_repository_are_refused(repo_id):
    with pytest.raises(ValueError, match="needs repo_id to be OWNER/NAME"):
        make_card(LINEAR, LINEAR.architecture, 1000, repo_id)

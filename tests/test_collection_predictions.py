import json

import pytest
import timm
import torch

from timm_tresnet.collection.predictions import Settings, choose_thresholds, classify_files, fingerprint
from timm_tresnet.utils.images import SAMPLES, find_images, read_image
from timm_tresnet.weights.labels import label_lookup, make_notes

PHOTOS = list(find_images([SAMPLES]))
THRESHOLDS = [0.09 * (index + 1) for index in range(10)]


@pytest.fixture
def network():
    return timm.create_model("test_tresnet", pretrained=True).eval()


def run_directly(network, path):
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=network))
    with torch.inference_mode():
        return network(transform(read_image(path))[None])[0]


def collect(network, paths, **settings):
    return [pair for batch in classify_files(network, paths, Settings(**settings)) for pair in batch]


def test_one_label_an_image_the_most_probable_ones_are_reported(network):
    describe = label_lookup(network)
    for path, result in collect(network, PHOTOS, batch_size=3, top_k=4):
        expected = run_directly(network, path).softmax(-1).topk(4)
        assert [entry["index"] for entry in result["predictions"]] == expected.indices.tolist()
        assert [entry["probability"] for entry in result["predictions"]] == pytest.approx(
            expected.values.tolist(), abs=1e-6
        )
        assert all(entry["label"] == describe(entry["index"]) for entry in result["predictions"])


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_labels_above_their_thresholds_are_reported(threshold, network):
    network.pretrained_cfg["notes"] = make_notes(True, THRESHOLDS)
    thresholds = torch.tensor(THRESHOLDS if threshold is None else [threshold] * 10)
    assert choose_thresholds(network, threshold) == pytest.approx(thresholds.tolist())
    counts = set()
    for path, result in collect(network, PHOTOS, threshold=threshold):
        probabilities = run_directly(network, path).sigmoid()
        wanted = (probabilities >= thresholds).nonzero().flatten().tolist()
        assert {entry["index"] for entry in result["predictions"]} == set(wanted)
        values = [entry["probability"] for entry in result["predictions"]]
        assert values == sorted(values, reverse=True)
        counts.add(len(wanted))
    assert len(counts) > 1


def test_finished_files_are_not_reported_and_unreadable_ones_are(network, tmp_path):
    paths = [PHOTOS[0], tmp_path / "gone.jpg", PHOTOS[1], PHOTOS[2]]
    whole = collect(network, paths, batch_size=3)
    assert ["error" in result for _, result in whole] == [False, True, False, False]
    done = {PHOTOS[0]}
    batches = list(classify_files(network, paths, Settings(batch_size=3), done.__contains__))
    assert [pair for batch in batches for pair in batch] == whole[1:]  # to the last digit


def test_outputs_that_are_not_finite_are_an_error_of_their_image_alone(network):
    class Broken(torch.nn.Module):
        num_classes, in_chans, pretrained_cfg = 10, 3, network.pretrained_cfg

        def forward(self, x):
            return torch.where(torch.arange(len(x))[:, None] == 1, torch.nan, network(x))

    results = [result for _, result in collect(Broken(), PHOTOS)]
    assert ["error" in result for result in results] == [False, True, False, False]
    assert results[2] == collect(network, PHOTOS)[2][1]


@pytest.mark.parametrize("options", [{"amp": "bfloat16"}, {"channels_last": True}], ids=str)
def test_precision_and_layout_change_little(options, network):
    changed = [result for _, result in collect(network, PHOTOS, **options)]
    for result, (_, expected) in zip(changed, collect(network, PHOTOS), strict=True):
        assert result["predictions"][0]["index"] == expected["predictions"][0]["index"]
        assert result["predictions"][0]["probability"] == pytest.approx(
            expected["predictions"][0]["probability"], abs=0.1
        )


def test_whatever_results_depend_on_changes_the_fingerprint(network, tmp_path):
    found = [fingerprint(network)]
    network.head.fc.bias.data[0] += 1e-4
    found.append(fingerprint(network))
    network.pretrained_cfg["notes"] = make_notes(True)
    found.append(fingerprint(network))
    network.pretrained_cfg["notes"] = make_notes(True, THRESHOLDS)
    found.append(fingerprint(network))
    network.pretrained_cfg["label_names"] = list("abcdefghij")
    found.append(fingerprint(network))
    network.pretrained_cfg["crop_pct"] = 0.5
    found.append(fingerprint(network))
    (tmp_path / "artifact.onnx").write_bytes(b"a")
    found.append(fingerprint(network, [tmp_path / "artifact.onnx"]))
    assert len(set(map(json.dumps, found))) == len(found)
    assert fingerprint(network) == found[-2]
    assert Settings().describe() != Settings(fast_jpeg=True).describe()
    assert Settings(device="cuda:3").describe() == Settings(device="cuda:0", workers=2, batch_size=9).describe()

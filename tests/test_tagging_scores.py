import pytest
import torch

scores = pytest.importorskip("timm_tresnet.tagging.scores", reason="install torchmetrics, of the extra tagging")


def reference_average_precision(probabilities, targets):
    """Mean of the precision at each image that has the label, most probable first; without ties."""
    hits = targets[probabilities.argsort(descending=True)]
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return (precision * hits).sum() / hits.sum()


def reference_f1(probabilities, targets, threshold):
    chosen = probabilities >= threshold
    return (2 * (chosen & targets.bool()).sum() / (chosen.sum() + targets.sum())).item()


@pytest.fixture
def tagged():
    targets = (torch.rand(200, 5) < 0.3).float()
    targets[:, 3] = 0  # a label that no image has
    return (targets * 0.3 + torch.rand(200, 5)) / 1.3, targets


def test_average_precision_is_that_of_the_definition(tagged):
    probabilities, targets = tagged
    found = scores.average_precisions(probabilities, targets)
    for label in (0, 1, 2, 4):
        expected = reference_average_precision(probabilities[:, label], targets[:, label])
        torch.testing.assert_close(found[label], expected)
    assert found[3].isnan()


def test_scores_leave_out_labels_that_no_image_has(tagged):
    probabilities, targets = tagged
    found = scores.score(probabilities, targets, 0.5)
    assert found == scores.score(probabilities[:, [0, 1, 2, 4]], targets[:, [0, 1, 2, 4]], 0.5)


def test_cf1_is_of_mean_precision_and_mean_recall_and_of1_of_all_decisions(tagged):
    probabilities, targets = (each[:, [0, 1, 2, 4]] for each in tagged)
    thresholds = torch.tensor([0.3, 0.5, 0.6, 0.7])
    chosen, truth = probabilities >= thresholds, targets.bool()
    hits = (chosen & truth).sum(0)
    precision, recall = (hits / chosen.sum(0)).mean(), (hits / truth.sum(0)).mean()
    overall = 2 * hits.sum() / (chosen.sum() + truth.sum())
    found = scores.score(probabilities, targets, thresholds)
    assert found["CF1"] == pytest.approx(100 * (2 * precision * recall / (precision + recall)).item(), rel=1e-5)
    assert found["OF1"] == pytest.approx(100 * overall.item(), rel=1e-5)


def test_one_label_is_enough(tagged):
    probabilities, targets = (each[:, :1] for each in tagged)
    found = scores.score(probabilities, targets, 0.5)
    expected = reference_average_precision(probabilities[:, 0], targets[:, 0])
    assert found["mAP"] == pytest.approx(100 * expected.item(), rel=1e-5)
    f1 = reference_f1(probabilities[:, 0], targets[:, 0], 0.5)
    assert found["CF1"] == pytest.approx(100 * f1, rel=1e-5)
    assert found["OF1"] == pytest.approx(100 * f1, rel=1e-5)


def test_nothing_predicted_is_zero_and_nothing_there_is_nan():
    assert scores.score(torch.full((4, 2), 0.1), torch.eye(4)[:, :2], 0.5)["CF1"] == 0
    assert all(value != value for value in scores.score(torch.rand(4, 2), torch.zeros(4, 2), 0.5).values())


def test_thresholds_give_the_best_f1_that_any_threshold_gives(tagged):
    probabilities, targets = tagged
    found = scores.choose_thresholds(probabilities, targets)
    for label in (0, 1, 2, 4):
        column, truth = probabilities[:, label], targets[:, label]
        best = max(reference_f1(column, truth, threshold) for threshold in column)
        assert reference_f1(column, truth, found[label]) == pytest.approx(best)
        assert (column - found[label]).abs().min() > 1e-6  # so that rounding decides nothing


def test_a_label_that_no_image_has_gets_the_threshold_for_all(tagged):
    probabilities, targets = tagged
    (together,) = scores.choose_thresholds(probabilities.flatten()[:, None], targets.flatten()[:, None])
    assert scores.choose_thresholds(probabilities, targets)[3] == together


def test_a_label_that_all_images_have_is_always_said():
    (threshold,) = scores.choose_thresholds(torch.tensor([[0.2], [0.4]]), torch.ones(2, 1))
    assert threshold == pytest.approx(0.1)

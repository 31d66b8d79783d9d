import pytest
import torch

from timm_tresnet.tagging import scores


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
        torch.testing.assert_close(found[label], expected, check_dtype=False)
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


def test_scores_have_their_names_whether_anything_can_be_measured_or_not(tagged):
    probabilities, targets = tagged
    names = ["CP", "CR", "CF1", "OP", "OR", "OF1"]
    for count in (0, 5):
        decisions = scores.decide(probabilities >= 0.5, targets if count else torch.zeros_like(targets))
        assert list(decisions.score()) == names
        assert list(scores.score(probabilities, targets, 0.5)) == ["mAP", "CF1", "OF1"]


def test_one_right_decision_about_one_image_is_all_of_them():
    found = scores.decide(torch.tensor([[True], [False]]), torch.tensor([[1], [0]])).score()
    assert found == dict.fromkeys(found, 100)


def test_thresholds_lie_halfway_to_the_next_probability():
    probabilities = torch.tensor([[0.9], [0.8], [0.3]])
    for targets, threshold in (([1, 0, 0], 0.85), ([1, 1, 0], 0.55), ([1, 1, 1], 0.15)):
        assert scores.choose_thresholds(probabilities, torch.tensor(targets)[:, None]) == [pytest.approx(threshold)]


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


@pytest.fixture
def partly(tagged):
    """Ties, labels of which little is known, one only ever said to be there, and one never."""
    probabilities, targets = tagged
    targets[torch.rand(200, 5) < 0.6] = scores.UNKNOWN
    targets[:, 2][targets[:, 2] == 0] = scores.UNKNOWN
    return (probabilities * 20).round() / 20, targets


def test_what_nobody_checked_counts_nowhere(partly):
    probabilities, targets = partly
    found = scores.average_precisions(probabilities, targets)
    assert found.isnan().tolist() == [False, False, True, True, False]
    for label in (0, 1, 4):
        known = targets[:, label] >= 0
        column, truth = probabilities[known, label], targets[known, label]
        assert found[label] == scores.average_precisions(column[:, None], truth[:, None])[0]
        chosen = column >= 0.5
        decisions = scores.decide((probabilities >= 0.5)[:, [label]], targets[:, [label]])
        assert decisions.hits.item() == (chosen & truth.bool()).sum()
        assert decisions.chosen.item() == chosen.sum()
        assert decisions.positives.item() == truth.sum()
    changed = torch.where(targets < 0, torch.rand(200, 5), probabilities)
    assert scores.score(changed, targets, 0.5) == scores.score(probabilities, targets, 0.5)
    assert scores.choose_thresholds(changed, targets) == scores.choose_thresholds(probabilities, targets)


def test_figures_are_those_of_scikit_learn(partly):
    metrics = pytest.importorskip("sklearn.metrics", reason="install scikit-learn to compare with it")
    probabilities, targets = partly
    measured = scores.find_measurable(targets)
    ours = scores.average_precisions(probabilities, targets)
    for label in measured.nonzero().flatten().tolist():
        known = targets[:, label] >= 0
        truth, column = targets[known, label].numpy(), probabilities[known, label].numpy()
        assert ours[label].item() == pytest.approx(metrics.average_precision_score(truth, column), abs=1e-9)
    targets = targets.clamp(min=0)[:, :3]  # all are known: it has no word for others
    probabilities = probabilities[:, :3]
    found = scores.score_ranking(probabilities, targets)
    for name, average in (("mAP", "macro"), ("weighted mAP", "weighted"), ("micro AP", "micro")):
        expected = metrics.average_precision_score(targets.numpy(), probabilities.numpy(), average=average)
        assert found[name] == pytest.approx(100 * expected, abs=1e-7)
    chosen = probabilities >= 0.5
    arguments = {"y_true": targets.numpy(), "y_pred": chosen.numpy(), "zero_division": 0}
    decided = scores.decide(chosen, targets).score()
    for letter, average in (("C", "macro"), ("O", "micro")):
        precision, recall, *_ = metrics.precision_recall_fscore_support(**arguments, average=average)
        assert decided[f"{letter}P"] == pytest.approx(100 * precision)
        assert decided[f"{letter}R"] == pytest.approx(100 * recall)
        assert decided[f"{letter}F1"] == pytest.approx(200 * precision * recall / (precision + recall))


def test_means_of_average_precision_by_hand():
    probabilities = torch.tensor([[0.9, 0.8], [0.7, 0.6], [0.5, 0.4], [0.3, 0.2]])
    targets = torch.tensor([[1, 0], [1, 0], [0, 1], [0, -1]])
    found = scores.score_ranking(probabilities, targets)
    # The second label: its only image of three comes last. Together: +, -, +, -, -, +, in the order of the rows.
    expected = (1 + 1 / 3) / 2, (2 * 1 + 1 * 1 / 3) / 3, (1 + 2 / 3 + 3 / 6) / 3
    assert list(found.values()) == pytest.approx([100 * value for value in expected])


def official_ap_partial(targets, probabilities):
    """Mean and weighted mean of average precisions, image by image (`AP_partial` of Alibaba-MIIL/PartialLabelingCSL).

    Run on the same random numbers as the original at commit 534f3ce, it gave its two figures to nine digits.
    """
    values, weights = [], []
    for column, truth in zip(probabilities.T.tolist(), targets.T.tolist(), strict=True):
        pairs = sorted((pair for pair in zip(column, truth, strict=True) if pair[1] != -1), reverse=True)
        right = [target == 1 for _, target in pairs]
        if not any(right) or all(right):
            continue
        precisions = [sum(right[: end + 1]) / (end + 1) for end in range(len(right)) if right[end]]
        values.append(sum(precisions) / len(precisions))
        weights.append(len(precisions))
    weighted = sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
    return 100 * sum(values) / len(values), 100 * weighted


def test_partial_figures_are_the_official_ones():
    probabilities, targets = torch.rand(60, 8, dtype=torch.float64), torch.randint(-1, 2, (60, 8))
    targets[:, 3] = scores.UNKNOWN
    targets[:, 4] = targets[:, 4].clamp(max=0)
    targets[:, 5][targets[:, 5] == 0] = scores.UNKNOWN
    found = scores.score_ranking(probabilities, targets)
    assert (found["mAP"], found["weighted mAP"]) == pytest.approx(official_ap_partial(targets, probabilities))


def test_top_labels_are_chosen_whatever_their_probability():
    probabilities = torch.tensor([[0.1, 0.3, 0.2], [0.9, 0.8, 0.7]])
    assert scores.choose_top(probabilities, 2).tolist() == [[False, True, True], [True, True, False]]
    assert scores.choose_top(probabilities, 9).all()
    assert scores.choose_top(probabilities, 2).dtype == torch.bool


def test_accuracy_is_that_of_timm():
    from timm.utils import accuracy

    logits, classes = torch.randn(50, 12), torch.randint(12, (50,))
    targets = torch.nn.functional.one_hot(classes, 12)
    expected = [each.item() for each in accuracy(logits, classes, topk=(1, 5))]
    assert list(scores.score_top(logits, targets).values()) == pytest.approx(expected)
    assert scores.score_top(logits[:, :3], targets[:, :3]).keys() == {"top-1"}
    targets[:, 0] = 1  # of several labels, one is enough
    assert scores.score_top(logits, targets)["top-1"] > expected[0]


def test_f1_of_poor_predictions_is_that_of_the_definition():
    targets = torch.tensor([[1.0, 0], [1, 0], [1, 1], [0, 1]])
    probabilities = torch.tensor([[0.9, 0.9], [0.1, 0.9], [0.1, 0.1], [0.9, 0.9]])  # right: 1 of 2, and 1 of 3
    found = scores.score(probabilities, targets, 0.5)
    precision, recall = (1 / 2 + 1 / 3) / 2, (1 / 3 + 1 / 2) / 2
    assert found["CF1"] == pytest.approx(100 * 2 * precision * recall / (precision + recall))
    assert found["OF1"] == pytest.approx(100 * 2 * 2 / (5 + 5))


def test_ranking_of_labels_of_which_nothing_is_known_is_nan_by_every_name():
    found = scores.score_ranking(torch.rand(2, 3), torch.full((2, 3), -1))
    assert list(found) == list(scores.score_ranking(torch.rand(4, 1), torch.tensor([[0], [1], [0], [1]])))
    assert all(value != value for value in found.values())

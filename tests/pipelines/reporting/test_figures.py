"""The numbers of a report, each against another way to compute it."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix
from torch.nn import functional as F

from distill.losses.sdd import complementary
from distill.regions import disagreeing
from pipelines.reporting.accuracy import class_accuracies, confused_pairs, difference, flips
from pipelines.reporting.calibration import divergence, reliability
from pipelines.reporting.confidence import agreement, doubtful_labels
from pipelines.reporting.dump import Dump, joined
from pipelines.reporting.geometry import (
    absolute_difference,
    class_mean_logits,
    embedding_map,
    linear_cka,
    logit_correlations,
    shown_classes,
)
from pipelines.reporting.page import legend, short_tags
from pipelines.reporting.regions import cells, rule_of

IMAGES, CLASSES, ABSENT = 300, 7, 6


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(5)


def labels_of(random: np.random.Generator) -> np.ndarray:
    """Labels of all classes but one."""
    return random.integers(0, ABSENT, IMAGES)


def dump_of(logits: np.ndarray, labels: np.ndarray, ids: np.ndarray | None = None) -> Dump:
    """A dump of these logits, its sums by plain loops."""
    ids = np.arange(len(labels)) if ids is None else ids
    order = np.argsort(-logits, axis=1)
    sums = np.zeros((CLASSES, CLASSES))
    for row, label in zip(logits, labels, strict=True):
        sums[label] += row
    arrays = {
        "sample_ids": ids,
        "labels": labels,
        "top_classes": order,
        "top_logits": np.take_along_axis(logits, order, 1),
        "log_sum_exp": np.log(np.exp(logits).sum(1)),
        "class_logit_sums": sums,
        "logit_products": sum(np.outer(row, row) for row in logits),
        "sampled_ids": ids,
        "logits": logits,
    }
    return Dump({"split_digest": "a", "split": "a", "class_names": [str(k) for k in range(CLASSES)]}, arrays)


def test_flips_and_their_interval(random: np.random.Generator):
    labels, mine, other = (random.integers(0, 3, IMAGES) for _ in range(3))
    found = flips(labels, mine, other)
    rows = list(zip(labels, mine, other, strict=True))
    assert found.gained.tolist() == [i for i, (y, a, b) in enumerate(rows) if a == y != b]
    assert found.lost.tolist() == [i for i, (y, a, b) in enumerate(rows) if b == y != a]
    paired = 100 * ((mine == labels).astype(float) - (other == labels))
    assert difference(found, IMAGES) == pytest.approx((paired.mean(), 1.96 * paired.std() / np.sqrt(IMAGES)))


def test_accuracy_by_class_and_confused_pairs_are_those_of_the_confusion_matrix(random: np.random.Generator):
    labels, predicted = labels_of(random), random.integers(0, CLASSES, IMAGES)
    table = confusion_matrix(labels, predicted, labels=range(CLASSES))
    found = class_accuracies(labels, predicted, CLASSES)
    assert np.isnan(found[ABSENT])
    np.testing.assert_allclose(found[:ABSENT], 100 * np.diag(table)[:ABSENT] / table.sum(1)[:ABSENT])
    pairs = confused_pairs(labels, predicted, CLASSES, 10)
    off = table - np.diag(np.diag(table))
    assert [pair.images for pair in pairs] == sorted(off.ravel(), reverse=True)[:10]
    for pair in pairs:
        assert off[pair.label, pair.predicted] == pair.images
        assert pair.share == pair.images / table[pair.label].sum()
        assert (labels[pair.example], predicted[pair.example]) == (pair.label, pair.predicted)


def test_calibration_error_is_its_definition(random: np.random.Generator):
    confidence, right = random.random(IMAGES), random.random(IMAGES) < 0.6
    confidence[:3] = 0.0, 1.0, 1 / 15  # the ends, and the border of two bins
    expected = 0.0
    for low in range(15):
        inside = [i for i, c in enumerate(confidence) if low / 15 < c <= (low + 1) / 15 or (low == 0 and c == 0)]
        if inside:
            expected += len(inside) / IMAGES * abs(np.mean(right[inside]) - np.mean(confidence[inside]))
    found = reliability(confidence, right)
    assert found.error == pytest.approx(100 * expected)
    assert found.counts.sum() == IMAGES
    assert reliability(np.array([0.9, 0.9]), np.array([True, True])).error == pytest.approx(10)


def test_divergence_and_agreement_are_those_of_torch(random: np.random.Generator):
    theirs, ours = 40 * random.standard_normal((2, IMAGES, CLASSES))
    expected = F.kl_div(
        torch.from_numpy(ours).log_softmax(1), torch.from_numpy(theirs).log_softmax(1), reduction="batchmean", log_target=True
    )
    assert divergence(theirs, ours) == pytest.approx(expected.item())
    labels = labels_of(random)
    # the teacher's dump lacks an image that could not be decoded there
    student, teacher = dump_of(ours, labels), dump_of(theirs[1:], labels[1:], np.arange(1, IMAGES))
    same = (ours.argmax(1) == theirs.argmax(1))[1:]
    assert agreement(student, teacher) == (pytest.approx(100 * same.mean()), pytest.approx(divergence(theirs[1:], ours[1:])))
    against = [i for i in range(1, IMAGES) if ours[i].argmax() == theirs[i].argmax() != labels[i]]
    assert sorted(doubtful_labels(student, teacher).tolist()) == against


def test_class_means_and_correlations_are_those_of_all_logits(random: np.random.Generator):
    labels = labels_of(random)
    logits = random.standard_normal((IMAGES, CLASSES)) @ random.standard_normal((CLASSES, CLASSES)) + 100
    dump = dump_of(logits, labels)
    means = class_mean_logits(dump)
    assert np.isnan(means[ABSENT]).all()
    np.testing.assert_allclose(means[:ABSENT], [logits[labels == k].mean(0) for k in range(ABSENT)])
    np.testing.assert_allclose(logit_correlations(dump), np.corrcoef(logits.T), atol=1e-6)
    other = random.standard_normal((3, 3))
    found = absolute_difference(other, np.zeros((3, 3)))
    assert np.diag(found).tolist() == [0, 0, 0]
    assert found[0, 1] == abs(other[0, 1])


def test_cka_is_that_of_the_gram_matrices(random: np.random.Generator):
    first, second = random.standard_normal((50, 8)) + 3, random.standard_normal((50, 5))
    second[:, 0] += first[:, 0]

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        centre = np.eye(50) - 1 / 50
        return float(np.trace(a @ a.T @ centre @ b @ b.T @ centre))

    expected = hsic(first, second) / np.sqrt(hsic(first, first) * hsic(second, second))
    assert linear_cka(first, second) == pytest.approx(expected)
    rotation = np.linalg.qr(random.standard_normal((8, 8)))[0]
    assert linear_cka(first, 7 * first @ rotation + 1) == pytest.approx(1)
    assert np.isnan(linear_cka(first, np.ones((50, 2))))


@pytest.mark.parametrize("rule", ["label", "class"])
def test_complementary_regions_are_those_of_the_loss(rule: str, random: np.random.Generator):
    regions = random.standard_normal((IMAGES, 5, 4))
    labels = random.integers(0, 4, IMAGES)
    expected = complementary(torch.from_numpy(regions), torch.from_numpy(labels), rule)
    assert np.array_equal(disagreeing(regions.argmax(-1), labels, rule), expected.numpy())


def test_the_rule_is_that_of_the_run():
    assert rule_of({"cross_entropy": {"weight": 1.0}, "sdd": {"rule": "class"}}) == "class"
    assert rule_of({"sdd": {"weight": 1.0}}) == "label"
    assert rule_of({"mine": {"rule": "something"}, "cross_entropy": {}}) == "class"


def test_regions_lie_where_the_pooling_matrix_has_them():
    assert [tuple(cell) for cell in cells((1, 2))] == [(1, 0, 0), (2, 0, 0), (2, 0, 1), (2, 1, 0), (2, 1, 1)]


def test_a_map_of_embeddings_keeps_groups_and_is_the_same_again(random: np.random.Generator):
    groups = np.repeat([[0.0] * 60, [9.0] * 60], 30, axis=0) + random.standard_normal((60, 60))
    places = embedding_map(groups)
    assert np.array_equal(places, embedding_map(groups))
    middles = places[:30].mean(0), places[30:].mean(0)
    apart = np.linalg.norm(places[:, None] - np.stack(middles), axis=2)
    assert (apart.argmin(1) == np.repeat([0, 1], 30)).all()
    assert shown_classes(np.array([3, 3, 1, 1, 1, 0]), 2).tolist() == [1, 3]


def test_names_without_room_are_numbers_that_the_caption_explains():
    assert short_tags(["cat", "dog"], 3) == ["cat", "dog"]
    assert legend(["cat", "dog"], ["cat", "dog"], 9) == ""
    cranes = ["crane", "crane", "ox"]  # ImageNet has a bird and a machine of this name
    tags = short_tags(cranes, 3)
    assert tags == ["1", "2", "3"]
    assert legend(cranes, tags, 2) == "1 = crane, 2 = crane, ..."


def test_dumps_of_two_splits_are_not_compared(random: np.random.Generator):
    one = dump_of(random.standard_normal((4, CLASSES)), np.zeros(4, int))
    other = Dump({**one.facts, "split_digest": "b"}, one.arrays)
    with pytest.raises(ValueError, match="dumps of two splits"):
        joined(one, other)

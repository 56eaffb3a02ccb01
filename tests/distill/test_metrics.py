"""Counts are exact for any split of the data."""

import pytest
import torch

from distill.metrics import Throughput, classification_metrics, classification_sums


def test_sums_over_any_split_give_the_same_metrics():
    torch.manual_seed(0)
    logits, labels = torch.randn(103, 10), torch.randint(10, (103,))
    whole = classification_metrics(classification_sums(logits, labels))
    for cuts in ([50, 53], [1] * 103, [103, 0], [7, 0, 96]):
        parts = zip(logits.split(cuts), labels.split(cuts), strict=True)
        sums = torch.stack([classification_sums(a, b) for a, b in parts]).sum(0)
        assert classification_metrics(sums) == pytest.approx(whole)


def test_top1_and_top5_count_what_they_say():
    logits = torch.arange(10.0).repeat(4, 1)  # class 9 first, then 8, 7, 6, 5
    found = classification_metrics(classification_sums(logits, torch.tensor([9, 5, 4, 0])))
    assert (found["images"], found["top1"], found["top5"]) == (4, 25.0, 50.0)


def test_top5_of_fewer_classes_is_top_k():
    assert classification_metrics(classification_sums(torch.randn(6, 3), torch.zeros(6, dtype=torch.long)))["top5"] == 100.0


def test_an_empty_split_is_an_error_not_a_nan():
    with pytest.raises(ValueError, match="0 images"):
        classification_metrics(torch.zeros(4, dtype=torch.float64))


def test_throughput_leaves_out_the_first_step_and_pauses(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 1.0, 2.0, 100.0, 101.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    throughput = Throughput()
    for _ in range(3):  # at 0, 1, 2: two intervals
        throughput.step(10)
    throughput.pause()
    for _ in range(2):  # at 100, 101: one interval
        throughput.step(10)
    assert (throughput.images, throughput.seconds) == (30, 3.0)
    assert throughput.images_per_second == 10.0

"""What a cache keeps of one image: exact enough for the losses, and never silently wrong."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distill.teacher_cache.codecs import FeatureCodec, TopKCodec, absent_row, codec_of


def unpacked(codec, rows, labels):
    data = torch.from_numpy(rows.view(np.uint8).reshape(len(rows), -1).copy())
    return codec.unpack(data, labels)


@pytest.mark.parametrize(("dtype", "steps", "size"), [("fp16", 2**-11, 4096), ("uint8", 1 / 500, 2064)])
def test_features_come_back_within_their_rounding(dtype, steps, size):
    torch.manual_seed(0)
    cells = torch.randn(5, 4, 512).relu() * 3
    cells[2, 1] = 0.25  # a cell of one value
    codec = FeatureCodec(4, 512, dtype)
    rows = codec.pack(cells, torch.zeros(5, dtype=torch.long))
    assert codec.row.itemsize == size
    spread = cells.abs() if dtype == "fp16" else cells.amax(2, keepdim=True) - cells.amin(2, keepdim=True)
    apart = (unpacked(codec, rows, torch.zeros(5, dtype=torch.long)) - cells).abs()
    assert (apart <= steps * spread + 1e-3 * (dtype == "uint8")).all()
    assert codec.whole(rows).all()


def test_features_beyond_float16_are_refused_by_their_size():
    with pytest.raises(ValueError, match=r"a cell is 1e\+05, which float16 does not hold"):
        FeatureCodec(1, 2).pack(torch.tensor([[[1.0, 1e5]]]), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("classes", [40, 70_000])
@pytest.mark.parametrize("k", [1, 5, 39])
def test_what_topk_keeps_and_its_rest_are_all_of_the_probability(k, classes):
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3, classes) * 3, torch.randint(classes, (6,))
    labels[0] = logits[0, 0].argmax()  # one that is among the largest
    codec = TopKCodec(3, classes, k)
    rows = codec.pack(logits, labels)
    found = unpacked(codec, rows, labels)
    assert torch.allclose(found.logsumexp(2), logits.logsumexp(2), atol=0.01)
    kept, index = logits.topk(k, dim=2)
    assert torch.allclose(found.gather(2, index), kept, atol=0.01)
    mine = labels[:, None, None].expand(-1, 3, 1)
    assert torch.allclose(found.gather(2, mine), logits.gather(2, mine), atol=0.01)
    listed = torch.exp(found).scatter(2, index, 0).scatter(2, mine, 0).sum(2).log()
    assert torch.allclose(listed, torch.from_numpy(rows["rest"].astype(np.float32)), atol=0.01)


def test_topk_of_all_classes_is_the_dense_loss():
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(6, 10), torch.randn(6, 1, 10) * 3, torch.randint(10, (6,))
    codec = TopKCodec(1, 10, 10)
    found = unpacked(codec, codec.pack(teacher, labels), labels)

    def kd(logits):
        return F.kl_div(student.log_softmax(1), logits[:, 0].log_softmax(1), log_target=True, reduction="batchmean")

    assert math.isclose(kd(found), kd(teacher), rel_tol=1e-3)


@pytest.mark.parametrize(
    "codec", [FeatureCodec(2, 3), FeatureCodec(2, 3, "uint8"), TopKCodec(2, 9, 3)], ids=lambda c: str(c.facts)
)
def test_a_row_that_is_not_there_is_never_taken_for_one(codec):
    torch.manual_seed(0)
    shape = (4, 2, codec.facts["channels"])
    rows = codec.pack(torch.randn(shape), torch.zeros(4, dtype=torch.long))
    rows[2] = absent_row(codec)[0]
    assert codec.whole(rows).tolist() == [True, True, False, True]
    again = codec_of(codec.facts)
    assert (again.row, again.facts) == (codec.row, codec.facts)


def test_an_index_that_is_no_class_is_no_whole_row():
    codec = TopKCodec(1, 10, 3)
    rows = codec.pack(torch.randn(2, 1, 10), torch.zeros(2, dtype=torch.long))
    rows["index"][1, 0, 2] |= 0x40
    assert codec.whole(rows).tolist() == [True, False]


def test_unknown_codecs_and_numbers_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="codec 'zip': this version knows features, topk"):
        codec_of({"name": "zip"})
    with pytest.raises(ValueError, match="dtype 'int4': must be one of fp16, uint8"):
        FeatureCodec(1, 2, "int4")
    with pytest.raises(ValueError, match="k 11: must be from 1 to the 10 classes"):
        TopKCodec(1, 10, 11)

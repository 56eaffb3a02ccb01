"""Bad samples cost no batch and no step: they are found, reported once, and replaced; above a rate the run stops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data.dali import DaliLoader
from distill.data.faults import TooManyFaults
from distill.data.index import ShardIndex
from distill.data.reader import ShardLost
from distill.data.reference import ReferenceLoader
from tests.distill.data.conftest import picture
from tests.distill.data.planting import BAD, ODD, encoded, raw_split
from tests.distill.data.test_loaders import KINDS, evaluation, input_spec, needs_dali, same, timm_differences, train

COUNT = 60
BATCH = 12


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> tuple[ShardIndex, set[str]]:
    """60 images, 12 of them bad in all ways; the keys of the bad ones."""
    images = [encoded(picture(50 + n % 7, 60 + n % 5, seed=n), quality=90) for n in range(COUNT)]
    good, bad = images[0], {}
    for place, spoil in enumerate(BAD.values()):
        number = place * 5 + place % 3
        bad[f"k{number:03d}"] = images[number] = spoil(good)
    return raw_split(tmp_path_factory.mktemp("faulty") / "split", images), set(bad)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def with_faults(kind, index: ShardIndex, report: Path, rate: float = 1.0, rank: int = 0, world: int = 1, **options):
    faults = {"max_bad_rate": rate, "fault_report": report}
    return train(kind, index, batch=BATCH, rank=rank, world=world, faults=faults, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_with_every_kind_of_bad_image_loses_no_step_and_reports_each_once(kind, faulty, tmp_path):
    index, bad = faulty
    loader = with_faults(kind, index, tmp_path / "faults.jsonl")
    for epoch in range(3):
        batches = list(loader.epoch(epoch))
        assert len(batches) == COUNT // BATCH
        for batch in batches:
            assert batch.images.shape == (BATCH, 40, 40, 3)
            assert np.array_equal(batch.labels.numpy(), index.labels[batch.sample_ids.numpy()])
            assert not {index.key(sample) for sample in batch.sample_ids.tolist()} & bad
    found = lines(tmp_path / "faults.jsonl")
    assert sorted(line["key"] for line in found) == sorted(bad)
    for line in found:
        record = index.records[line["sample"]]
        assert (line["offset"], line["shard"]) == (record["offset"], index.shards[record["shard"]].name)
        assert line["reason"]
        assert line["rank"] == 0
    assert loader.quarantine.found_here == len(bad)
    assert loader.quarantine.samples() == sorted(line["sample"] for line in found)
    loader.close()


@needs_dali
def test_both_loaders_find_the_same_and_put_the_same_in_their_place(faulty, tmp_path):
    index, _ = faulty
    one = with_faults(DaliLoader, index, tmp_path / "one")
    other = with_faults(ReferenceLoader, index, tmp_path / "other")
    for epoch in range(2):
        for a, b in zip(one.epoch(epoch), other.epoch(epoch), strict=True):
            assert torch.equal(a.sample_ids, b.sample_ids)
            assert (a.images.int() - b.images.int()).abs()[:, 1:-1, 1:-1].max() <= 1
    assert one.quarantine.samples() == other.quarantine.samples()
    one.close()
    other.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_does_not_depend_on_when_a_bad_sample_became_known(kind, faulty, tmp_path):
    index, _ = faulty
    first = with_faults(kind, index, tmp_path / "a")
    batches = list(first.epoch(0))
    again = list(first.epoch(0))
    resumed = with_faults(kind, index, tmp_path / "b")
    resumed.quarantine.update(first.quarantine.samples())
    assert same(again, batches)
    assert same(list(resumed.epoch(0, 2)), batches[2:])
    assert not (tmp_path / "b").exists()
    ranks = [with_faults(kind, index, tmp_path / "c", rank=rank, world=2) for rank in range(2)]
    for batch, *parts in zip(batches, *(loader.epoch(0) for loader in ranks), strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    for loader in (first, resumed, *ranks):
        loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_has_not_the_size_of_the_index_is_a_bad_sample(kind, tmp_path):
    """Too large, and its window would be a wrong one; too small, and its window would lie outside."""
    wrong = {5: (20, 24), 17: (40, 400)}
    index = raw_split(tmp_path / "split", [encoded(picture(40, 44, seed=n)) for n in range(24)], shards=1, sizes=wrong)
    loader = with_faults(kind, index, tmp_path / "faults.jsonl")
    shown = torch.cat([batch.sample_ids for epoch in range(2) for batch in loader.epoch(epoch)])
    assert len(shown) == 48
    assert not set(shown.tolist()) & set(wrong)
    assert {line["sample"]: line["reason"] for line in lines(tmp_path / "faults.jsonl")} == {
        5: "40 x 44 pixels, the index says 20 x 24",
        17: "40 x 44 pixels, the index says 40 x 400",
    }
    loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_sample_ids_are_the_rows_of_the_images_really_shown(kind, tmp_path):
    """Each image has the grey level of its row, so a picture says which sample it is; a quarter are bad and have stand-ins."""
    images = [encoded(Image.new("RGB", (40, 40), (4 * n,) * 3), "PNG") for n in range(48)]
    for n in range(0, 48, 4):
        images[n] = BAD["half a PNG" if n % 8 else "garbage"](encoded(picture(40, 40, seed=n)))
    index = raw_split(tmp_path / "split", images, shards=1)
    loader = with_faults(kind, index, tmp_path / "faults.jsonl")
    for batch in (batch for epoch in range(2) for batch in loader.epoch(epoch)):
        assert torch.equal(batch.sample_ids, batch.images[:, 20, 20, 0].long() // 4)
    assert loader.bad_samples == list(range(0, 48, 4))
    loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_above_the_allowed_rate_the_run_stops_with_the_numbers(kind, faulty, tmp_path):
    index, _ = faulty
    loader = with_faults(kind, index, tmp_path / "faults.jsonl", rate=0.05)
    with pytest.raises(TooManyFaults, match=r"[4-9] of 60 samples are bad, at most 3 \(5.0000%\) are allowed.*faults.jsonl"):
        list(loader.epoch(0))
    loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_leaves_bad_samples_out_and_counts_every_other_once(kind, faulty):
    index, bad = faulty
    loaders = [
        evaluation(kind, index, spec=input_spec(32, 32, 0.875), rank=rank, world=2, max_bad_rate=1.0) for rank in range(2)
    ]
    for epoch in range(2):
        seen = torch.cat([batch.sample_ids for loader in loaders for batch in loader.epoch(epoch)]).tolist()
        assert len(seen) == len(set(seen)) == COUNT - len(bad)
    assert sum(loader.quarantine.found_here for loader in loaders) == len(bad)
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spoiled", [BAD["garbage"], BAD["no scan"]])
def test_a_batch_of_evaluation_of_which_nothing_is_left_is_empty(kind, spoiled, tmp_path):
    """It used to end the run: the last batch of a split is short, and one bad image may be all of it."""
    images = [encoded(picture(40, 44, seed=n)) for n in range(9)]
    images[8] = spoiled(images[0])
    index = raw_split(tmp_path / "split", images, shards=1)
    loader = evaluation(kind, index, spec=input_spec(32, 32, 0.875), batch=4)
    for epoch in range(2):
        batches = list(loader.epoch(epoch))
        assert [batch.sample_ids.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], []]
        assert (batches[2].images.shape, batches[2].labels.shape) == ((0, 32, 32, 3), (0,))
    assert loader.bad_samples == [8]
    loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_without_a_good_image_stops_the_run_whatever_rate_is_allowed(kind, tmp_path):
    """It used to look for a stand-in for ever."""
    index = raw_split(tmp_path / "split", [BAD["two bytes"](b"")] * 24)
    loader = with_faults(kind, index, tmp_path / "faults.jsonl", rate=1.0)
    with pytest.raises(TooManyFaults, match=r"24 of 24 samples are bad, at most 23"):
        list(loader.epoch(0))
    loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_after_an_error_a_loader_gives_the_batches_of_any_position(kind, tmp_path):
    """DALI's queue used to keep what was fed before the error, and other batches came out."""
    index = raw_split(tmp_path / "split", [encoded(picture(40, 44, seed=n)) for n in range(48)], shards=48)
    clean = train(kind, index)
    wanted = list(clean.epoch(0))
    clean.close()
    loader = train(kind, index)
    path = index.shard_path(int(index.records["shard"][wanted[1].sample_ids[0]]))
    content = path.read_bytes()
    path.write_bytes(content[:600])
    with pytest.raises(ShardLost):
        list(loader.epoch(0))
    assert same([next(loader.epoch(0, 3))], wanted[3:])
    path.write_bytes(content)
    assert same(list(loader.epoch(0)), wanted)
    loader.close()


@needs_dali
def test_what_only_dali_cannot_decode_is_decoded_by_pil(tmp_path):
    """GIF and AVIF: no sample is lost, and none is quarantined."""
    images = [encoded(picture(40, 44, seed=n), quality=90) for n in range(24)]
    images[7] = encoded(picture(40, 44, seed=100), "GIF")
    images[15] = encoded(picture(40, 44, seed=101), "AVIF", quality=90)
    index = raw_split(tmp_path / "split", images)
    one, other = (train(kind, index, crop="resize") for kind in (DaliLoader, ReferenceLoader))
    seen = []
    for a, b in zip(one.epoch(0), other.epoch(0), strict=True):
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert (a.images.int() - b.images.int()).abs()[:, 1:-1, 1:-1].max() <= 1
        seen += a.sample_ids.tolist()
    assert sorted(seen) == list(range(24))
    assert one.quarantine.samples() == other.quarantine.samples() == []
    one.close()
    other.close()


@needs_dali
@pytest.mark.parametrize("odd", ["GIF", "AVIF", "no scan", "no frame", "half a PNG", "another size than the index says"])
def test_an_image_that_dali_cannot_parse_does_not_end_the_process(odd, tmp_path):
    """In a batch of more than 4 images a thread DALI ended by SIGSEGV, whatever its error would have been."""
    pictures = [picture(200, 240, seed=n) for n in range(54)]
    images = [encoded(each, quality=90) for each in pictures]
    images[20] = ODD[odd](pictures[20]) if odd in ODD else BAD[odd](images[20]) if odd in BAD else images[20]
    sizes = {20: (300, 300)} if odd.startswith("another size") else {}
    index = raw_split(tmp_path / "split", images, 1, sizes=sizes)
    good = odd in ODD
    for first in range(3):  # where in a batch the image lies decides, too
        loader = train(DaliLoader, index, batch=54, faults={"max_bad_rate": 1.0})
        (batch,) = loader.epoch(first)
        assert len(batch.images) == 54
        assert loader.bad_samples == ([] if good else [20])
        loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_truncated_mid_run_fails_with_its_name(kind, tmp_path):
    index = raw_split(tmp_path / "split", [encoded(picture(40, 44, seed=n)) for n in range(48)])
    loader = with_faults(kind, index, tmp_path / "faults")
    next(loader.epoch(0))
    with index.shard_path(1).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ShardLost, match=r"train-0001.tar: .*restore"):
        list(loader.epoch(1))
    loader.close()


@needs_dali
def test_faults_do_not_change_the_pixels_of_other_samples(faulty):
    index, bad = faulty
    loader = evaluation(DaliLoader, index, spec=input_spec(32, 32, 0.875), max_bad_rate=1.0)
    got = {}
    for batch in loader.epoch(0):
        got |= {index.key(sample): image for image, sample in zip(batch.images, batch.sample_ids.tolist(), strict=True)}
    loader.close()
    reference = evaluation(ReferenceLoader, index, spec=input_spec(32, 32, 0.875), max_bad_rate=1.0)
    for batch in reference.epoch(0):
        for image, sample in zip(batch.images, batch.sample_ids.tolist(), strict=True):
            assert (image.int() - got[index.key(sample)].int()).abs().max() <= 1
    assert len(got) == COUNT - len(bad)
    reference.close()


@needs_dali
@pytest.mark.parametrize("kind", [name for name in ODD if name != "16-bit PNG"])
def test_odd_images_are_evaluated_on_timms_pixels(kind, tmp_path):
    """No rotation by EXIF, alpha dropped, CMYK and palettes as PIL reads them. 16-bit images are not among them: PIL clips
    them where DALI scales, and preparation makes them 8-bit."""
    index = raw_split(tmp_path / "split", [ODD[kind](picture(90, 70, seed=n)) for n in range(2)], shards=1)
    assert timm_differences(DaliLoader, index, input_spec(32, 32, 0.875)).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_small_the_same_on_every_rank_and_refused_where_it_does_not_fit(kind, faulty, tmp_path):
    index, _ = faulty
    ranks = [with_faults(kind, index, tmp_path / "faults", rank=rank, world=2) for rank in range(2)]
    for loader in ranks:
        list(loader.epoch(0))
    union = sorted({sample for loader in ranks for sample in loader.bad_samples})
    assert ranks[0].bad_samples != ranks[1].bad_samples
    for loader in ranks:
        loader.restore({**loader.state(), "bad_samples": union})
    state = json.loads(json.dumps(ranks[0].state()))
    assert state == ranks[1].state()
    assert state == {"index": index.digest, "seed": 11, "global_batch_size": BATCH, "shuffle_block": 0, "bad_samples": union}
    for name, other in (("index", "0" * 64), ("seed", 12), ("global_batch_size", 24)):
        with pytest.raises(ValueError, match=rf"saved state is of another stream \({name} {other} there, {state[name]} here\)"):
            ranks[0].restore({**state, name: other})
    strict = with_faults(kind, index, tmp_path / "faults", rate=0.05)
    with pytest.raises(TooManyFaults, match=rf"{len(union)} of 60 samples are bad, at most 3 .* by all processes together"):
        strict.restore(state)
    for loader in (*ranks, strict):
        loader.close()

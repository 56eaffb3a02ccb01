"""The files of a cache without any model: whole or refused, whatever happened in between."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.files import file_sha256
from distill.teacher_cache.codecs import FeatureCodec, absent_row
from distill.teacher_cache.files import CacheError, TeacherCache, differences, view_path
from distill.teacher_cache.writer import Division, Entries, Unit, Writer

SAMPLES, VIEWS = 23, 2
CODEC = FeatureCodec(2, 3)


def facts(**more) -> dict:
    return {"format": 1, "num_samples": SAMPLES, "unit": 10, "batch": 4, "codec": CODEC.facts, "teacher": {"name": "t"}, **more}


def row_of(view: int, sample: int) -> np.ndarray:
    return CODEC.pack(torch.full((1, 2, 3), float(100 * view + sample)), torch.zeros(1, dtype=torch.long))


def written(folder: Path, units: list[Unit] | None = None, absent: int = -1) -> Writer:
    writer = Writer(folder, facts())
    assert writer.begin(VIEWS) == VIEWS
    writer.allocate(VIEWS)
    for unit in writer.missing(VIEWS) if units is None else units:
        for sample in range(unit.first, unit.last):
            writer.write(unit, sample, absent_row(CODEC) if sample == absent else row_of(unit.view, sample))
        writer.mark(unit, 0, [absent] if unit.first <= absent < unit.last else [])
    return writer


@pytest.fixture
def cache(tmp_path: Path) -> TeacherCache:
    written(tmp_path, absent=7).finish(VIEWS, ["a", "b"])
    return TeacherCache.open(tmp_path)


def test_every_row_is_in_one_unit_and_every_unit_is_cut_into_the_same_batches():
    units = list(Division(SAMPLES, 10, 4).units(VIEWS))
    assert [(unit.name, unit.first, unit.last) for unit in units[:3]] == [
        ("0000-0000", 0, 10),
        ("0000-0001", 10, 20),
        ("0000-0002", 20, 23),
    ]
    entries = Entries(units, 4)
    assert len(entries) == 14
    for view in range(VIEWS):
        seen = [samples for number in range(len(entries)) for samples in [entries[number][1]] if entries[number][0] == view]
        assert np.concatenate(seen).tolist() == list(range(SAMPLES))
        assert [len(each) for each in seen] == [4, 4, 2, 4, 4, 2, 3]
    shared = [*Entries(units[::2], 4)[0][1].tolist(), *Entries(units[1::2], 4)[0][1].tolist()]
    assert shared == [0, 1, 2, 3, 10, 11, 12, 13]


def test_rows_are_read_by_view_and_sample_in_any_order(cache: TeacherCache):
    samples = np.array([22, 0, 13, 13])
    rows = torch.from_numpy(cache.read(1, samples))
    assert cache.codec.unpack(rows, torch.zeros(4))[:, 0, 0].tolist() == [122, 100, 113, 113]
    assert cache.absent == [7]
    with pytest.raises(CacheError, match="row of sample 7 in view 0 is not whole"):
        cache.read(0, np.array([3, 7, 8]))


def test_numpy_opens_a_view(cache: TeacherCache):
    rows = np.load(view_path(cache.folder, 1), mmap_mode="r")
    assert rows["cell"][22].tolist() == [[122.0] * 3] * 2


def test_a_file_that_shrinks_while_it_is_read_is_named(cache: TeacherCache):
    cache.read(0, np.array([22]))
    with view_path(cache.folder, 0).open("r+b") as file:
        file.truncate(file.seek(0, 2) - 4)
    with pytest.raises(CacheError, match=r"view-0000\.npy: cut short since the start; `rm .*0000-\*`"):
        cache.read(0, np.array([22]))


def test_what_is_missing_is_exactly_what_has_no_marker_and_nobody_reads_it_before_the_end(tmp_path: Path):
    some = list(Division(SAMPLES, 10, 4).units(VIEWS))[1:3]
    writer = written(tmp_path, some)
    assert [unit.name for unit in writer.missing(VIEWS)] == ["0000-0000", "0001-0000", "0001-0001", "0001-0002"]
    with pytest.raises(ValueError, match="not finished; run the same command"):
        TeacherCache.open(tmp_path)
    before = view_path(tmp_path, 0).read_bytes()
    again = Writer(tmp_path, facts())
    again.begin(VIEWS)
    again.allocate(VIEWS)
    assert view_path(tmp_path, 0).read_bytes() == before
    with pytest.raises(ValueError, match="no teacher cache in it; make one with"):
        TeacherCache.open(tmp_path / "elsewhere")


def test_a_finished_cache_gets_more_views_and_never_fewer(cache: TeacherCache):
    writer = Writer(cache.folder, facts())
    assert writer.begin(1) == VIEWS
    assert writer.whole(VIEWS)
    TeacherCache.open(cache.folder)
    assert writer.begin(VIEWS + 1) == VIEWS + 1
    assert [unit.view for unit in writer.missing(VIEWS + 1)] == [2, 2, 2]
    again = TeacherCache.open(cache.folder)
    assert again.views == VIEWS, "what is whole can be read while views are added"
    assert again.identity == cache.identity


def test_a_cache_is_known_by_the_views_that_are_used(cache: TeacherCache):
    before = TeacherCache.open(cache.folder, used=1).identity
    assert before != cache.identity
    writer = Writer(cache.folder, facts())
    writer.begin(VIEWS + 1)
    writer.allocate(VIEWS + 1)
    for unit in writer.missing(VIEWS + 1):
        writer.mark(unit, 0, [])
    writer.finish(VIEWS + 1, ["a", "b", "c"])
    assert TeacherCache.open(cache.folder, used=VIEWS).identity == cache.identity
    assert TeacherCache.open(cache.folder, used=1).identity == before
    assert TeacherCache.open(cache.folder).identity != cache.identity


def test_rows_that_a_file_lost_are_missing_and_nobody_reads_it_until_they_are_there_again(cache: TeacherCache):
    with view_path(cache.folder, 0).open("r+b") as file:
        file.truncate(file.seek(0, 2) - 4)
    view_path(cache.folder, 1).unlink()
    with pytest.raises(ValueError, match=r"view-0000.npy has .* bytes of .*, view-0001.npy has 0 bytes of .*0001-\*"):
        TeacherCache.open(cache.folder)
    writer = Writer(cache.folder, facts())
    assert not writer.whole(VIEWS)
    writer.begin(VIEWS)
    assert [unit.name for unit in writer.missing(VIEWS)] == ["0000-0002", "0001-0000", "0001-0001", "0001-0002"]
    writer.allocate(VIEWS)
    with pytest.raises(ValueError, match="not finished"):
        TeacherCache.open(cache.folder)


def test_rows_that_changed_are_found_by_the_checksum_of_their_unit(tmp_path: Path):
    writer = Writer(tmp_path, facts())
    writer.begin(1)
    writer.allocate(1)
    for unit in writer.missing(1):
        rows = np.concatenate([row_of(0, sample) for sample in range(unit.first, unit.last)])
        writer.write(unit, unit.first, rows)
        writer.mark(unit, zlib.crc32(rows.tobytes()), [])
    assert writer.hashed(0) == (file_sha256(view_path(tmp_path, 0)), [])
    with view_path(tmp_path, 0).open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"x")
    _, damaged = writer.hashed(0)
    assert [unit.name for unit in damaged] == ["0000-0002"]
    writer.forget(damaged)
    assert writer.missing(1) == damaged


def test_files_of_which_nothing_says_what_they_are_are_left_alone(cache: TeacherCache, tmp_path: Path):
    (cache.folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="nothing says what it is; give another --out"):
        Writer(cache.folder, facts()).begin(VIEWS)
    other = tmp_path / "other"
    other.mkdir()
    view_path(other, 0).write_text("mine")
    with pytest.raises(ValueError, match="nothing says what it is"):
        Writer(other, facts()).begin(VIEWS)
    assert view_path(other, 0).read_text() == "mine"


def test_a_request_of_which_nothing_was_made_may_be_another_one(tmp_path: Path):
    Writer(tmp_path, facts()).begin(VIEWS)
    assert Writer(tmp_path, facts(unit=5)).begin(VIEWS) == VIEWS


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("manifest.json", "[]", "holds a list"),
        ("manifest.json", '{"format": 1}', "manifest.json: damaged (.*views"),
        ("absent.jsonl", None, "absent.jsonl: cannot be read .*remove it, and the same command"),
        ("absent.jsonl", "x", "absent.jsonl: cannot be read .*remove it, and the same command"),
    ],
)
def test_a_damaged_list_is_named(cache: TeacherCache, name: str, content: str | None, said: str):
    (cache.folder / name).unlink()
    if content is not None:
        (cache.folder / name).write_text(content)
    with pytest.raises(ValueError, match=said.replace("damaged (", r"damaged \(")):
        TeacherCache.open(cache.folder)


def test_another_request_is_refused_with_every_difference(cache: TeacherCache):
    other = Writer(cache.folder, facts(unit=5, teacher={"name": "u"}))
    with pytest.raises(
        ValueError, match=r"holds another cache(?s:.)*unit: 10 in the cache, 5 asked\n  teacher.name: 't' in the"
    ):
        other.begin(VIEWS)
    assert differences(facts(made_with={"torch": "1"}), facts(made_with={"torch": "2"})) == []
    assert differences({"size": [1, 2]}, {"size": (1, 2)}) == []


def test_a_cache_of_another_format_or_a_damaged_manifest_is_refused(cache: TeacherCache):
    manifest = cache.folder / "manifest.json"
    found = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**found, "format": 0}))
    with pytest.raises(ValueError, match="a cache of format 0, this version reads 1"):
        TeacherCache.open(cache.folder)
    manifest.write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        TeacherCache.open(cache.folder)

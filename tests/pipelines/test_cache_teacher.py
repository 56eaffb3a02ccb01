"""A teacher that is paid for once, by real processes: made at any kill, read exactly, refused whenever it is another's."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.agreement import Control
from distill.config import RecipeError
from distill.data.index import ShardIndex
from distill.models.cells import headed_logits
from distill.teacher_cache.files import TeacherCache, view_path
from pipelines.measure.show import as_text
from pipelines.measure.timeline import DATA, TEACHER
from pipelines.reporting.curves import cost_facts
from pipelines.reporting.runs import RunRecord
from pipelines.setup.build import build
from pipelines.setup.data import build_splits
from pipelines.setup.machine import collective_timeout
from tests.conftest import TRAIN_IMAGES
from tests.measured import arguments as ledger
from tests.measured import measured
from tests.processes import CACHE, finished, start
from tests.runs import arguments, assert_same_run, last_state, metrics, recipe_of

VIEWS = 3
FINE = ("--loss.msdcrd", "null", "--loss.sdd.scales", "[1, 2, 4]")
"""What the cache is made for; runs ask for scales 1 and 2."""
CALM = ("--loss.msdcrd", "null", "--loss.sdd.scales", "[1, 2]", "--optim.learning_rate", "0.001", "--train.epochs", "2")
"""A rate at which rounding does not grow from step to step."""


def prepass(digits: Path, out: Path, *more: str, views: int = VIEWS) -> list[str]:
    """The command line of a pre-pass; of a recipe it takes what a run takes but its folder."""
    recipe = arguments(digits, out, *FINE, *more)
    return ["--views", str(views), "--batch", "16", "--unit", "32", *recipe]


@pytest.fixture(scope="session")
def made(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache; tests copy what they spoil."""
    folder = tmp_path_factory.mktemp("caches")
    finished(prepass(digits, folder / "cache"), folder / "log", command=CACHE)
    return folder / "cache"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))


def files(folder: Path) -> dict[str, bytes]:
    """What a cache is: its views, and what the manifest says of them."""
    return {path.name: path.read_bytes() for path in folder.glob("*.*") if path.name != ".lock"}


def refused(argv: Sequence[str], log: Path, code: int = 2, command: str = "pipelines.imagenet") -> str:
    return finished(argv, log, codes=code, command=command).text()


@pytest.fixture
def built(digits: Path, tmp_path: Path, accelerator) -> Iterator:
    """Makes a run's objects here; its loaders are closed afterwards."""
    runs = []

    def make(*more: str):
        recipe = recipe_of(digits, tmp_path / "run", *CALM, *more)
        splits = build_splits(recipe, accelerator)
        runs.append(build(recipe, accelerator, splits, Control(collective_timeout(recipe))))
        return runs[-1]

    yield make
    for run, _ in runs:
        run.train_loader.close()
        run.eval_loader.close()


# The same run as with a live teacher


def test_a_cached_run_has_the_losses_of_a_live_run_with_the_same_views(digits: Path, made: Path, tmp_path: Path):
    """Every logged value of every step; the run asks for scales 1 and 2 of a cache of scales 1, 2 and 4."""
    cached, live = tmp_path / "cached", tmp_path / "live"
    job = finished(arguments(digits, cached, *CALM, "--teacher.cache", str(made), "--augment.views", "2"), tmp_path / "1.log")
    assert "features fp16" in job.text()
    finished(arguments(digits, live, *CALM, "--augment.views", "2"), tmp_path / "2.log")
    for a, b in zip(metrics(cached), metrics(live), strict=True):
        for name in (n for n in a if n.startswith(("loss/", "sdd/"))):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), (a["step"], name)
    facts = cost_facts(RunRecord.read(cached, "cached")) + cost_facts(RunRecord.read(live, "live"))
    assert ["its teacher was read from a cache (features fp16, " in each for each in facts] == [True, False]


def test_the_ledger_of_a_cached_step_has_what_is_left_of_the_teacher_and_what_is_read(digits: Path, made: Path, tmp_path: Path):
    """No trunk is run; the live teacher, which is, is measured apart."""
    report = measured([*ledger(digits), *CALM, "--teacher.cache", str(made)], tmp_path / "ledger.json")
    assert report.cache is not None
    assert report.cache.row_bytes == 2048
    [left] = [part for part in report.parts if part.name == TEACHER]
    assert left.alone_ms is None
    saved, wait = report.cache.live_teacher_ms - left.ms, report.part_ms(DATA)
    assert report.cache.live_ms == pytest.approx(report.step.ms + saved - min(saved, wait)), "a longer step waits less for data"
    assert TEACHER not in report.ceiling.gigaflops_per_image
    index = ShardIndex.open(digits / "train")
    assert report.traffic.bytes_per_image == pytest.approx(index.records["size"].mean() + 2048)
    for part in ("teacher cache: 2,048 bytes an image", "MB/s read", "ms are left of the teacher", "a million images take"):
        assert part in as_text(report)


def test_samples_pixels_and_the_teachers_logits_are_those_of_a_live_run(made: Path, built):
    (cached, _), (live, models) = built("--teacher.cache", str(made)), built("--augment.views", str(VIEWS))
    for epoch in (1, VIEWS + 1):
        for a, b in zip(cached.train_loader.epoch(epoch), live.train_loader.epoch(epoch), strict=True):
            assert torch.equal(a.sample_ids, b.sample_ids)
            assert torch.equal(a.images, b.images)
            with torch.no_grad():
                pixels, _ = live.transform(b, epoch)
                found, wanted = cached.teacher(pixels, a), live.teacher(pixels, b)
            backbone = models.teacher.backbone
            apart = headed_logits(backbone, found._replace(region_logits=dict(found.region_logits))) - headed_logits(
                backbone, wanted
            )
            assert apart.abs().max() < 1e-3 * wanted.logits.std()


@pytest.mark.parametrize("codec", [("--dtype", "uint8"), ("--codec", "topk", "--k", "4")], ids=["uint8", "topk"])
def test_the_other_codecs_serve_a_run(digits: Path, codec: tuple[str, ...], tmp_path: Path):
    one = ("--loss.sdd.temperature", "1", "--teacher.cache", str(tmp_path / "cache"))
    finished([*prepass(digits, tmp_path / "cache", *one[:2], views=1), *codec], tmp_path / "make.log", command=CACHE)
    finished(arguments(digits, tmp_path / "run", *CALM, *one, "--train.max_steps", "2"), tmp_path / "run.log")
    live = arguments(digits, tmp_path / "live", *CALM, *one[:2], "--augment.views", "1", "--train.max_steps", "2")
    finished(live, tmp_path / "live.log")
    found, wanted = metrics(tmp_path / "run")[0], metrics(tmp_path / "live")[0]
    assert found["loss/sdd"] == pytest.approx(wanted["loss/sdd"], rel=0.02 if "uint8" in codec else 0.1)


def test_a_run_on_a_cache_resumes_in_the_middle_of_an_epoch_bit_for_bit(digits: Path, made: Path, tmp_path: Path):
    options = [*CALM, "--teacher.cache", str(made), "--train.checkpoint_every", "2"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finished(arguments(digits, straight, *options), tmp_path / "1.log")
    job = start(arguments(digits, killed, *options), tmp_path / "2.log")
    job.wait_until(lambda: (killed / "checkpoints" / "step-00000008").is_dir() or len(list(killed.glob("checkpoints/*8"))) > 0)
    job.kill()
    finished([*arguments(digits, killed, *options), "--resume"], tmp_path / "2.log")
    assert_same_run(straight, killed)


def test_a_run_on_a_cache_goes_on_with_more_processes_to_the_same_losses(digits: Path, made: Path, tmp_path: Path):
    options = [*CALM, "--teacher.cache", str(made), "--train.checkpoint_every", "2", "--student.batchnorm", "frozen"]
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    finished(arguments(digits, straight, *options), tmp_path / "1.log", world_size=2)
    finished(arguments(digits, moved, *options, "--train.max_steps", "8"), tmp_path / "2.log", world_size=2)
    finished([*arguments(digits, moved, *options), "--resume"], tmp_path / "2.log", world_size=4)
    steps = [{line["step"]: line for line in metrics(out) if "loss/total" in line} for out in (straight, moved)]
    assert steps[0].keys() == steps[1].keys()
    for step, line in steps[0].items():
        assert steps[1][step]["loss/sdd"] == pytest.approx(line["loss/sdd"], rel=1e-5), step


# Making it


def test_a_pre_pass_that_is_killed_is_finished_by_any_number_of_processes_to_the_same_bytes(
    digits: Path, made: Path, tmp_path: Path
):
    out = tmp_path / "cache"
    for attempt, world in enumerate((1, 2)):
        job = start(prepass(digits, out), tmp_path / "log", world_size=world, command=CACHE)
        before = len(list(out.glob("done/*")))
        job.wait_until(lambda before=before: len(list(out.glob("done/*-*"))) >= before + 3)
        job.kill()
        assert not (out / "manifest.json").exists(), f"attempt {attempt} was over before it was killed"
    text = refused(arguments(digits, tmp_path / "run", *CALM, "--teacher.cache", str(out)), tmp_path / "refused.log")
    assert "this cache is not finished; run the same command of pipelines/cache_teacher.py again" in text
    job = finished(prepass(digits, out), tmp_path / "log", world_size=3, command=CACHE)
    assert files(out) == files(made)
    assert f"of {VIEWS * TRAIN_IMAGES} entries to compute" in job.text()
    assert "this cache is finished" in finished(prepass(digits, out), tmp_path / "again", command=CACHE).text()


def test_three_processes_make_what_one_makes_whatever_the_batch_of_a_training(digits: Path, made: Path, tmp_path: Path):
    out = tmp_path / "cache"
    finished([*prepass(digits, out), "--train.global_batch_size", "16"], tmp_path / "log", world_size=3, command=CACHE)
    assert files(out) == files(made)


def test_a_teacher_that_must_be_trained_first_has_no_cache_and_that_is_said_before(digits: Path, made: Path, tmp_path: Path):
    asked = [*CALM, "--teacher.cache", str(made), "--teacher-weights", "train"]
    text = refused(arguments(digits, tmp_path / "run", *asked), tmp_path / "log")
    assert "a cache is of a teacher that exists: train it first" in text
    assert not (tmp_path / "run" / "teacher" / "metrics.jsonl").exists()


def test_a_run_with_its_own_number_of_views_goes_on_after_others_were_added(digits: Path, copy: Path, tmp_path: Path):
    asked = [*CALM, "--teacher.cache", str(copy), "--augment.views", str(VIEWS)]
    finished(arguments(digits, tmp_path / "run", *asked, "--train.max_steps", "2"), tmp_path / "1.log")
    finished(prepass(digits, copy, views=VIEWS + 1), tmp_path / "2.log", command=CACHE)
    finished([*arguments(digits, tmp_path / "run", *asked, "--train.max_steps", "3"), "--resume"], tmp_path / "3.log")


def test_views_are_added_to_a_cache_and_another_recipe_is_refused_with_every_difference(
    digits: Path, made: Path, tmp_path: Path
):
    out = tmp_path / "cache"
    finished(prepass(digits, out, views=1), tmp_path / "1.log", command=CACHE)
    other = prepass(digits, out, "--augment.padding", "3", "--augment.view_seed", "1")
    text = refused(other, tmp_path / "2.log", command=CACHE)
    assert "transform.padding: 2 in the cache, 3 asked" in text
    assert "view_seed: 0 in the cache, 1 asked" in text
    finished(prepass(digits, out), tmp_path / "3.log", command=CACHE)
    assert files(out) == files(made)


def test_what_it_costs_and_when_it_pays_is_said_before_it_starts(digits: Path, tmp_path: Path):
    text = finished(prepass(digits, tmp_path / "cache", views=2), tmp_path / "log", command=CACHE).text()
    said = text[: text.index("100.0%")]
    # 16 cells of 64 channels in two bytes
    assert "codec features (cells 16, channels 64, dtype fp16): 2,048 bytes an image" in said.replace(
        "dtype fp16, cells 16, channels 64", "cells 16, channels 64, dtype fp16"
    )
    for part in (f"290 of {2 * TRAIN_IMAGES} entries", "hours at", "images/s", "it pays from", "times 2, the recipe's"):
        assert part in said


def test_a_disk_that_cannot_hold_the_views_is_said_with_both_numbers_before_anything_is_written(digits: Path, tmp_path: Path):
    out = tmp_path / "cache"
    text = refused(prepass(digits, out, views=10**9), tmp_path / "1.log", code=1, command=CACHE)
    assert f"{10**9} views need " in text
    assert "the disk has" in text
    job = start(prepass(digits, tmp_path / "other"), tmp_path / "2.log", file_limit=100_000, command=CACHE)
    assert job.wait() == [1]
    assert "views need" in job.text()
    for folder in (out, tmp_path / "other"):
        assert not list(folder.glob("view-*"))
        assert not list(folder.glob("done/*"))


def test_two_pre_passes_do_not_write_into_one_folder(digits: Path, tmp_path: Path):
    out = tmp_path / "cache"
    first = start(prepass(digits, out, views=50), tmp_path / "1.log", command=CACHE)
    first.wait_until(lambda: len(list(out.glob("done/*-*"))) > 0)
    text = refused(prepass(digits, out, views=50), tmp_path / "2.log", command=CACHE)
    first.kill()
    assert f"another process is writing to {out}" in text


# The failure table


def test_every_difference_between_a_cache_and_a_recipe_is_said_at_once(digits: Path, made: Path, tmp_path: Path):
    options = [
        "--data.image_size",
        "40",
        "--data.interpolation",
        "bilinear",
        "--augment.flip",
        "0.5",
        "--augment.view_seed",
        "3",
    ]
    options += ["--augment.rand_augment", "rand-m9-mstd0.5-inc1", "--augment.views", "5", "--seed", "1"]
    options += ["--loss.sdd.scales", "[1, 2, 4, 8]", "--teacher.precision", "bf16", "--data.loader", "reference"]
    options += ["--train", str(digits / "val"), "--train.global_batch_size", "12"]
    text = refused(arguments(digits, tmp_path / "run", *CALM, *options, "--teacher.cache", str(made)), tmp_path / "log")
    for line in (
        "num_samples: 145 in the cache, 37 asked",
        "index_sha256: ",
        "view_seed: 0 in the cache, 3 asked",
        "image_size: [32, 32] in the cache, [40, 40] asked",
        "transform.flip: 0.0 in the cache, 0.5 asked",
        "transform.interpolation: 'bicubic' in the cache, 'bilinear' asked",
        "transform.rand_augment: None in the cache, 'rand-m9-mstd0.5-inc1' asked",
        "asked\n  teacher.weights_sha256: ",  # another seed made other random weights
        "teacher.precision: 'no' in the cache, 'bf16' asked",
        "augment.views: 3 in the cache, 5 asked",
        "regions: [{'scales': [1, 2, 4], ",
    ):
        assert line in text, line
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            ["--augment.mixup", "0.2", "--loss.sdd.base", "kd", "--loss.sdd.alpha", "null", "--loss.sdd.beta", "null"],
            "augment.mixup 0.2: the teacher must see the mixture",
        ),
        (
            ["--augment.cutmix", "1.0", "--loss.sdd.base", "kd", "--loss.sdd.alpha", "null", "--loss.sdd.beta", "null"],
            "augment.cutmix 1.0: the teacher must see the mixture",
        ),
        (["--augment.erasing", "0.3"], "augment.erasing 0.3: the teacher must see what is left"),
        (["--loss.msdcrd.weight", "1"], "loss.msdcrd: reads whole maps of the teacher, "),
        (["--loss.fitnet.weight", "1"], "GB for each view in float16"),
        (["--teacher", "none", "--loss.sdd", "null"], "there is no teacher whose outputs could be kept"),
    ],
    ids=["mixup", "cutmix", "erasing", "stages of msdcrd", "stages of fitnet", "no teacher"],
)
def test_what_a_cache_cannot_serve_is_refused_with_the_reason(options: list[str], reason: str, made: Path, built):
    with pytest.raises(RecipeError, match=reason.replace("(", r"\(")):
        built("--teacher.cache", str(made), *options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--loss.kd.weight", "1"], "loss.kd: reads the teacher's logits at temperature 4; .* --loss.kd.temperature 1"),
        (["--loss.dist.weight", "1"], "loss.dist: reads the teacher's logits not through a softmax alone"),
        (["--loss.rkd.weight", "1"], "loss.rkd: reads features, and codec topk keeps logits alone"),
    ],
    ids=["temperature", "correlations", "embeddings"],
)
def test_topk_is_refused_where_it_would_give_wrong_gradients(
    options: list[str], reason: str, digits: Path, tmp_path: Path, accelerator
):
    from pipelines.cache_teacher import main

    argv = [*prepass(digits, tmp_path / "cache", "--loss.sdd.temperature", "1", *options), "--codec", "topk", "--k", "4"]
    with pytest.raises(RecipeError, match=reason):
        main.__wrapped__(argv)


def test_weights_that_changed_under_one_name_are_refused(digits: Path, tmp_path: Path, made: Path):
    import timm
    from safetensors.torch import save_file

    weights = tmp_path / "teacher.safetensors"
    torch.manual_seed(0)
    state = timm.create_model("cifar_resnet14", num_classes=10).state_dict()
    save_file(state, weights)
    one = ["--teacher-weights", str(weights), *FINE[2:]]
    finished(prepass(digits, tmp_path / "cache", *one, views=1), tmp_path / "1.log", command=CACHE)
    last = list(state)[-1]
    save_file({**state, last: state[last] + 1e-3}, weights)
    text = refused(
        arguments(digits, tmp_path / "run", *CALM, *one, "--teacher.cache", str(tmp_path / "cache")), tmp_path / "2.log"
    )
    assert text.count("teacher.weights_sha256: ") == 1
    assert text.count(" asked") >= 1


def test_rows_of_flipped_windows_under_the_right_manifest_are_found(digits: Path, copy: Path, tmp_path: Path):
    """One view of several: its images were flipped, nothing else."""
    finished(prepass(digits, tmp_path / "flipped", "--augment.flip", "1.0"), tmp_path / "1.log", command=CACHE)
    shutil.copy(view_path(tmp_path / "flipped", 1), view_path(copy, 1))
    text = refused(arguments(digits, tmp_path / "run", *CALM, "--teacher.cache", str(copy)), tmp_path / "2.log", code=1)
    assert "view 1 is not what loader and teacher give now: logits differ by " in text


def test_a_damaged_file_is_named_and_made_again_to_the_same_bytes(digits: Path, copy: Path, made: Path, tmp_path: Path):
    run, verify = arguments(digits, tmp_path / "run", *CALM, "--teacher.cache", str(copy)), ["--out", str(copy), "--verify"]
    assert f"{VIEWS} views are as they were made" in finished(verify, tmp_path / "0.log", command=CACHE).text()
    rows = np.load(view_path(copy, 1), mmap_mode="r+")
    rows.view(np.uint8).reshape(-1)[10_000] ^= 1
    rows.flush()
    text = refused(verify, tmp_path / "1.log", command=CACHE)
    assert "view-0001.npy changed since the cache was made" in text
    grow = prepass(digits, copy, views=VIEWS + 1)
    text = refused(grow, tmp_path / "2.log", code=1, command=CACHE)
    assert "rows of view-0001.npy changed since they were written; the same command makes them again" in text
    with view_path(copy, 2).open("r+b") as file:
        file.truncate(50_000)
    assert "view-0002.npy has 50,000 bytes of " in refused(run, tmp_path / "3.log")
    finished(grow, tmp_path / "4.log", command=CACHE)
    for view in range(VIEWS):
        assert view_path(copy, view).read_bytes() == view_path(made, view).read_bytes()
    finished(verify, tmp_path / "5.log", command=CACHE)


def test_a_row_that_is_not_finite_ends_the_run_with_its_sample_and_view(digits: Path, copy: Path, tmp_path: Path):
    cache = TeacherCache.open(copy)
    from pipelines.setup.teacher_cache import chosen_entries

    looked_at = {view: set(samples.tolist()) for view, samples in chosen_entries(cache, VIEWS)}
    sample = next(i for i in range(TRAIN_IMAGES) if i not in looked_at[0])
    rows = np.load(view_path(copy, 0), mmap_mode="r+")
    rows["cell"][sample, 3, 7] = np.nan
    rows.flush()
    argv = arguments(digits, tmp_path / "run", *CALM, "--train.global_batch_size", "145", "--teacher.cache", str(copy))
    text = refused(argv, tmp_path / "log", code=1)
    assert f"the row of sample {sample} in view 0 is not whole" in text


def spoil(index: ShardIndex, sample: int) -> bytes:
    """Damages the sample's bytes in its shard; what was there."""
    record = index.records[sample]
    with index.shard_path(int(record["shard"])).open("r+b") as file:
        file.seek(int(record["offset"]) + 100)
        before = file.read(8)
        file.seek(int(record["offset"]) + 100)
        file.write(bytes(b ^ 255 for b in before))
    return before


@pytest.fixture
def own_digits(digits: Path, tmp_path: Path) -> Path:
    """Shards that a test may spoil."""
    return Path(shutil.copytree(digits, tmp_path / "digits", ignore=shutil.ignore_patterns("images")))


def test_a_sample_that_went_bad_after_the_pre_pass_is_replaced_by_one_with_its_own_entry(
    own_digits: Path, made: Path, tmp_path: Path
):
    options = [*CALM, "--data.max_bad_rate", "0.05"]
    spoil(ShardIndex.open(own_digits / "train"), 11)
    cached, live = tmp_path / "cached", tmp_path / "live"
    finished(arguments(own_digits, cached, *options, "--teacher.cache", str(made)), tmp_path / "1.log")
    finished(arguments(own_digits, live, *options, "--augment.views", str(VIEWS)), tmp_path / "2.log")
    assert json.loads((cached / "summary.json").read_text())["bad_samples"] == 1
    for a, b in zip(metrics(cached), metrics(live), strict=True):
        if "loss/sdd" in a:
            assert a["loss/sdd"] == pytest.approx(b["loss/sdd"], rel=1e-3), a["step"]


def test_a_sample_that_was_bad_in_the_pre_pass_is_replaced_in_every_run(own_digits: Path, tmp_path: Path):
    index = ShardIndex.open(own_digits / "train")
    before, out = spoil(index, 11), tmp_path / "cache"
    refused(prepass(own_digits, out, "--data.max_bad_rate", "0", views=1), tmp_path / "0.log", code=1, command=CACHE)
    more = ["--data.max_bad_rate", "0.05"]
    finished(prepass(own_digits, out, *more, views=1), tmp_path / "1.log", world_size=2, command=CACHE)
    assert [json.loads(line) for line in (out / "absent.jsonl").read_text().splitlines()] == [{"sample": 11, "views": [0]}]
    record = index.records[11]
    with index.shard_path(int(record["shard"])).open("r+b") as file:
        file.seek(int(record["offset"]) + 100)
        file.write(before)
    run = arguments(own_digits, tmp_path / "run", *CALM, *more, "--teacher.cache", str(out))
    text = refused([*run, "--data.max_bad_rate", "0"], tmp_path / "3.log")
    assert "1 samples could not be read when the cache was made" in text
    finished(run, tmp_path / "2.log")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["bad_samples"] == 1


@pytest.mark.parametrize("other", ["views", "cache", "live"])
def test_a_run_goes_on_with_its_own_cache_and_views_only(other: str, digits: Path, made: Path, copy: Path, tmp_path: Path):
    out = tmp_path / "run"
    first = [*CALM, "--train.max_steps", "2", "--teacher.cache", str(made)]
    finished(arguments(digits, out, *first), tmp_path / "1.log")
    more = {
        "views": ["--teacher.cache", str(made), "--augment.views", "2"],
        "cache": ["--teacher.cache", str(copy)],
        "live": [],
    }
    if other == "cache":
        finished([*prepass(digits, copy, views=VIEWS + 1)], tmp_path / "2.log", command=CACHE)
    text = refused([*arguments(digits, out, *CALM, *more[other]), "--resume"], tmp_path / "3.log")
    said = {
        "views": "augment.views: 0 in the run, 2 asked",
        "cache": "other teacher_cache (features fp16, ",
        "live": "other teacher_cache (features fp16, ",
    }
    assert said[other] in text
    assert last_state(out)

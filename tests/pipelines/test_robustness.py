"""A run that cannot be lost: each way of dying, by real processes, and what is left afterwards."""

import contextlib
import json
import os
import random
import re
import signal
import tarfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import VAL_IMAGES
from tests.processes import finished, start
from tests.runs import EVERYTHING, arguments, assert_same_run, last_state, metrics, steps_of

FROZEN = ["--student.batchnorm", "frozen", "--optim.learning_rate", "0.001"]
"""BatchNorm sees no batch, so that its split over processes makes no difference."""


def began(out: Path, steps: int) -> bool:
    return (out / "metrics.jsonl").is_file() and len(steps_of(out)) >= steps


def keys_of(split: Path) -> set[str]:
    """The keys in a split's shards, as tarfile reads them."""
    keys: set[str] = set()
    for shard in split.glob("*.tar"):
        with tarfile.open(shard) as tar:
            keys |= {Path(name).stem for name in tar.getnames()}
    return keys


def test_killed_while_saving_and_while_evaluating_is_the_uninterrupted_run(digits: Path, tmp_path: Path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finished(arguments(digits, straight, *EVERYTHING), tmp_path / "straight.log")
    command = arguments(digits, killed, *EVERYTHING, "--train.evaluate_batch_size", "2", "--resume")

    def saving() -> bool:
        return any((killed / "checkpoints").glob(".writing-*"))

    def evaluating() -> bool:
        return began(killed, 6) and not any("eval/top1" in line for line in metrics(killed))

    for moment in (saving, evaluating):
        job = start(command, tmp_path / "killed.log")
        job.wait_until(moment)
        job.kill()
    finished(arguments(digits, killed, *EVERYTHING, "--resume"), tmp_path / "killed.log")
    assert_same_run(straight, killed)


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(digits: Path, tmp_path: Path):
    straight, damaged = tmp_path / "straight", tmp_path / "damaged"
    finished(arguments(digits, straight, *EVERYTHING), tmp_path / "straight.log")
    command = arguments(digits, damaged, *EVERYTHING, "--resume")
    job = start(command, tmp_path / "log")
    job.wait_until(lambda: began(damaged, 5))
    os.kill(job.ranks[0].pid, signal.SIGTERM)
    assert job.wait() == [75]
    newest = damaged / "checkpoints" / (damaged / "checkpoints" / "LAST").read_text()
    weights = bytearray((newest / "student.safetensors").read_bytes())
    weights[-1] ^= 1
    (newest / "student.safetensors").write_bytes(weights)
    finished(command, tmp_path / "log")
    assert "damaged, its checksum is not the one that was written; trying the one before" in (tmp_path / "log").read_text()
    assert_same_run(straight, damaged)


def test_checkpoints_also_come_by_the_clock_and_say_what_they_cost(digits: Path, tmp_path: Path):
    out = tmp_path / "run"
    more = ["--train.epochs", "1", "--train.checkpoint_minutes", "0.0001", "--train.keep_checkpoints", "9"]
    finished(arguments(digits, out, *more), tmp_path / "log")
    assert sorted(p.name for p in (out / "checkpoints").glob("step-*")) == [f"step-{n:08d}" for n in range(1, 7)]
    costs = json.loads((out / "summary.json").read_text())["checkpoint_seconds"]
    assert costs.keys() == {"copying", "waiting", "writing"}
    assert costs["writing"] > 0


def test_a_full_disk_stops_the_run_with_the_reason_and_loses_nothing(digits: Path, tmp_path: Path):
    straight, full = tmp_path / "straight", tmp_path / "full"
    finished(arguments(digits, straight, *EVERYTHING), tmp_path / "straight.log")
    command = arguments(digits, full, *EVERYTHING, "--resume")
    job = start(command, tmp_path / "log")
    job.wait_until(lambda: began(full, 2))
    os.kill(job.ranks[0].pid, signal.SIGTERM)
    assert job.wait() == [75]
    before = last_state(full)
    job = start(command, tmp_path / "full.log", file_limit=100_000)  # less than the student's weights
    assert job.wait() == [1]
    assert re.search(r"CheckpointError: .*cannot be written: .*; the checkpoints before it are intact", job.text())
    after = last_state(full)
    assert all((before[name] == after[name]).all() for name in before)
    finished(command, tmp_path / "log")
    assert_same_run(straight, full)


def test_a_stop_in_the_teachers_training_goes_on_there(digits: Path, tmp_path: Path):
    more = ["--teacher-weights", "train", "--teacher.epochs", "1", "--train.epochs", "1"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    finished(arguments(digits, straight, *more), tmp_path / "straight.log")
    command = arguments(digits, stopped, *more, "--resume")
    job = start(command, tmp_path / "log")
    job.wait_until(lambda: began(stopped / "teacher", 2))
    os.kill(job.ranks[0].pid, signal.SIGUSR1)
    os.kill(job.ranks[0].pid, signal.SIGUSR1)  # the second one changes nothing
    assert job.wait() == [75]
    assert not (stopped / "teacher" / "summary.json").exists()
    job = finished(arguments(digits, stopped, *more, "--teacher.epochs", "2"), tmp_path / "other.log", codes=2)
    assert "train.epochs: 1 in the run, 2 asked" in job.text()
    finished(command, tmp_path / "log")
    assert_same_run(straight / "teacher", stopped / "teacher")
    assert_same_run(straight, stopped)


def test_a_stop_in_an_evaluation_makes_it_again(digits: Path, tmp_path: Path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    more = ["--train.evaluate_batch_size", "2", "--resume"]
    finished(arguments(digits, straight, *more), tmp_path / "straight.log", world_size=2)
    command = arguments(digits, stopped, *more)
    job = start(command, tmp_path / "log", world_size=2)
    job.wait_until(lambda: began(stopped, 6))  # the epoch's last step is logged: what follows is its evaluation
    os.kill(job.ranks[1].pid, signal.SIGTERM)
    assert job.wait() == [75, 75], job.text()
    assert not any("eval/top1" in line for line in metrics(stopped)), "the signal came after the evaluation"
    assert "stopped in evaluation; the same command with --resume makes it again" in job.text()
    finished(command, tmp_path / "log", world_size=2)
    assert_same_run(straight, stopped)


def test_an_interrupted_run_goes_on_with_another_number_of_processes(digits: Path, tmp_path: Path):
    """The same global batches in the same order: the losses of an uninterrupted run, to 1e-5."""
    more = [*FROZEN, "--loss.msdcrd", "null"]
    straight, elastic = tmp_path / "straight", tmp_path / "elastic"
    finished(arguments(digits, straight, *more), tmp_path / "straight.log")
    command = arguments(digits, elastic, *more, "--resume")
    for world_size, steps in ((2, 2), (3, 6)):
        job = start(command, tmp_path / "log", world_size)
        job.wait_until(lambda s=steps: began(elastic, s))
        os.kill(job.ranks[0].pid, signal.SIGTERM)
        assert job.wait() == [75] * world_size, job.text()
        assert json.loads((elastic / "manifest.json").read_text())["world_size"] == world_size
    finished(command, tmp_path / "log")
    assert "2 processes before, 3 now; accumulate 1" in (tmp_path / "log").read_text()
    assert "3 processes before, 1 now; accumulate 3" in (tmp_path / "log").read_text()
    for a, b in zip(metrics(straight), metrics(elastic), strict=True):
        for name in (n for n in a if n.startswith("loss/")):
            assert a[name] == pytest.approx(b[name], rel=1e-5), (a["step"], name)


def test_a_global_batch_that_does_not_divide_is_refused_with_the_numbers(digits: Path, tmp_path: Path):
    out = tmp_path / "run"
    command = arguments(digits, out, "--train.global_batch_size", "25", "--resume")
    job = start(command, tmp_path / "log")
    job.wait_until(lambda: began(out, 1))
    os.kill(job.ranks[0].pid, signal.SIGTERM)
    assert job.wait() == [75]
    job = finished(command, tmp_path / "two.log", world_size=2, codes=2)
    assert "ran on 1 processes; its global batch 25 does not divide by 2" in job.text()


def test_two_at_once_in_one_folder_never_meet(digits: Path, tmp_path: Path):
    out = tmp_path / "run"
    first = start(arguments(digits, out, "--resume"), tmp_path / "first.log")
    first.wait_until(lambda: began(out, 1))
    os.kill(first.ranks[0].pid, signal.SIGSTOP)  # so that it is at work for as long as the second asks
    second = finished(arguments(digits, out, "--resume"), tmp_path / "second.log", codes=2)
    assert "another process is writing" in second.text()
    os.kill(first.ranks[0].pid, signal.SIGCONT)
    assert first.wait() == [0]
    assert f"--resume: {out} holds no run; a new one begins" in first.text()
    assert [json.loads(line)["step"] for line in steps_of(out)] == list(range(1, 13))


def test_a_poisoned_batch_on_one_rank_stops_all_before_the_step_or_is_skipped(digits: Path, tmp_path: Path):
    more = ["--train.checkpoint_every", "1", "--train.epochs", "1"]
    poison = {"SPOIL_LOSS": "1:3"}  # rank 1, third step
    straight, stopped, skipped = tmp_path / "straight", tmp_path / "stopped", tmp_path / "skipped"
    job = finished(arguments(digits, stopped, *more), tmp_path / "stopped.log", 2, codes=1, environment=poison)
    assert re.search(r"NonFiniteError: step 2, rank 1: .*loss/cross_entropy.* not finite; the step was not made", job.text())
    assert [json.loads(line)["step"] for line in steps_of(stopped)] == [1, 2]
    dump = json.loads((stopped / "nonfinite-step00000002-rank1.json").read_text())
    assert dump["not_finite"][:2] == ["loss/total", "loss/cross_entropy"]
    assert len(dump["samples"]) == 12
    assert set(dump["samples"]) < keys_of(digits / "train")
    finished(arguments(digits, stopped, *more, "--resume"), tmp_path / "stopped.log", 2)
    finished(arguments(digits, straight, *more), tmp_path / "straight.log", 2)
    assert_same_run(straight, stopped)
    more += ["--train.skip_nonfinite", "1", "--train.keep_checkpoints", "9"]
    finished(arguments(digits, skipped, *more), tmp_path / "skipped.log", 2, environment=poison)
    assert json.loads((skipped / "summary.json").read_text())["skipped_steps"] == 1
    before, after = (load_file(skipped / "checkpoints" / f"step-0000000{n}" / "student.safetensors") for n in (2, 3))
    assert [name for name in before if name.endswith("weight") and not torch.equal(before[name], after[name])] == []


def test_a_rank_that_dies_is_named_by_those_that_are_left(digits: Path, tmp_path: Path):
    out = tmp_path / "run"
    job = start(arguments(digits, out), tmp_path / "log", world_size=2)
    job.wait_until(lambda: began(out, 2))
    os.kill(job.ranks[1].pid, signal.SIGKILL)
    job.ranks[0].join(60)
    assert job.ranks[0].exitcode == 1
    assert re.search(r"PeerLostError: step \d+, .*gone: rank 1; the last checkpoint is intact", job.text())


def test_a_rank_that_hangs_ends_the_run_within_the_time_out_and_is_named(digits: Path, tmp_path: Path):
    """SIGSTOP: alive for the network, silent for the others. The others say who, and end."""
    out = tmp_path / "run"
    job = start(arguments(digits, out, "--train.timeout_minutes", "0.25"), tmp_path / "log", world_size=2)
    job.wait_until(lambda: began(out, 2))
    os.kill(job.ranks[1].pid, signal.SIGSTOP)
    job.ranks[0].join(60)
    assert job.ranks[0].exitcode == 1, job.text()
    assert re.search(r"rank 0: step \d+, .*: no progress for \d+ s \(train.timeout_minutes\); gone: rank 1", job.text())
    job.kill()


def test_a_loader_that_stalls_ends_the_run_on_every_rank_and_is_named(digits: Path, tmp_path: Path):
    command = arguments(digits, tmp_path / "run", "--train.timeout_minutes", "0.2")
    job = start(command, tmp_path / "log", world_size=2, environment={"STALL_LOADER": "1:40"})
    assert job.wait(120) == [1, 1], job.text()
    assert re.search(r"rank 0: .*no progress for \d+ s \(train.timeout_minutes\); behind: rank 1", job.text())
    assert re.search(r"rank 1: step \d+, waiting for data: no progress", job.text())


TWENTY_STEPS = [
    *("--train.global_batch_size", "8", "--train.max_steps", "20", "--train.epochs", "2", "--loss.kd.weight", "0.5"),
    *(
        "--loss.dkd.weight",
        "0.5",
        "--loss.nkd.weight",
        "0.5",
        "--loss.msdcrd.gather",
        "true",
        "--loss.msdcrd.projector",
        "none",
    ),
]
"""Every loss of the table at once; MSDCRD with all ranks' negatives and no projector, whose BatchNorm sees a local batch."""


def test_one_two_and_four_processes_give_the_same_losses_over_twenty_steps(digits: Path, tmp_path: Path):
    logs = {}
    for world_size in (1, 2, 4):
        out = tmp_path / str(world_size)
        finished(arguments(digits, out, *FROZEN, *TWENTY_STEPS), tmp_path / f"{world_size}.log", world_size)
        assert json.loads((out / "manifest.json").read_text())["world_size"] == world_size
        logs[world_size] = metrics(out)
    names = {n for n in logs[1][0] if n.startswith("loss/")}
    assert names == {f"loss/{n}" for n in ("total", "cross_entropy", "kd", "dkd", "nkd", "sdd", "msdcrd")}
    for world_size in (2, 4):
        for a, b in zip(logs[1], logs[world_size], strict=True):
            for name in names & a.keys():
                assert a[name] == pytest.approx(b[name], rel=1e-5), (world_size, a["step"], name)
        assert logs[world_size][-1]["eval/images"] == VAL_IMAGES
        assert logs[world_size][-1]["eval/top1"] == logs[1][-1]["eval/top1"]


def test_batch_local_contrast_is_of_the_local_batch(digits: Path, tmp_path: Path):
    """Without `gather` the negatives are the rank's own: fewer of them, a smaller loss; documented, not an error."""
    one, two = tmp_path / "one", tmp_path / "two"
    local = ["--loss.msdcrd.gather", "false", "--train.max_steps", "1"]
    finished(arguments(digits, one, *FROZEN, *TWENTY_STEPS, *local), tmp_path / "one.log")
    finished(arguments(digits, two, *FROZEN, *TWENTY_STEPS, *local), tmp_path / "two.log", world_size=2)
    assert metrics(two)[0]["loss/msdcrd"] < metrics(one)[0]["loss/msdcrd"] - 1
    assert metrics(two)[0]["loss/sdd"] == pytest.approx(metrics(one)[0]["loss/sdd"], rel=1e-5)


def test_killed_at_random_moments_it_ends_as_the_uninterrupted_run(digits: Path, tmp_path: Path):
    """The short version of `make chaos`: any rank, any signal, any moment of training."""
    dice = random.Random(20)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finished(arguments(digits, straight, *EVERYTHING), tmp_path / "straight.log", world_size=2)
    command = arguments(digits, killed, *EVERYTHING, "--resume")
    for _ in range(4):
        job = start(command, tmp_path / "killed.log", world_size=2)
        seen = len(steps_of(killed)) if (killed / "metrics.jsonl").is_file() else 0
        # a life that began after the last step has no step to wait for: it evaluates, and is over
        job.wait_until(lambda s=seen, j=job: j.is_over() or (began(killed, 1) and len(steps_of(killed)) != s))
        time.sleep(dice.uniform(0, 1.5))
        with contextlib.suppress(ProcessLookupError):
            os.kill(dice.choice(job.ranks).pid, dice.choice([signal.SIGKILL, signal.SIGTERM]))
        job.wait()
        if (killed / "summary.json").is_file():
            break
    finished(command, tmp_path / "killed.log", world_size=2)
    assert_same_run(straight, killed)

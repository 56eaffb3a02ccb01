"""Every loss of the table distils by the real command, killed and resumed, on one process and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import distill.models  # noqa: F401  (registers what a run exports)
from distill.losses import LOSSES
from tests.processes import finished, start
from tests.runs import arguments, assert_same_run, last_state, metrics, steps_of

WEIGHTS = {
    "cross_entropy": 1.0,
    **dict.fromkeys(("kd", "dkd", "nkd", "sdd", "ctkd", "dist", "wkd_logit", "cat_kd", "at", "reviewkd", "semckd"), 1.0),
    **dict.fromkeys(("sp", "pkt"), 3.0),
    **dict.fromkeys(("msdcrd", "crd", "wcord", "rkd", "fitnet"), 0.1),
    "wkd_feature": 0.01,
    **dict.fromkeys(("nst", "srrl", "ft", "fsp"), 1.0),
    **dict.fromkeys(("vid", "ab"), 0.1),
    "cc": 0.02,
    **dict.fromkeys(("mgd", "ofd"), 1e-3),
}
"""Small enough that all of them together train, for each counts where the others are."""
OPTIONS = {
    **{f"{name}.gather": "true" for name in ("msdcrd", "sp", "pkt", "rkd", "dist")},
    **{f"{name}.negatives": "16" for name in ("crd", "wcord")},
    **{f"{name}.embedding": "8" for name in ("crd", "wcord")},
    "wcord.mode": "relax",
    "sp.scales": "[1, 2]",
    "sdd.reliability": "confidence",
    "wkd_logit.distances": "classifier",
    "wkd_logit.final_weight": "0",
    "wkd_logit.decay_start_epoch": "1",
    "ctkd.epochs": "2",
    "reviewkd.warmup_epochs": "2",
    "cc.embedding": "8",
    "ab.stop_epoch": "1",
    "ft.paraphraser_epochs": "1",
}
TOGETHER = [
    *(word for name, weight in WEIGHTS.items() for word in (f"--loss.{name}.weight", str(weight))),
    *(word for name, value in OPTIONS.items() for word in (f"--loss.{name}", value)),
    *("--train.checkpoint_every", "2"),
]
MLKD = [
    *("--loss.mlkd.weight", "0.9", "--loss.mlkd.temperature", "2", "--loss.mlkd.standardise", "true"),
    *("--augment.repeats", "2", "--augment.plain_repeats", "1", "--augment.rand_augment", "rand-m9"),
    *("--augment.erasing", "0.5", "--loss.sdd", "null", "--loss.msdcrd", "null", "--train.checkpoint_every", "2"),
]
SIMKD = ["--loss.simkd.weight", "1", "--loss.simkd.factor", "4", "--ema.enabled", "true", "--train.checkpoint_every", "2"]


def killed_and_resumed(digits: Path, folder: Path, world_size: int, *words: str) -> Path:
    """The folder of a run of two epochs that was killed after the third step and resumed: it is the one that was not killed."""
    straight, killed = folder / "straight", folder / "killed"
    finished(arguments(digits, straight, *words), folder / "straight.log", world_size)
    job = start(arguments(digits, killed, *words), folder / "killed.log", world_size)
    job.wait_until(lambda: (killed / "metrics.jsonl").is_file() and len(steps_of(killed)) >= 3)
    job.kill()
    assert len(steps_of(killed)) < 12, "killed too late to show anything"
    finished(arguments(digits, killed, *words, "--resume"), folder / "killed.log", world_size)
    assert "going on from step" in (folder / "killed.log").read_text()
    assert_same_run(straight, killed)
    return killed


def test_every_loss_is_in_one_of_these_runs():
    assert {*WEIGHTS, "simkd", "mlkd"} == set(LOSSES)


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_that_train_the_recipes_student_are_the_same_run_after_a_kill(digits: Path, tmp_path: Path, world_size: int):
    killed = killed_and_resumed(digits, tmp_path, world_size, *TOGETHER)
    lines = [line for line in metrics(killed) if "loss/total" in line]
    assert len(lines) == 12
    assert [name for name in WEIGHTS if not all(line[f"loss/{name}"] > 0 for line in lines)] == []
    state = last_state(killed)
    for name in ("crd", "wcord"):
        assert (state[f"criteria/{name}.memory.normalisers"] > 0).all()
        for side in ("student", "teacher"):
            # all but the few images that the last, short batch of each epoch leaves out have been visited
            lengths = state[f"criteria/{name}.memory.bank_{side}"].norm(dim=1)
            assert (torch.isclose(lengths, torch.ones(())).sum()) >= 144
    assert [sum(f"ft/{stage}" in line for line in lines) for stage in ("reconstruction", "factor")] == [6, 6]
    assert {line["ctkd/curriculum"] for line in lines} == {0.5, 1.0}
    assert len({line["ctkd/temperature"] for line in lines}) == len(lines), "the temperature learns"
    assert len({line["mgd/masked_share"] for line in lines}) > 1, "each step draws its own masks"


@pytest.mark.parametrize("world_size", [1, 2])
def test_plain_views_beside_altered_ones_are_the_same_run_after_a_kill(digits: Path, tmp_path: Path, world_size: int):
    """On two processes one has the plain views and the other the altered ones; the log has the means of both."""
    killed = killed_and_resumed(digits, tmp_path, world_size, *MLKD)
    lines = [line for line in metrics(killed) if "loss/mlkd" in line]
    assert len(lines) == 12
    assert all(line[f"mlkd/{part}"] > 0 for line in lines for part in ("instances", "batch", "classes"))


@pytest.mark.parametrize(
    ("world_size", "body"),
    [
        (1, ["--student", "cifar_resnet8"]),
        # nothing reads what is left of this one's head, and DDP waits for a gradient of each parameter that trains
        (2, ["--student", "mobilenetv3_small_050", "--data.image_size", "64"]),
    ],
)
def test_simkds_student_is_the_same_after_a_kill_and_is_loaded_by_plain_timm(
    digits: Path, tmp_path: Path, world_size: int, body: list[str]
):
    killed = killed_and_resumed(digits, tmp_path, world_size, *SIMKD, *body)
    model = timm.create_model(f"local-dir:{killed / 'student'}", pretrained=True)
    assert type(model).__name__ == "SimKDStudent"
    head = {name: value for name, value in last_state(killed).items() if name.endswith("head.fc.weight")}
    assert any(torch.equal(value, model.head.fc.weight) for value in head.values()), "the teacher's classifier never moved"
    assert "# simkd_student" in (killed / "student" / "README.md").read_text()


def test_a_student_that_is_trained_in_part_is_refused_on_two_processes_and_its_remedy_trains(digits: Path, tmp_path: Path):
    """A hint alone reaches no classifier: DDP failed at the second step and named neither parameters nor losses."""
    hint = ["--loss.sdd", "null", "--loss.msdcrd", "null", "--loss.fitnet.weight", "1", "--train.max_steps", "2"]
    alone = [*hint, "--loss.cross_entropy", "null"]
    job = finished(arguments(digits, tmp_path / "two", *alone), tmp_path / "two.log", world_size=2, codes=2)
    assert "error: loss: no term gives model.stages.2.0.conv1.weight, " in job.text()
    finished(arguments(digits, tmp_path / "one", *alone), tmp_path / "one.log")
    weighted = [*hint, "--loss.cross_entropy.weight", "0"]
    finished(arguments(digits, tmp_path / "remedy", *weighted), tmp_path / "remedy.log", world_size=2)

"""Methods with a state, a draw or another student, in real runs."""

from pathlib import Path

import timm
import torch

import distill.models  # noqa: F401  (registers what a run exports)
from tests.processes import finished, start
from tests.runs import arguments, assert_same_run, last_state, metrics, steps_of

WEIGHTS = {"ctkd": 0.9, "mgd": 1e-3, "cat_kd": 1.0, "reviewkd": 1.0, "ofd": 1e-3, "semckd": 1.0}
TOGETHER = [
    *(text for name, weight in WEIGHTS.items() for text in (f"--loss.{name}.weight", str(weight))),
    *("--loss.ctkd.epochs", "2", "--loss.reviewkd.warmup_epochs", "2", "--train.checkpoint_every", "2"),
]


def test_temperature_masks_and_warm_up_are_the_same_after_a_kill_of_two_processes(digits: Path, tmp_path: Path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finished(arguments(digits, straight, *TOGETHER), tmp_path / "straight.log", world_size=2)
    job = start(arguments(digits, killed, *TOGETHER), tmp_path / "killed.log", world_size=2)
    job.wait_until(lambda: (killed / "metrics.jsonl").is_file() and len(steps_of(killed)) >= 3)
    job.kill()
    assert len(steps_of(killed)) < 12, "killed too late to show anything"
    finished(arguments(digits, killed, *TOGETHER, "--resume"), tmp_path / "killed.log", world_size=2)
    assert "going on from step" in (tmp_path / "killed.log").read_text()
    assert_same_run(straight, killed)
    lines = [line for line in metrics(killed) if "loss/total" in line]
    assert {line["ctkd/curriculum"] for line in lines} == {0.5, 1.0}
    assert len({line["ctkd/temperature"] for line in lines}) == len(lines), "the temperature learns"
    assert len({line["mgd/masked_share"] for line in lines}) > 1, "each step draws its own masks"


def test_simkds_student_is_trained_killed_resumed_and_loaded_by_plain_timm(digits: Path, tmp_path: Path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    simkd = ["--loss.simkd.weight", "1", "--loss.simkd.factor", "4", "--ema.enabled", "true", "--train.checkpoint_every", "2"]
    finished(arguments(digits, straight, *simkd), tmp_path / "straight.log")
    job = start(arguments(digits, killed, *simkd), tmp_path / "killed.log")
    job.wait_until(lambda: (killed / "metrics.jsonl").is_file() and len(steps_of(killed)) >= 3)
    job.kill()
    finished(arguments(digits, killed, *simkd, "--resume"), tmp_path / "killed.log")
    assert_same_run(straight, killed)
    model = timm.create_model(f"local-dir:{killed / 'student'}", pretrained=True)
    assert type(model).__name__ == "SimKDStudent"
    head = {name: value for name, value in last_state(killed).items() if name.endswith("head.fc.weight")}
    assert any(torch.equal(value, model.head.fc.weight) for value in head.values()), "the teacher's classifier never moved"
    assert "# simkd_student" in (killed / "student" / "README.md").read_text()

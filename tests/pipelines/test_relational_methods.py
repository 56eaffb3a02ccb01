"""Losses with memories, relations of all processes' images and regressors, all in one real run."""

from pathlib import Path

import torch

from tests.processes import finished, start
from tests.runs import arguments, assert_same_run, last_state, metrics, steps_of

METHODS = [
    *("--loss.crd.weight", "0.1", "--loss.crd.negatives", "16", "--loss.crd.embedding", "8"),
    *(
        "--loss.wcord.weight",
        "0.1",
        "--loss.wcord.negatives",
        "16",
        "--loss.wcord.embedding",
        "8",
        "--loss.wcord.mode",
        "relax",
    ),
    *("--loss.sp.weight", "3", "--loss.sp.gather", "true", "--loss.sp.scales", "[1, 2]"),
    *("--loss.pkt.weight", "3", "--loss.pkt.gather", "true", "--loss.rkd.weight", "0.1", "--loss.rkd.gather", "true"),
    *("--loss.dist.weight", "1", "--loss.dist.gather", "true", "--loss.fitnet.weight", "0.1", "--loss.at.weight", "1"),
    *("--loss.wkd_logit.weight", "1", "--loss.wkd_logit.final_weight", "0", "--loss.wkd_logit.decay_start_epoch", "1"),
    *("--loss.wkd_feature.weight", "0.01", "--loss.sdd.reliability", "confidence", "--train.checkpoint_every", "2"),
]


def test_they_are_the_same_run_after_a_kill_of_two_processes(digits: Path, tmp_path: Path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finished(arguments(digits, straight, *METHODS), tmp_path / "straight.log", world_size=2)
    job = start(arguments(digits, killed, *METHODS), tmp_path / "killed.log", world_size=2)
    job.wait_until(lambda: (killed / "metrics.jsonl").is_file() and len(steps_of(killed)) >= 3)
    job.kill()
    assert len(steps_of(killed)) < 12, "killed too late to show anything"
    finished(arguments(digits, killed, *METHODS, "--resume"), tmp_path / "killed.log", world_size=2)
    assert_same_run(straight, killed)

    state = last_state(killed)
    for name in ("crd", "wcord"):
        assert (state[f"criteria/{name}.memory.normalisers"] > 0).all()
        for side in ("student", "teacher"):
            # all but the few images that the last, short batch of each epoch leaves out have been visited
            lengths = state[f"criteria/{name}.memory.bank_{side}"].norm(dim=1)
            assert (torch.isclose(lengths, torch.ones(())).sum()) >= 144
    steps = [line for line in metrics(killed) if "loss/total" in line]
    assert len(steps) == 12
    assert all(line[f"loss/{name}"] > 0 for line in steps for name in ("crd", "sp", "pkt", "rkd", "dist", "fitnet", "at"))

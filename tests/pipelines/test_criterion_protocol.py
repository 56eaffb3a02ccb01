"""The protocol of losses by a criterion that uses all of it, in real runs."""

from pathlib import Path

import pytest
import torch

from distill.errors import RequestError
from distill.losses import LOSSES
from pipelines.setup.arguments import import_files
from tests.processes import finished, start
from tests.runs import arguments, assert_same_run, last_state, metrics, steps_of

LOSS = Path(__file__).parents[1] / "distill" / "losses" / "everything.py"
EVERYTHING = [
    *("--import", str(LOSS), "--loss.everything.weight", "0.5", "--loss.everything.momentum", "0.25"),
    *("--train.accumulate", "2", "--train.checkpoint_every", "2", "--optim.decay_bias_and_norm", "true"),
]


def test_a_criterion_with_state_ids_and_draws_of_its_own_is_the_same_run_after_a_kill_of_two_processes(
    digits: Path, tmp_path: Path
):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finished(arguments(digits, straight, *EVERYTHING), tmp_path / "straight.log", world_size=2)
    job = start(arguments(digits, killed, *EVERYTHING), tmp_path / "killed.log", world_size=2)
    job.wait_until(lambda: (killed / "metrics.jsonl").is_file() and len(steps_of(killed)) >= 3)
    job.kill()
    assert len(steps_of(killed)) < 12, "killed too late to show anything"
    finished(arguments(digits, killed, *EVERYTHING, "--resume"), tmp_path / "killed.log", world_size=2)
    assert "going on from step" in (tmp_path / "killed.log").read_text()
    assert_same_run(straight, killed)

    state = last_state(killed)
    visits = state["criteria/everything.visits"]
    assert (int(visits.sum()), int(visits.max())) == (12 * 24, 2), "each image once in each of two epochs"
    remembered = state["criteria/everything.bank"].abs().sum(1) > 0
    assert torch.equal(remembered, visits > 0), "the bank has rows of the images that were shown"
    assert "criteria/everything.rank" not in state
    # a step's value is the mean over its two micro-batches (12 and 24 more images) and over the ranks, which count alike
    seen = [line["everything/seen"] for line in metrics(killed) if "loss/total" in line]
    assert seen == [24.0 * step - 6 for step in range(1, 13)]


def test_a_parameter_without_decay_moves_by_its_gradient_alone(digits: Path, tmp_path: Path):
    """Of so small a weight the criterion gives no gradient to speak of: what is decayed shrinks, what is not stays."""
    still = ["--loss.everything.weight", "1e-20", "--optim.weight_decay", "0.1", "--train.max_steps", "3"]
    finished(arguments(digits, tmp_path / "run", *EVERYTHING, *still), tmp_path / "log")
    state = last_state(tmp_path / "run")
    begin = ["--train.max_steps", "1", "--optim.weight_decay", "0"]
    finished(arguments(digits, tmp_path / "begin", *EVERYTHING, "--loss.everything.weight", "0", *begin), tmp_path / "log")
    first = last_state(tmp_path / "begin")
    assert state["criteria/everything.scale"] == first["criteria/everything.scale"] == 1
    weight, before = (s["criteria/everything.project.weight"] for s in (state, first))
    assert 0.5 * before.norm() < weight.norm() < 0.999 * before.norm()


def wrong_loss(path: Path, constructor: str, gives: str) -> list[str]:
    """Options that import a loss with this constructor and this result."""
    path.write_text(
        "from distill.losses import LOSSES\nfrom distill.protocols import Criterion\n\n\n"
        "class Wrong(Criterion):\n"
        f"    def __init__({constructor}) -> None:\n        super().__init__()\n\n"
        f"    def forward(self, student, teacher, target):\n        return {gives}\n\n\n"
        'LOSSES["wrong"] = Wrong\n'
    )
    return ["--import", str(path), "--loss.wrong.weight", "1"]


@pytest.mark.parametrize(
    ("constructor", "gives", "expected"),
    [
        ("self, num_samples: int", "0", "loss.wrong: asks the run for num_samples; a run gives student, teacher, data"),
        ("self, *, alpha=1.0", "0", "loss.wrong: option alpha: without a type; annotate it"),
        (
            "self",
            "student.logits.mean()",
            "loss.wrong: forward gave a tensor []; it must give (loss, dictionary of statistics)",
        ),
    ],
)
def test_a_wrong_loss_is_refused_in_one_line(constructor: str, gives: str, expected: str, digits: Path, tmp_path: Path):
    asked = wrong_loss(tmp_path / "wrong.py", constructor, gives)
    job = finished(arguments(digits, tmp_path / "run", *asked), tmp_path / "log", codes=2)
    assert f"error: {expected}" in job.text()
    assert "Traceback" not in job.text()


def test_a_loss_that_does_not_use_its_parameter_is_refused_on_two_processes_too(digits: Path, tmp_path: Path):
    """DDP's own error came a step later and named no loss."""
    asked = wrong_loss(tmp_path / "wrong.py", "self", "(student.logits.mean(), {})")
    source = (tmp_path / "wrong.py").read_text()
    parameter = "super().__init__()\n        self.idle = torch.nn.Parameter(torch.zeros(()))\n"
    (tmp_path / "wrong.py").write_text("import torch\n" + source.replace("super().__init__()\n", parameter))
    job = finished(arguments(digits, tmp_path / "run", *asked), tmp_path / "log", world_size=2, codes=2)
    assert "error: loss.wrong: its value gives idle no gradient" in job.text()
    assert "Traceback" not in job.text()


def test_a_file_that_replaces_a_loss_is_refused(tmp_path: Path):
    file = tmp_path / "replaces.py"
    file.write_text("from distill.losses import LOSSES\n\nLOSSES['kd'] = LOSSES['dkd']\n")
    before = dict(LOSSES)
    with pytest.raises(RequestError, match=r"^--import .*replaces\.py: replaces loss kd; give your own another name"):
        import_files([file])
    assert before == LOSSES

"""The loop's guard on real objects in this process: a poisoned step is not made, is counted, and says what it saw."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from distill.control import Control
from distill.engine import NonFiniteError, Run, train_epoch
from distill.losses import LOSSES
from distill.protocols import Batch
from pipelines.arguments import parse
from pipelines.build import build, build_splits
from pipelines.machine import build_accelerator
from tests.runs import arguments, metrics


@pytest.fixture
def run(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """A built run of two epochs of six steps."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    recipe = parse(arguments(digits, tmp_path, *getattr(request, "param", [])), LOSSES).recipe
    accelerator = build_accelerator(recipe)
    accelerator.init_trackers("trackers")
    built, _ = build(recipe, accelerator, build_splits(recipe, accelerator))
    built.reporter.start(0, 0)
    yield built
    built.reporter.close()
    built.checkpoints.close()
    for loader in (built.train_loader, built.eval_loader):
        loader.close()
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def poison(run: Run, step: int) -> None:
    """One pixel of one image is not a number at `step`."""
    transform = run.transform

    def poisoned(batch: Batch):
        images, labels = transform(batch)
        if run.counters.step == step:
            images[0, 0, 0, 0] = torch.nan
        return images, labels

    run.transform = poisoned


def weights(run: Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.distiller.parameters()])


def test_a_poisoned_step_stops_the_run_before_the_weights_move_and_dumps_its_samples(run: Run):
    poison(run, 2)
    states = []
    step = run.optimizer.step
    run.optimizer.step = lambda *a: (states.append(weights(run)), step(*a))
    with pytest.raises(NonFiniteError, match=r"step 2, rank 0: .*loss/sdd.* not finite"):
        train_epoch(run)
    assert len(states) == 2, "steps 0 and 1 were made, step 2 was not"
    assert torch.isfinite(weights(run)).all()
    dump = json.loads((run.reporter.folder / "nonfinite-step00000002-rank0.json").read_text())
    assert "loss/total" in dump["not_finite"]
    assert len(dump["samples"]) == len(set(dump["samples"])) == 24
    order = [s for b in run.train_loader.epoch(0, start=2) for s in run.name_samples(b.sample_ids.tolist())]
    assert dump["samples"] == order[:24]


@pytest.mark.parametrize(
    "run", [["--train.skip_nonfinite", "1", "--train.mixed_precision", p] for p in ("no", "fp16")], indirect=True
)
def test_a_recipe_may_skip_some_such_steps_and_counts_them(run: Run):
    poison(run, 2)
    train_epoch(run)
    assert run.counters.step == 6
    assert run.counters.skipped_steps == 1
    assert torch.isfinite(weights(run)).all()
    assert metrics(run.reporter.folder)[-1]["skipped_steps"] == 1
    poison(run, 7)
    with pytest.raises(NonFiniteError, match="step 7"):
        train_epoch(run)


@pytest.mark.parametrize("run", [["--report.gradient_shares", "true", "--loss.kd.weight", "0"]], indirect=True)
def test_terms_combine_by_weight_and_each_ones_share_of_the_gradient_is_logged(run: Run):
    train_epoch(run)
    weights_of = {"cross_entropy": 1.0, "sdd": 0.5, "msdcrd": 0.8, "kd": 0.0}  # sdd warms up: 1/2 in the first of two epochs
    for line in metrics(run.reporter.folder):
        total = sum(weight * line[f"loss/{name}"] for name, weight in weights_of.items())
        assert line["loss/total"] == pytest.approx(total, rel=1e-5)
        shares = {name: line[f"gradient_share/{name}"] for name in weights_of}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert shares["kd"] == 0
        assert min(shares[name] for name in ("cross_entropy", "sdd", "msdcrd")) > 0


def test_a_second_signal_and_none_at_all():
    control = Control()
    assert control.agree() == (False, False)
    assert control.agree(poisoned=True) == (False, True)
    control._note(15, None)
    control._note(15, None)
    assert control.agree() == (True, False)

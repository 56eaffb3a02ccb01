"""The loop's guard on real objects in this process: a poisoned step is not made, is counted, and says what it saw."""

import copy
import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from distill.agreement import Control
from distill.engine import NonFiniteError, evaluate_student, log_step, train_epoch, train_step
from distill.nonfinite import Guard
from distill.protocols import Batch
from distill.regions import _made_matrix
from distill.run import Counters, Run
from pipelines.setup.build import build
from pipelines.setup.data import build_splits
from pipelines.setup.machine import build_accelerator
from tests.runs import DOT, metrics, recipe_of


@pytest.fixture
def run(digits: Path, tmp_path: Path, fresh_accelerate: None, request: pytest.FixtureRequest):
    """A built run of two epochs of six steps."""
    recipe = recipe_of(digits, tmp_path, *getattr(request, "param", []))
    accelerator = build_accelerator(recipe)
    accelerator.init_trackers("trackers")
    built, _ = build(recipe, accelerator, build_splits(recipe, accelerator), Control())
    built.reporter.start(0, 0)
    yield built
    built.reporter.close()
    built.checkpoints.close()
    for loader in (built.train_loader, built.eval_loader):
        loader.close()


def poison(run: Run, step: int) -> None:
    """One pixel of one image is not a number at `step`."""
    transform = run.transform

    def poisoned(batch: Batch, epoch: int):
        images, labels = transform(batch, epoch)
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
    evaluate_student(run)  # by the running statistics, which the poisoned forward pass moved
    assert all(buffer.isfinite().all() for buffer in run.distiller.buffers())
    poison(run, 7)
    with pytest.raises(NonFiniteError, match="step 7"):
        train_epoch(run)


@pytest.mark.parametrize("run", [[*DOT, "--train.skip_nonfinite", "1", "--train.accumulate", "2"]], indirect=True)
def test_a_step_that_is_not_made_leaves_both_momenta_and_the_next_step_alone(run: Run):
    poison(run, 2)
    batches = [list(islice(run.train_loader.epoch(0, start=2 * step), 2)) for step in range(4)]
    parts = run.distiller, run.optimizer

    def make_step(step: int) -> list[dict]:
        run.counters.step = step
        train_step(run, batches[step], logged=False)
        return copy.deepcopy([part.state_dict() for part in parts])

    def numbers(states: list[dict]) -> torch.Tensor:
        momenta = [momentum for each in states[1]["state"].values() for momentum in each.values()]
        return torch.cat([tensor.flatten() for tensor in (*states[0].values(), *momenta)])

    make_step(0)
    before = make_step(1)
    assert {len(momenta) for momenta in before[1]["state"].values()} == {1, 2}  # of projectors, and of what both sides reach
    held_back = make_step(2)
    assert run.counters.skipped_steps == 1
    assert torch.equal(numbers(before), numbers(held_back))
    after = make_step(3)
    for part, state in zip(parts, before, strict=True):
        part.load_state_dict(state)
    again = make_step(3)  # as if the step that was not made had never been tried
    assert torch.equal(numbers(after), numbers(again))
    assert not torch.equal(numbers(before), numbers(after))


FUSED = ["--optim.options", "{fused: true}", "--report.log_every", "50"]
"""The guard learns of a step one step later."""


IN_TURN = ["--loss.sdd", "null", "--loss.msdcrd", "null", "--loss.cross_entropy.start_epoch", "1"]
IN_TURN += ["--optim.weight_decay", "0.1"]


def moved(run: Run, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in run.unwrapped.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize(
    "run",
    [
        [*IN_TURN, *("--loss.ft.weight", "9"), *("--loss.ft.paraphraser_epochs", "1"), *more]
        for more in ([], ["--optim.name", "adamw", "--optim.learning_rate", "0.001"], ["--report.gradient_shares", "true"])
    ],
    indirect=True,
)
def test_what_no_term_with_a_weight_reaches_rests_whatever_decay_and_momentum_say(run: Run):
    """FT: the paraphraser first, then the student and its translator; the weights that rest keep every bit."""
    first = {name: p.detach().clone() for name, p in run.unwrapped.named_parameters()}
    paraphraser = {name for name in first if ".paraphraser." in name}
    train_epoch(run)
    assert moved(run, first) == paraphraser
    second = {name: p.detach().clone() for name, p in run.unwrapped.named_parameters()}
    train_epoch(run)
    assert moved(run, second) == set(first) - paraphraser


@pytest.mark.parametrize("run", [[*IN_TURN, "--loss.fsp.weight", "1", "--loss.fsp.stop_epoch", "1"]], indirect=True)
def test_the_classifier_rests_while_maps_alone_are_compared_and_all_train_afterwards(run: Run):
    first = {name: p.detach().clone() for name, p in run.unwrapped.named_parameters()}
    train_epoch(run)
    assert set(first) - moved(run, first) == {"student.model.head.fc.weight", "student.model.head.fc.bias"}
    second = {name: p.detach().clone() for name, p in run.unwrapped.named_parameters()}
    train_epoch(run)
    assert moved(run, second) == set(first)


@pytest.mark.parametrize("run", [[*FUSED, "--train.skip_nonfinite", "1", "--ema.enabled", "true"]], indirect=True)
def test_an_average_takes_nothing_from_a_step_that_the_device_skips(run: Run):
    poison(run, 2)
    train_epoch(run)
    assert all(value.isfinite().all() for value in run.average.module.state_dict().values())


@pytest.mark.parametrize("run", [[*FUSED, "--train.skip_nonfinite", "1", "--train.checkpoint_every", "4"]], indirect=True)
def test_a_device_that_skips_the_step_itself_gives_the_weights_of_a_host_that_looked_first(run: Run):
    begin = copy.deepcopy(run.distiller.state_dict())
    ends = []
    for deferred in (True, False):
        assert run.guard.deferred or not deferred
        run.guard.deferred = deferred
        run.distiller.load_state_dict(begin)
        run.optimizer.optimizer.state.clear()
        run.counters = Counters()
        poison(run, 2)
        train_epoch(run)
        assert run.counters.skipped_steps == 1
        ends.append(torch.cat([weights(run), *(b.flatten() for b in run.distiller.buffers())]))
    assert torch.equal(*ends)
    assert torch.isfinite(ends[0]).all()
    dump = json.loads((run.reporter.folder / "nonfinite-step00000002-rank0.json").read_text())
    order = [s for b in run.train_loader.epoch(0, start=2) for s in run.name_samples(b.sample_ids.tolist())]
    assert dump["samples"] == order[:24]


@pytest.fixture
def spoiled_memory():
    """Memory that nobody has written to is not a number, as freed memory may be."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("run", [[*FUSED, "--train.skip_nonfinite", "1"]], indirect=True)
def test_the_first_step_can_be_skipped_on_the_device(run: Run, spoiled_memory: None):
    """PyTorch makes the momentum of fused SGD in its first step, and keeps it unwritten where that step is skipped."""
    poison(run, 0)
    train_epoch(run)
    assert run.counters.skipped_steps == 1
    assert torch.isfinite(weights(run)).all()


@pytest.mark.parametrize("run", [FUSED], indirect=True)
def test_a_poisoned_step_is_known_before_anything_is_saved(run: Run):
    poison(run, 5)  # the last of the epoch: nobody would ask one step later
    with pytest.raises(NonFiniteError, match=r"step 5, rank 0: .*loss/sdd.* not finite"):
        train_epoch(run)
    assert not list((run.reporter.folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("run", [FUSED], indirect=True)
def test_a_step_that_is_not_logged_never_waits_for_the_device(run: Run, monkeypatch: pytest.MonkeyPatch):
    """Tensors without values: whoever reads one on the host gets an error. Their device is called cpu, since a backward pass on
    one called cuda asks the driver; so the check of the labels is left out, which reads them on CPUs alone."""
    monkeypatch.setattr("distill.losses.inputs._check_indices", lambda labels, classes: None)
    monkeypatch.setattr("distill.regions._made_matrix", _made_matrix.__wrapped__)  # no fake ones in its cache
    batch = next(run.train_loader.epoch(0))
    with FakeTensorMode() as fake:
        tensors = [*run.distiller.parameters(), *run.distiller.buffers(), *run.teacher.parameters(), *run.teacher.buffers()]
        distiller, teacher = copy.deepcopy((run.distiller, run.teacher), {id(t): fake.from_tensor(t) for t in tensors})
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1, momentum=0.9, fused=True)
        guard = Guard(optimizer, None, lambda tensor: tensor)
        shapes = replace(run, distiller=distiller, teacher=teacher, optimizer=optimizer, guard=guard)
        seen = Batch(fake.from_tensor(batch.images), fake.from_tensor(batch.labels), batch.sample_ids)
        values, _ = train_step(shapes, [seen], logged=False)
        assert values["loss/total"].shape == ()
        with pytest.raises(DataDependentOutputException):
            log_step(shapes, values)
        guard.deferred = False
        with pytest.raises(DataDependentOutputException):
            train_step(shapes, [seen], logged=False)


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count[operator.overloadpacket.__name__] += 1
        return operator(*args, **kwargs or {})


@pytest.mark.parametrize("run", [["--loss.msdcrd", "null", "--optim.options", "{foreach: false}"]], indirect=True)
def test_gradients_that_are_not_clipped_and_not_accumulated_are_not_multiplied_either(run: Run):
    """PyTorch's clipping multiplies all of them by 1 where there is no limit: 94 MB for a ResNet-18 on a GPU."""
    [batch] = islice(run.train_loader.epoch(0), 1)
    counts = []
    for limit in (0.0, 1.0):
        run.settings = replace(run.settings, clip_gradient_norm=limit)
        with Calls() as calls:
            values, _ = train_step(run, [batch], logged=False)
        assert values["gradient_norm"] > 0
        counts.append(calls.count["_foreach_mul_"])
    assert counts == [0, 1]


@pytest.mark.parametrize("run", [["--train.overlap_teacher", "true"]], indirect=True)
def test_the_teachers_outputs_are_asked_for_after_the_students_forward_and_before_the_losses(run: Run):
    """Where they come from another stream, this is the moment that its work is waited for."""
    order = []
    distiller = run.unwrapped
    run.teacher.register_forward_hook(lambda *_: order.append("teacher"))
    distiller.student.register_forward_hook(lambda *_: order.append("student"))
    distiller.criteria["sdd"].register_forward_pre_hook(lambda *_: order.append("loss"))
    assert distiller.before_losses == run.teacher.join
    join = distiller.before_losses
    distiller.before_losses = lambda: (order.append("join"), join())
    train_step(run, [next(run.train_loader.epoch(0))], logged=True)
    assert order == ["teacher", "student", "join", "loss"]


@pytest.mark.parametrize("run", [["--report.gradient_shares", "true", "--report.log_every", "4"]], indirect=True)
def test_every_line_of_the_log_has_the_same_values(run: Run):
    """An epoch's last step is logged whatever `log_every` says, and with all that other lines have."""
    train_epoch(run)
    lines = metrics(run.reporter.folder)
    assert [line["step"] for line in lines] == [4, 6]
    assert lines[0].keys() == lines[1].keys()


@pytest.mark.parametrize("run", [["--report.gradient_shares", "true", "--loss.kd.weight", "0"]], indirect=True)
def test_terms_combine_by_weight_and_each_ones_share_of_the_gradient_is_logged(run: Run):
    train_epoch(run)
    weights_of = {"cross_entropy": 1.0, "sdd": 0.5, "msdcrd": 0.8, "kd": 0.0}  # sdd warms up: 1/2 in the first of two epochs
    lines = metrics(run.reporter.folder)
    assert lines
    for line in lines:
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

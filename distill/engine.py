"""The loop: fit, train_epoch, train_step, evaluation between epochs. It knows no loss, data format, model or recipe."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from distill.errors import Interrupted
from distill.evaluation import evaluate, known_bad_samples
from distill.nonfinite import Suspect
from distill.protocols import Batch, Losses, Progress, Target
from distill.run import Run, save


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not finite; raised before the optimiser steps."""


def fit(run: Run) -> dict[str, Any]:
    """Trains from `run.counters` to the last step and returns the last evaluation and the counts of the run.

    Raises NonFiniteError before a poisoned step is made, Interrupted after a requested stop was saved.
    """
    counters, begin = run.counters, time.perf_counter()
    spent_before = counters.seconds
    run.reporter.start(counters.step, counters.evaluated_step)
    try:
        while True:
            counters.seconds = spent_before + time.perf_counter() - begin
            if counters.evaluated_step != counters.step and run.settings.evaluation_due(counters.step):
                evaluate_student(run)
            if counters.step >= run.settings.last_step:
                break
            train_epoch(run)
        run.checkpoints.wait()
    finally:
        run.reporter.close()
    counters.seconds = spent_before + time.perf_counter() - begin
    return {
        **{k: counters.evaluation[k] for k in ("top1", "top5", "loss")},
        "best_top1": counters.best_top1,
        "epochs": counters.step / run.settings.steps_per_epoch,
        "steps": counters.step,
        "images_per_second": run.throughput.images_per_second,
        "seconds": counters.seconds,
        "skipped_steps": counters.skipped_steps,
        "checkpoint_seconds": run.checkpoints.costs(),
    }


def train_epoch(run: Run) -> None:
    """Trains from the present step to the end of its epoch (or of the run), logging and saving on the way."""
    settings, counters = run.settings, run.counters
    epoch, done = divmod(counters.step, settings.steps_per_epoch)
    batches = run.train_loader.epoch(epoch, start=done * settings.accumulate)
    last = min(settings.last_step, (epoch + 1) * settings.steps_per_epoch)
    run.distiller.train()
    while counters.step < last:
        run.watch(counters.step, "waiting for data")
        step = counters.step + 1
        logged = step % settings.log_every == 0 or step == last
        values, stop = train_step(run, list(islice(batches, settings.accumulate)), logged)
        counters.step = step
        run.after_step()
        run.throughput.step(settings.global_batch_size)
        run.reporter.advance()
        due = _save_due(run)
        if logged or due or stop:
            settle(run)  # a log or a checkpoint must not count a step that turns out not to have been made
        if logged:
            log_step(run, values)
        if stop:
            save(run)
            run.checkpoints.wait()
            raise Interrupted(f"stopped at step {counters.step}, saved; the same command with --resume goes on")
        if due and counters.step < last:
            save(run)
    run.throughput.pause()
    save(run)  # before the evaluation, which a resumed run makes again if it was not finished


def _save_due(run: Run) -> bool:
    """Whether a checkpoint is due, the same on every process: saving is a collective, and clocks differ."""
    settings = run.settings
    if settings.checkpoint_every and run.counters.step % settings.checkpoint_every == 0:
        return True
    if not settings.checkpoint_minutes:
        return False
    overdue = run.checkpoints.seconds_since_save > 60 * settings.checkpoint_minutes
    return run.control.any(run.accelerator.is_main_process and overdue)  # only the main process's clock starts anew at a save


def train_step(run: Run, batches: list[Batch], logged: bool) -> tuple[dict[str, Tensor], bool]:
    """One optimiser step over `accumulate` micro-batches.

    logged: whether its values will be written, so that what is measured only for the log is measured. Returns the step's mean
    values (detached, on the device), and whether any process was asked to stop.
    """
    settings, progress = run.settings, run.progress
    if len(batches) != settings.accumulate:
        raise RuntimeError(f"step {progress.step}: the loader gave {len(batches)} micro-batches of {settings.accumulate}")
    run.watch(progress.step, "forward and backward")
    # 1. Seeds come first: whatever the step draws (mixing, dropout, a criterion) is a function of (seed, step, rank), so that
    #    a resumed run draws it again and no generator's state is in a checkpoint.
    run.seed_step(progress.step)
    run.guard.begin()
    # 2. The rate is a pure function of progress; a prepared scheduler would move once per process.
    for group in run.optimizer.param_groups:
        group["lr"] = run.learning_rate(progress) * group.get("lr_scale", 1.0)
    # 3. Gradients add up over the micro-batches; DDP reduces them once, in the last one's backward pass.
    values: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        last = number == settings.accumulate - 1
        found = _forward_backward(run, batch, progress, last, logged)
        values = {name: values[name] + value if name in values else value for name, value in found.items()}
    #    What rests has no gradient at all: with one of 0, weight decay and momentum would still move it.
    for parameter in run.unwrapped.resting:
        parameter.grad = None
    # 4. The norm is that of the summed gradient, so the same on all ranks; clipping comes before the guard judges it.
    values["gradient_norm"] = _clip(run)
    # 5. All ranks make the step, or none does.
    run.watch(progress.step, "optimiser step")
    verdict = run.guard.step(Suspect(progress.step, values, [batch.sample_ids for batch in batches]), run.control)
    if verdict.held_back is not None:
        _hold_back(run, verdict.held_back)
    run.optimizer.zero_grad()
    # 6. The average follows the weights that the step left behind.
    if run.average is not None and verdict.made:
        run.average.update(run.unwrapped.plain_student, step=progress.step + 1)
    return values, verdict.stop


def _forward_backward(run: Run, batch: Batch, progress: Progress, last: bool, logged: bool) -> dict[str, Tensor]:
    """Gradients of one micro-batch, added to those of the step, and its share of the step's values."""
    accelerator = run.accelerator
    images, labels = run.transform(batch, progress.epoch)
    with torch.no_grad(), accelerator.autocast():  # the teacher is outside of DDP, so nothing else puts it under autocast
        teacher = None if run.teacher is None else run.teacher(images, batch)
    target = Target(labels, batch.sample_ids.to(labels.device), progress, run.generator, batch.plain)
    shares: dict[str, Tensor] = {}
    with nullcontext() if last else accelerator.no_sync(run.distiller):
        losses: Losses = run.distiller(images, teacher, target)
        with run.around_backward():
            if run.settings.gradient_shares and logged and last:
                shares = _gradient_shares(run, losses)
            if run.dot is not None:
                run.dot.separate(*(_share(side, run) for side in run.unwrapped.sides(losses)))
            accelerator.backward(_share(losses.total, run))
    return {name: _share(value, run) for name, value in _named(losses).items()} | shares


def _share(value: Tensor, run: Run) -> Tensor:
    """A micro-batch's share of the step's value; of a single one all of it, without a kernel for each of some forty values."""
    return value / run.settings.accumulate if run.settings.accumulate > 1 else value


def _named(losses: Losses) -> dict[str, Tensor]:
    terms = {f"loss/{name}": term.detach() for name, term in losses.terms.items()}
    return {"loss/total": losses.total.detach(), **terms, **losses.statistics}


def _clip(run: Run) -> Tensor:
    """The gradient's norm before clipping: of the summed gradient, so the same on all ranks."""
    parameters = [p for p in run.distiller.parameters() if p.requires_grad]
    if limit := run.settings.clip_gradient_norm:
        return torch.as_tensor(run.accelerator.clip_grad_norm_(parameters, limit), device=run.accelerator.device).detach()
    run.accelerator.unscale_gradients()  # fp16's, as clipping does
    # PyTorch's clipping would multiply every gradient by 1
    return get_total_norm([p.grad for p in parameters if p.grad is not None]).detach()


def settle(run: Run) -> None:
    """Learns whether the last step was made, and says so if it was not; called before anything is logged or saved."""
    held_back = run.guard.settle()
    if held_back is not None:
        _hold_back(run, held_back)


def _hold_back(run: Run, suspect: Suspect) -> None:
    """Counts a step that is not made and dumps what it saw; raises NonFiniteError where the settings allow no more of them."""
    counters, rank, step = run.counters, run.accelerator.process_index, suspect.step
    found = {name: value.item() for name, value in suspect.values.items()}
    bad = [name for name, value in found.items() if not math.isfinite(value)]
    dump = run.reporter.dump(
        f"nonfinite-step{step:08d}-rank{rank}.json",
        {
            "step": step,
            "rank": rank,
            "not_finite": bad,
            "values": found,
            "samples": run.name_samples(torch.cat(list(suspect.sample_ids)).tolist()),
        },
    )
    counters.skipped_steps += 1
    where = f"step {step}, rank {rank}: {', '.join(bad) if bad else 'nothing here, but on another rank'} not finite"
    if counters.skipped_steps > run.settings.skip_nonfinite:
        raise NonFiniteError(
            f"{where}; the step was not made and the last checkpoint is intact; the batch is in {dump}; a lower learning"
            " rate or bf16 instead of fp16 usually helps, train.skip_nonfinite lets a few such steps pass"
        )
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.update()  # it unscaled this gradient and must forget that
    run.reporter.say(f"{where}; skipped, {counters.skipped_steps} of {run.settings.skip_nonfinite} (see {dump})")


def _gradient_shares(run: Run, losses: Losses) -> dict[str, Tensor]:
    """Norm of each weighted term's gradient over the student's parameters, as a share of the sum of those norms."""
    parameters = [p for p in run.unwrapped.student.parameters() if p.requires_grad]
    norms = {}
    for name, term in losses.weighted.items():
        found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        each = [g.float().norm() for g in found if g is not None]
        norms[name] = torch.stack(each).norm() if each else term.new_zeros(())  # one that trains its own parameters alone
    total = torch.stack(list(norms.values())).sum()
    return {f"gradient_share/{name}": norm / total for name, norm in norms.items()}


def log_step(run: Run, values: dict[str, Tensor]) -> None:
    """Writes the step's values, averaged over processes: the one place in training that waits for the device."""
    names = sorted(values)
    stacked = torch.stack([values[name].detach().float() for name in names])
    means = run.accelerator.reduce(stacked, reduction="mean").tolist()
    progress = run.progress
    rates = {"lr": run.optimizer.param_groups[0]["lr"], "images_per_second": run.throughput.images_per_second}
    if run.counters.skipped_steps:
        rates["skipped_steps"] = run.counters.skipped_steps
    if bad := known_bad_samples(run.train_loader):
        rates["bad_samples"] = len(bad)
    epoch = progress.step / progress.steps_per_epoch
    run.reporter.log(progress.step, epoch, {**dict(zip(names, means, strict=True)), **rates})


def evaluate_student(run: Run) -> None:
    """Evaluates the run's classifier, notes the result in the counters and the log, and points BEST at this step."""
    counters = run.counters
    run.throughput.pause()
    try:
        counters.evaluation = evaluate(run.classifier, run.eval_loader, run.accelerator, lambda: pulse(run))
    except Interrupted:
        run.checkpoints.wait()
        raise
    if not math.isfinite(counters.evaluation["loss"]):
        raise NonFiniteError(
            f"step {counters.step}: the evaluated loss is {counters.evaluation['loss']}: the last step destroyed the weights;"
            " an earlier checkpoint may be sound; lower the learning rate"
        )
    counters.evaluated_step = counters.step
    top1 = counters.evaluation["top1"]
    if top1 >= counters.best_top1:
        counters.best_top1 = top1
        if run.accelerator.is_main_process:
            run.checkpoints.mark_best(counters.step)
    values = {f"eval/{name}": value for name, value in counters.evaluation.items()}
    values["eval/best_top1"] = counters.best_top1
    run.reporter.log(counters.step, counters.step / run.settings.steps_per_epoch, values)


def pulse(run: Run) -> bool:
    """Tells the watchdog that the run is alive, between two batches of an evaluation; whether anybody asked it to stop."""
    run.watch(run.counters.step, "evaluating")
    return run.control.agree().stop

"""The loop: fit, train_epoch, train_step, evaluation between epochs. It knows no loss, data format, model or recipe."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from distill.agreement import Interrupted
from distill.evaluation import evaluate, known_bad_samples
from distill.nonfinite import Suspect
from distill.protocols import Batch, Losses
from distill.run import Run, save


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not finite; raised before the optimiser steps."""


def fit(run: Run) -> dict[str, Any]:
    """Trains from `run.counters` to the end of the plan and returns the last evaluation and the counts of the run.

    Raises NonFiniteError before a poisoned step is made, Interrupted after a requested stop was saved.
    """
    counters, begin = run.counters, time.perf_counter()
    spent_before = counters.seconds
    run.reporter.start(counters.step, counters.evaluated_step)
    try:
        while True:
            counters.seconds = spent_before + time.perf_counter() - begin
            if counters.evaluated_step != counters.step and run.plan.evaluation_due(counters.step):
                evaluate_student(run)
            if counters.step >= run.plan.last_step:
                break
            train_epoch(run)
        run.checkpoints.wait()
    finally:
        run.reporter.close()
    counters.seconds = spent_before + time.perf_counter() - begin
    return {
        **{k: counters.evaluation[k] for k in ("top1", "top5", "loss")},
        "best_top1": counters.best_top1,
        "epochs": counters.step / run.plan.steps_per_epoch,
        "steps": counters.step,
        "images_per_second": run.throughput.images_per_second,
        "seconds": counters.seconds,
        "skipped_steps": counters.skipped_steps,
        "checkpoint_seconds": run.checkpoints.costs(),
    }


def train_epoch(run: Run) -> None:
    """Trains from the present step to the end of its epoch (or of the plan), logging and saving on the way."""
    plan, counters = run.plan, run.counters
    epoch, done = divmod(counters.step, plan.steps_per_epoch)
    batches = run.train_loader.epoch(epoch, start=done * plan.accumulate)
    last = min(plan.last_step, (epoch + 1) * plan.steps_per_epoch)
    run.distiller.train()
    while counters.step < last:
        run.watch(counters.step, "waiting for data")
        values, stop = train_step(run, list(islice(batches, plan.accumulate)))
        counters.step += 1
        run.after_step()
        run.throughput.step(plan.global_batch_size)
        run.reporter.advance()
        logged, due = counters.step % plan.log_every == 0 or counters.step == last, _save_due(run)
        if logged or due or stop:
            settle(run)
        if logged:
            log_step(run, values)
        if stop:
            save(run)
            run.checkpoints.wait()
            raise Interrupted(f"stopped at step {counters.step}, saved; the same command with --resume goes on")
        if counters.step < last and due:
            save(run)
    run.throughput.pause()
    save(run)  # before the evaluation, which a resumed run makes again if it was not finished


def _save_due(run: Run) -> bool:
    """Whether a checkpoint is due, the same on every process: saving is a collective, and clocks differ."""
    plan = run.plan
    if plan.checkpoint_every and run.counters.step % plan.checkpoint_every == 0:
        return True
    if not plan.checkpoint_minutes:
        return False
    overdue = run.checkpoints.seconds_since_save > 60 * plan.checkpoint_minutes
    return run.control.any(run.accelerator.is_main_process and overdue)  # only the main process's clock starts anew at a save


def train_step(run: Run, batches: list[Batch]) -> tuple[dict[str, Tensor], bool]:
    """One optimiser step over `accumulate` micro-batches: its mean values (detached, on the device), and whether any
    process was asked to stop."""
    accelerator, plan, progress = run.accelerator, run.plan, run.progress
    if len(batches) != plan.accumulate:
        raise RuntimeError(f"step {progress.step}: the loader gave {len(batches)} micro-batches of {plan.accumulate}")
    run.watch(progress.step, "forward and backward")
    run.seed_step(progress.step)
    for group in run.optimizer.param_groups:
        group["lr"] = run.learning_rate(progress) * group.get("lr_scale", 1.0)
    logged = (progress.step + 1) % plan.log_every == 0
    values: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        images, labels = run.transform(batch)
        with torch.no_grad(), accelerator.autocast():
            teacher = None if run.teacher is None else run.teacher(images)
        last = number == plan.accumulate - 1
        with nullcontext() if last else accelerator.no_sync(run.distiller):
            losses: Losses = run.distiller(images, labels, teacher, progress)
            with run.around_backward():
                if plan.gradient_shares and logged and last:
                    values |= _gradient_shares(run, losses)
                accelerator.backward(losses.total / plan.accumulate)
        for name, value in _named(losses).items():
            values[name] = values.get(name, 0) + value / plan.accumulate
    values["gradient_norm"] = _clip(run)
    run.watch(progress.step, "optimiser step")
    suspect = Suspect(progress.step, values, [batch.sample_ids for batch in batches])
    if run.guard.deferred:
        held_back = run.guard.step(suspect)
        verdict = run.control.agree()
    else:
        verdict = run.control.agree(poisoned=run.guard.is_poisoned(values))
        held_back = suspect if verdict.poisoned else None
        if held_back is None:
            run.optimizer.step()
    if held_back is not None:
        _hold_back(run, held_back)
    run.optimizer.zero_grad()
    if run.average is not None and not verdict.poisoned:
        run.average.update(run.unwrapped.plain_student, step=progress.step + 1)
    return values, verdict.stop


def _named(losses: Losses) -> dict[str, Tensor]:
    terms = {f"loss/{name}": term.detach() for name, term in losses.terms.items()}
    return {"loss/total": losses.total.detach(), **terms, **losses.statistics}


def _clip(run: Run) -> Tensor:
    """The gradient's norm before clipping: of the summed gradient, so the same on all ranks."""
    parameters = [p for p in run.distiller.parameters() if p.requires_grad]
    norm = run.accelerator.clip_grad_norm_(parameters, run.plan.clip_gradient_norm or math.inf)
    return torch.as_tensor(norm, device=run.accelerator.device).detach()


def settle(run: Run) -> None:
    """Before anything is logged, saved or evaluated: whether the last step was made is known, and said if it was not."""
    held_back = run.guard.settle()
    if held_back is not None:
        _hold_back(run, held_back)


def _hold_back(run: Run, suspect: Suspect) -> None:
    """Counts a step that is not made and dumps what it saw; raises NonFiniteError where the plan allows no more of them."""
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
    if counters.skipped_steps > run.plan.skip_nonfinite:
        raise NonFiniteError(
            f"{where}; the step was not made and the last checkpoint is intact; the batch is in {dump}; a lower learning"
            " rate or bf16 instead of fp16 usually helps, train.skip_nonfinite lets a few such steps pass"
        )
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.update()  # it unscaled this gradient and must forget that
    run.reporter.say(f"{where}; skipped, {counters.skipped_steps} of {run.plan.skip_nonfinite} (see {dump})")


def _gradient_shares(run: Run, losses: Losses) -> dict[str, Tensor]:
    """Norm of each weighted term's gradient over the student's parameters, as a share of the sum of those norms."""
    distiller = run.unwrapped
    parameters = [p for p in distiller.student.parameters() if p.requires_grad]
    norms = {}
    for name, term in losses.terms.items():
        weighted = distiller.weights[name](run.progress) * term
        found = torch.autograd.grad(weighted, parameters, retain_graph=True, allow_unused=True)
        norms[name] = torch.stack([g.float().norm() for g in found if g is not None]).norm()
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
    run.reporter.log(counters.step, counters.step / run.plan.steps_per_epoch, {**values, "eval/best_top1": counters.best_top1})


def pulse(run: Run) -> bool:
    """Between two batches of an evaluation: the run is alive; whether any process was asked to stop."""
    run.watch(run.counters.step, "evaluating")
    return run.control.agree().stop

"""Distils a timm student from a timm teacher: recipe -> objects -> fit.

accelerate launch pipelines/imagenet.py --help
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

from distill.children import end_at_interrupt
from pipelines.setup.launcher import end_with_launcher, exit_with

if __name__ == "__main__":
    end_at_interrupt()
    end_with_launcher()

import torch
from accelerate import Accelerator
from torch import nn

from distill.agreement import Control
from distill.checkpoint import CheckpointError
from distill.command_line import command, requests
from distill.config import as_dict
from distill.engine import NonFiniteError, fit
from distill.errors import Interrupted
from distill.evaluation import known_bad_samples
from distill.files import RUN_SUMMARY
from distill.losses import LOSSES
from distill.models.export import export_student
from distill.recipe import Recipe
from distill.recipe_checks import doubts
from distill.report import say
from distill.run import Run, restore
from distill.teacher_cache.teacher import CachedTeacher
from distill.watchdog import PeerLostError, Watchdog
from pipelines.reporting.first_batch import keeping_first
from pipelines.reporting.publish import card_fields, publish
from pipelines.setup.arguments import Request, parse
from pipelines.setup.build import build, build_settings, rehearse, unchanged
from pipelines.setup.data import Splits, build_splits, check_mixing, decoding_facts, eval_spec, train_order
from pipelines.setup.machine import (
    build_accelerator,
    collective_timeout,
    keep_freed_memory,
    leave_together,
    meet,
    micro_batch_of,
)
from pipelines.setup.models import Models
from pipelines.setup.out_of_memory import memory_explained
from pipelines.setup.remote import follow, schedule_run
from pipelines.setup.run_folder import RunFolder, digest
from pipelines.setup.teacher import evaluate_teacher, teacher_recipe


class Session(NamedTuple):
    """The part of a process that all its runs share."""

    accelerator: Accelerator
    control: Control
    watchdog: Watchdog

    def say(self, text: str) -> None:
        """Prints one line for people, on the main process only."""
        say(self.accelerator, text)


def start_trackers(recipe: Recipe, accelerator: Accelerator) -> None:
    """Starts Accelerate's trackers in this run's folder, whatever run this process made before."""
    accelerator.project_configuration.set_directories(recipe.out)
    accelerator.init_trackers("trackers")


def bad_samples(run: Run) -> int:
    """Samples that turned out bad in this run so far, over all processes and both splits."""
    return len(known_bad_samples(run.train_loader)) + len(known_bad_samples(run.eval_loader))


def trained(modules: Iterable[nn.Module]) -> int:
    """Numbers that the optimiser changes in these modules."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)


def finish(recipe: Recipe, run: Run, models: Models, summary: dict[str, Any], splits: Splits) -> None:
    """Writes the exported student, then summary.json, which says that the run is whole, then the report of the whole run."""
    accelerator, out = run.accelerator, Path(recipe.out)
    if accelerator.is_main_process:
        model = run.unwrapped.plain_student if run.average is None else run.average.module
        facts = {"metrics": {k: summary[k] for k in ("top1", "top5", "teacher_top1")}, "recipe": as_dict(recipe)}
        spec = eval_spec(recipe, models.student)
        names, card = list(splits.train.class_names), card_fields(recipe, summary, splits.val)
        export_student(model, out / "student", input_spec=spec, class_names=names, metadata=facts, card=card)
        run.reporter.write_json(RUN_SUMMARY, summary)
        if recipe.report.page:
            torch.cuda.empty_cache()  # both models are evaluated by another process, on this one's device
            publish(out, accelerator.trackers, run.reporter.say)
        for tracker in accelerator.trackers:
            tracker.finish()
    meet()


@contextmanager
def closed(run: Run, watchdog: Watchdog) -> Iterator[None]:
    """Closes the run's writer and loaders however it ends: a checkpoint is written to its end, and what a pipeline still has in
    flight on a device is over before the interpreter is.

    Where a process is lost the loaders are left as they are: the device may wait for that process without an end, and freeing
    memory waits for the device. `exit_with` ends this process without any of it.
    """
    lost = False
    try:
        yield
    except PeerLostError:
        lost = True
        raise
    finally:
        watchdog.progress(run.counters.step, "ending")
        for loader in () if lost else (run.train_loader, run.eval_loader):
            loader.close()
        run.checkpoints.close()


@contextmanager
def peers_named(watchdog: Watchdog) -> Iterator[None]:
    """Raises PeerLostError, which names the process that is gone, where a collective inside fails because of it."""
    try:
        yield
    except (Interrupted, NonFiniteError, CheckpointError):
        raise
    except RuntimeError as error:
        explained = watchdog.explain(error)
        if explained is None:
            raise
        raise explained from error


def go_on(run: Run) -> None:
    """Restores the newest whole checkpoint of the run's folder; every process must find the same one."""
    snapshot = run.checkpoints.newest()
    if snapshot is not None:
        restore(run, snapshot)
        run.reporter.note("resumed", run.counters.step)
        run.reporter.say(f"going on from step {run.counters.step}")
    steps = run.accelerator.gather(torch.tensor([run.counters.step], device=run.accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise RuntimeError(
            f"the processes see checkpoints of different steps, {steps}: --out must be one folder for all of them"
        )


def digests(splits: Splits) -> dict[str, Any]:
    """The checksums of the shards, for the manifest: a run may go on with these only, wherever they lie."""
    return {f"{name}_shards": index.digest for name, index in splits._asdict().items()}


def open_splits(recipe: Recipe, accelerator: Accelerator) -> Splits:
    """The recipe's shards. Raises RecipeError where they cannot serve it on this number of processes."""
    check_mixing(recipe, micro_batch_of(recipe, accelerator.num_processes))
    with requests():
        return build_splits(recipe, accelerator)


def warn(recipe: Recipe, splits: Splits, session: Session) -> None:
    """Says what of a request is doubtful: it is done as it was asked for."""
    for doubt in doubts(recipe, LOSSES, train_order(recipe, splits.train).steps_per_epoch):
        session.say(f"warning: {recipe.out}: {doubt}")
    if splits.train.digest == splits.val.digest:
        session.say(
            f"warning: {recipe.out}: data.train and data.val are the same shards: its top-1 says nothing about other images"
        )


def follow_shards(recipe: Recipe, splits: Splits, session: Session) -> None:
    """Has remote shards fetched in the order of this run, and says what that takes."""
    if line := follow(schedule_run(recipe, train_order(recipe, splits.train), *splits, session.accelerator)):
        session.say(line)


def run_once(recipe: Recipe, folder: RunFolder, splits: Splits, session: Session) -> None:
    """Makes one run, from the objects of its recipe to its summary; it goes on where it stopped.

    `recipe` is the folder's own, with the weights of a teacher that was trained for it.
    """
    accelerator = session.accelerator
    session.watchdog.progress(0, "building")
    warn(recipe, splits, session)
    follow_shards(recipe, splits, session)
    # 1. what is wrong with the request is found before the folder says that it holds a run
    with requests():
        keep = partial(keeping_first, folder=folder.path, class_names=splits.train.class_names)
        around = keep if accelerator.is_main_process else unchanged
        watchdog = session.watchdog
        run, models = build(recipe, accelerator, splits, session.control, watchdog.progress, watchdog.check, around)
    with closed(run, session.watchdog):
        contents = {**digests(splits), "teacher": digest(models.teacher), "teacher_cache": cache_identity(run)}
        folder.check(contents)
        start_trackers(recipe, accelerator)
        with peers_named(session.watchdog):
            teacher = evaluate_teacher(recipe, run, models, splits.val)
            forget_trunk(run)
            # 2. the manifest comes before the first checkpoint: whatever is found in this folder later says what made it
            decoding = decoding_facts(recipe, splits.train, accelerator)
            folder.write({"train_samples": splits.train.num_samples, "decoding": decoding, **contents})
            if folder.resumed:
                go_on(run)
            with memory_explained(recipe, run, models):
                found = fit(run)
        # 3. the summary comes last: a folder that has one is finished, and one that has none goes on
        session.watchdog.progress(run.counters.step, "building")
        found["bad_samples"] = bad_samples(run)
        sizes = {"student_parameters": trained([models.student]), "loss_parameters": trained(models.criteria.values())}
        names = {"student": recipe.student.name, "teacher": recipe.teacher.name}
        summary = {**found, "teacher_top1": teacher.get("top1"), **names, **sizes}
        finish(recipe, run, models, summary, splits)
    session.say(
        f"{recipe.out}: top-1 {found['top1']:.2f}, top-5 {found['top5']:.2f}, {found['images_per_second']:.0f} images/s"
    )


def cache_identity(run: Run) -> str | None:
    """Which teacher cache a run reads; None where its teacher is live."""
    return run.teacher.identity["teacher_cache"] if isinstance(run.teacher, CachedTeacher) else None


def forget_trunk(run: Run) -> None:
    """Gives the memory of a cached teacher's trunk back, after the last time that it is run."""
    if isinstance(run.teacher, CachedTeacher):
        freed = run.teacher.forget_trunk()
        run.reporter.say(f"teacher: from {cache_identity(run)}; {freed / 1e6:.1f} MB of its weights are not needed any more")


def train_teacher(recipe: Recipe, splits: Splits, session: Session) -> Recipe:
    """`recipe` with a path as its teacher's weights; trains that teacher where it has not been done."""
    with RunFolder.claim(teacher_recipe(recipe), True, session.accelerator) as folder:
        if folder.summary is None:
            with requests():
                rehearse(recipe, session.accelerator, splits)
            run_once(folder.recipe, folder, splits, session)
        return dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, weights=str(folder.path / "student")))


def execute(request: Request, session: Session) -> None:
    """The teacher's run, where the recipe asks for one, then the student's."""
    session.watchdog.progress(0, "building")
    with RunFolder.claim(request.recipe, request.resume, session.accelerator) as folder, ExitStack() as stack:
        recipe = folder.recipe
        if request.resume and not folder.resumed:  # no error: a job's queue gives the same command at its first start
            session.say(f"--resume: {folder.path} holds no run; a new one begins")
        splits = stack.enter_context(closing(open_splits(recipe, session.accelerator)))
        session.watchdog.waiting = splits.waiting
        folder.check(digests(splits))
        if folder.summary is not None and folder.summary["steps"] >= build_settings(recipe, splits.train).last_step:
            session.say(f"{folder.path}: this run is finished")
            return
        if recipe.teacher.name != "none" and recipe.teacher.weights == "train":
            recipe = train_teacher(recipe, splits, session)
        run_once(recipe, folder, splits, session)


@contextmanager
def opened_session(recipe: Recipe) -> Iterator[Session]:
    """The session of this process: joined with the others', listening to signals, watched until it is closed."""
    accelerator = build_accelerator(recipe)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    timeout = 60 * recipe.train.timeout_minutes
    watchdog = Watchdog(accelerator.process_index, accelerator.num_processes, timeout).start()
    try:
        control = Control(collective_timeout(recipe)).listen()
        try:
            yield Session(accelerator, control, watchdog)
        except Interrupted:
            leave_together(control.agree)
            raise
        leave_together(control.agree)
    finally:
        watchdog.close()


@command
def main(argv: Sequence[str]) -> None:
    """The run that the command line asks for."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    request = parse(argv, LOSSES)
    with opened_session(request.recipe) as session:
        execute(request, session)


if __name__ == "__main__":
    exit_with(main)

"""Checks by whole commands, each as a user would start it: golden values, resuming, launchers, evaluation, speed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from distill.data.index import ShardIndex
from distill.errors import EXIT_CODE
from distill.files import RUN_METRICS
from pipelines.checks.finding import Finding, at_least, at_most, judged, passed, skipped
from pipelines.checks.machine import LAUNCH
from pipelines.checks.place import PAIR, ROOT, Place

TRAIN = str(ROOT / "pipelines" / "imagenet.py")
GOLDEN = ("methods/a", "methods/b", "ceiling")
"""Folders of golden values that a command checks; the checkout has them."""
RESUMED_STEPS, STOP_AFTER = 24, 8
LEAST_SPEED = 6_000.0
"""Images per second of ResNet-34 -> ResNet-18 in bf16 on a fast GPU. An H200 gave 8,286 with its data in memory."""
MOST_BESIDE = 1.08
"""Step without its wait for data over the models alone, for the papers' first pair with one loss."""
EVALUATED = "resnet18"
CACHEABLE = "cifar100/sdd_dkd.yaml"
"""A recipe of small networks whose losses read logits alone."""
LEDGER_SECONDS = 40.0
"""Time that one measurement may take; it is not begun where less is left."""


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a command said last."""
    return (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()[-1]


def losses(place: Place) -> Iterator[Finding]:
    """Every golden case on the device: values and gradients of the authors' code."""
    folders = [ROOT / "tests" / "golden" / name for name in (GOLDEN[-1:] if place.pretend else GOLDEN)]
    if not all(folder.is_dir() for folder in folders):
        yield skipped("golden values", "this is no checkout: tests/golden is not here")
        return
    command = [sys.executable, "-m", "tests.golden.check", *map(str, folders), "--device", place.device.type]
    done = place.run(command)
    cases = sum(int(line.split()[-2]) for line in done.stdout.splitlines() if line.endswith(" cases") and line.startswith("/"))
    missed = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith("MISS")]
    text = f"{cases - len(missed)} of {cases} cases hold" + "".join(f"; {line}" for line in missed[:3])
    yield judged(
        "golden values",
        not done.returncode and cases > 0,
        text if cases else last_line(done),
        "report it: losses are wrong here",
    )


def resume(place: Place) -> Iterator[Finding]:
    """A run to its end against one that is stopped by SIGTERM and goes on: exit codes, batches, weights."""
    yield from resumed(place, "as it is", exact=not place.on_gpu)
    if place.on_gpu:
        yield from resumed(place, "deterministic", "--train.deterministic", "true", exact=True)


def resumed(place: Place, name: str, *more: str, exact: bool) -> Iterator[Finding]:
    """One pair of such runs; `exact`: their weights must be equal."""
    options = [*place.options(), "--train.epochs", "1000", "--train.max_steps", str(RESUMED_STEPS), "--report.log_every", "1"]
    options += ["--train.evaluate_every", "1000", *(["--train.mixed_precision", "bf16"] if place.on_gpu else []), *more]
    folders = [Path(place.folder) / f"{name.split()[0]}-{kind}" for kind in ("straight", "stopped")]
    commands = [[sys.executable, TRAIN, *options, "--out", str(folder)] for folder in folders]
    straight = place.run(commands[0])
    if straight.returncode:
        yield Finding("FAIL", f"a run, {name}", f"exit code {straight.returncode}: {last_line(straight)}")
        return
    code = stopped(place, commands[1], folders[1])
    yield judged(f"stopped, {name}", code == EXIT_CODE, f"exit code {code} (75 is wanted)", "report it")
    again = place.run([*commands[1], "--resume"])
    yield judged(
        f"resumed, {name}",
        not again.returncode,
        f"exit code {again.returncode}" + (f": {last_line(again)}" if again.returncode else ""),
    )
    if again.returncode:
        return
    steps = [[row["step"] for row in logged(folder)] for folder in folders]
    yield judged(f"steps, {name}", steps[0] == steps[1] == list(range(1, RESUMED_STEPS + 1)), "every step once in both logs")
    weights = [load_file(next((folder / "student").glob("*.safetensors"))) for folder in folders]
    apart = max(float((weights[0][key].double() - weights[1][key].double()).abs().max()) for key in weights[0])
    text = f"largest difference of the students' weights {apart:.3g}" + (" (0 is wanted)" if exact else "")
    remedy = "say --train.deterministic true where a resumed run must be the same to the last bit"
    yield judged(f"weights, {name}", not apart, text, remedy, "FAIL" if exact else "WARN")


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log that are steps."""
    path = folder / RUN_METRICS
    lines = path.read_text().splitlines() if path.is_file() else []
    return [row for row in map(json.loads, lines) if "loss/total" in row]


def stopped(place: Place, command: list[str], folder: Path) -> int:
    """The exit code of a run that gets SIGTERM after some steps."""
    with (Path(place.folder) / "stopped.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=place.environment(), cwd=ROOT)
        while process.poll() is None and len(logged(folder)) < STOP_AFTER:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        return process.wait()


def launchers(place: Place) -> Iterator[Finding]:
    """Launches that do not fit the machine: one line and exit code 2 are wanted, and the one that fits trains."""
    few = ["--train.epochs", "1000", "--train.max_steps", "2", "--train.evaluate_every", "1000"]
    request = [TRAIN, *place.options(), *few, "--out", str(Path(place.folder) / "launched")]
    gpus = torch.cuda.device_count() if place.on_gpu else 0
    several = [*LAUNCH, str(gpus + 1 if gpus else 2)]
    cases: dict[str, dict[str, str]] = {"more processes than GPUs": {}} if gpus else {}
    cases["several processes without a GPU"] = {"CUDA_VISIBLE_DEVICES": ""}
    for name, environment in cases.items():
        asked = {**environment, "ACCELERATE_USE_CPU": "false"}
        done = place.run([*several, *request], **asked)
        told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        # torchrun itself exits with 1 whatever its processes exit with, and says so at length
        codes = set(re.findall(r"exitcode\s*:\s*(-?\d+)", done.stderr))  # -15: torchrun ends the others once one has ended
        text = told[0] if told else last_line(done)
        yield judged(name, len(told) == 1 and "2" in codes <= {"2", "-15"}, text[:300], "report it")
    request += ["--train.global_batch_size", str(8 * (gpus or 2))]  # whatever their number, it divides
    fitting = [*LAUNCH, str(gpus or 2), *request] if gpus > 1 or not place.on_gpu else [sys.executable, *request]
    done = place.run(fitting)
    yield judged(
        "the launch that fits",
        not done.returncode,
        f"exit code {done.returncode}" + (f": {last_line(done)}" if done.returncode else ""),
    )


def evaluation(place: Place) -> Iterator[Finding]:
    """Evaluation of random weights on the device against the exact loader: counts are exact, figures nearly equal."""
    found = {}
    name = EVALUATED if place.on_gpu else "cifar_resnet8"
    for loader in ("auto", "reference"):
        path = Path(place.folder) / f"evaluation-{loader}.json"
        command = [sys.executable, str(ROOT / "pipelines" / "evaluate.py"), "--model", name, "--val", place.val]
        command += ["--weights", str(random_weights(place, name)), "--loader", loader, "--json", str(path)]
        command += ["--decode", place.decode.read_text()] if place.decode.is_file() else []
        done = place.run(command)
        if done.returncode:
            yield Finding("FAIL", f"evaluation, {loader}", f"exit code {done.returncode}: {last_line(done)}")
            return
        found[loader] = json.loads(path.read_text())
    wanted = ShardIndex.open(place.val).num_samples
    ours, theirs = found["auto"], found["reference"]
    yield judged("images counted", ours["images"] == theirs["images"] == wanted, f"{ours['images']} of {wanted}")
    yield at_most("difference of the loss", abs(ours["loss"] - theirs["loss"]), 0.02, "of both", "report it", digits=4)
    yield passed("rate", f"{ours['images_per_second']:,.0f} images/s", ours["images_per_second"])


def random_weights(place: Place, name: str) -> Path:
    """A file of a model's random weights, the same for every loader."""
    import timm
    from safetensors.torch import save_file

    import distill.models  # noqa: F401  registers the CIFAR networks

    path = Path(place.folder) / f"{name}.safetensors"
    if not path.is_file():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=ShardIndex.open(place.val).num_classes)
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path


def cache(place: Place) -> Iterator[Finding]:
    """A teacher cache of the made shards, and a run that reads it: what was stored is what loader and teacher give again."""
    folder, recipe = str(Path(place.folder) / "cache"), "" if place.on_gpu else CACHEABLE
    few = ["--train.epochs", "1000", "--train.max_steps", "2", "--train.evaluate_every", "1000"]
    commands = {
        "made": ["cache_teacher.py", *place.options(recipe), "--out", folder, "--views", "1", "--batch", str(place.batch)],
        "verified": ["cache_teacher.py", "--out", folder, "--verify"],
        "read": ["imagenet.py", *place.options(recipe), *few, "--out", f"{folder}-run", "--teacher.cache", folder],
    }
    for name, (script, *options) in commands.items():
        done = place.run([sys.executable, str(ROOT / "pipelines" / script), *options])
        text = f"exit code {done.returncode}" + (f": {last_line(done)}" if done.returncode else "")
        yield judged(f"a teacher cache, {name}", not done.returncode, text, "report it")
        if done.returncode:
            return


def speed(place: Place) -> Iterator[Finding]:
    """The ledger of a step in every setting of `ledgers.yaml`; on a CPU that of the stand-in."""
    settings = yaml.safe_load((Path(__file__).parent / "ledgers.yaml").read_text())
    if not place.on_gpu:
        settings = [{"name": "the stand-in's step", "recipe": "", "options": ["--data", "shards"]}]
    for number, setting in enumerate(settings):
        if place.left < LEDGER_SECONDS:
            yield skipped(setting["name"], "no time was left; --only speed measures it")
            continue
        yield from ledger(place, **setting, limited=number == 0 and place.on_gpu)


def ledger(place: Place, name: str, recipe: str, options: list[str], limited: bool) -> Iterator[Finding]:
    """The figures of `pipelines/benchmark.py` for one setting, compared with limits where it is `limited`."""
    path = Path(place.folder) / "ledger.json"
    path.unlink(missing_ok=True)
    shared = place.options(recipe)
    if place.on_gpu:
        shared += ["--train.global_batch_size", "256", "--train.mixed_precision", "bf16", "--rounds", "3", "--steps", "15"]
    else:
        shared += ["--rounds", "1", "--steps", "2", "--warm-up", "1"]
    benchmark = str(ROOT / "pipelines" / "benchmark.py")
    done = place.run([sys.executable, benchmark, *shared, "--json", str(path), *options])
    if done.returncode or not path.is_file():
        yield Finding("FAIL", name, f"exit code {done.returncode}: {last_line(done)}")
        return
    report = json.loads(path.read_text())
    step, ceiling = report["step"], report["ceiling"]
    wait = next((part["share"] for part in report["parts"] if part["name"] == "data wait"), 0.0)
    text = (
        f"{step['ms']:.1f} ms ({step['unmarked_ms']:.1f} without marks), {step['images_per_second']:,.0f} images/s,"
        f" {ceiling['ratio']:.3f} times the models alone, {wait:.0%} waiting for data"
    )
    yield passed(name, text, step["ms"])
    if limited:
        yield at_least("rate", step["images_per_second"], LEAST_SPEED, "images/s", f"see docs/gpu.md; pair of {PAIR}")
        yield at_most("step over its models", ceiling["ratio"], MOST_BESIDE, "times", "the host may be too slow", digits=3)

"""The main job by real processes: whole runs, two ranks against one, killed and resumed, stopped on request, refused."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import timm
import torch
from safetensors.torch import save_file

import distill.models
from distill.agreement import TWICE_SECONDS
from distill.data.dali_graph import dali_available
from tests.conftest import TRAIN_IMAGES, VAL_IMAGES
from tests.processes import finished, start
from tests.runs import ALL_LOSSES, EVERYTHING, FP16, arguments, assert_same_run, last_state, metrics, steps_of

ROOT = Path(__file__).parents[2]
DISTILLED = ROOT / "pipelines" / "recipes" / "digits" / "distilled.yaml"


def test_the_documented_command_trains_teacher_and_student_and_leaves_a_plain_timm_model(digits: Path, tmp_path: Path):
    """`accelerate launch pipelines/imagenet.py`, then `pipelines/evaluate.py` on what it exported: the same number."""
    out = tmp_path / "run"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    more = ["--teacher-weights", "train", "--teacher.epochs", "1", "--teacher.evaluate", "true"]
    done = subprocess.run(
        [*launch, "pipelines/imagenet.py", *arguments(digits, out, *more)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    wanted = {"top1", "top5", "best_top1", "teacher_top1", "epochs", "steps", "images_per_second", "seconds"}
    assert wanted <= summary.keys()
    assert (summary["epochs"], summary["steps"]) == (2, 12)
    teacher = json.loads((out / "teacher" / "summary.json").read_text())
    assert summary["teacher_top1"] == pytest.approx(teacher["top1"])
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["world_size"] == 1
    assert manifest["recipe"]["train"]["global_batch_size"] == 24
    if dali_available():
        assert manifest["decoding"] == {"loader": "dali", "asked": "auto", "mode": "window", "trials": []}
        assert {"dali", "dali_cuda", "nvimgcodec", "nvjpeg"} <= manifest["versions"].keys()
    assert list((out / "trackers").rglob("events.out.tfevents*"))

    figures = tmp_path / "figures.json"
    evaluate = [
        "pipelines/evaluate.py",
        "--model",
        "cifar_resnet8",
        "--weights",
        str(out / "student"),
        "--val",
        str(digits / "val"),
    ]
    done = subprocess.run([*launch, *evaluate, "--json", str(figures)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(figures.read_text())["top1"] == summary["top1"]

    by_path = timm.create_model("cifar_resnet8", checkpoint_path=str(out / "student" / "model.safetensors"), num_classes=10)
    by_folder = timm.create_model(f"local-dir:{out / 'student'}", pretrained=True)
    images = torch.rand(4, 3, 32, 32)
    assert torch.equal(by_path.eval()(images), by_folder.eval()(images))
    assert by_folder.pretrained_cfg["input_size"] == (3, 32, 32)


def test_two_processes_give_the_losses_of_one(digits: Path, tmp_path: Path):
    """At the same global batch, BatchNorm frozen, to 1e-5; evaluation counts every image once on both."""
    common = ["--student.batchnorm", "frozen", "--loss.msdcrd", "null", "--train.epochs", "1", "--optim.learning_rate", "0.001"]
    one, two = tmp_path / "one", tmp_path / "two"
    finished(arguments(digits, one, *common), tmp_path / "one.log")
    finished(arguments(digits, two, *common), tmp_path / "two.log", world_size=2)
    assert json.loads((two / "manifest.json").read_text())["world_size"] == 2
    assert json.loads((one / "manifest.json").read_text())["world_size"] == 1
    for a, b in zip(metrics(one), metrics(two), strict=True):
        for name in (n for n in a if n.startswith("loss/") or n in ("eval/images", "eval/top1")):
            assert a[name] == pytest.approx(b[name], rel=1e-5), (a["step"], name)
    assert metrics(two)[-1]["eval/images"] == VAL_IMAGES


def test_torchrun_starts_two_real_ranks(digits: Path, tmp_path: Path):
    """The launcher that users are told to use for several CPU processes; evaluation is exact on an odd split."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "pipelines/imagenet.py"]
    done = subprocess.run(
        [*command, *arguments(digits, out, "--train.epochs", "1", "--train.max_steps", "2")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "manifest.json").read_text())["world_size"] == 2
    assert json.loads((out / "summary.json").read_text())["steps"] == 2


def is_importing(process: psutil.Process) -> bool:
    """Whether it is one of ours and past its first line; a launcher has other, short-lived children."""
    try:
        ours = "pipelines/imagenet.py" in process.cmdline()
        return ours and any("libtorch" in mapped.path for mapped in process.memory_maps())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def test_processes_whose_launcher_dies_while_they_start_do_not_outlive_it(digits: Path, tmp_path: Path):
    """They would wait for a rendezvous that the launcher held, and keep the run's folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "pipelines/imagenet.py"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen([*command, *arguments(digits, tmp_path / "run")], cwd=ROOT, env=environment)
    workers: list[psutil.Process] = []
    while len(workers) < 2:
        assert launcher.poll() is None
        workers = [c for c in psutil.Process(launcher.pid).children() if is_importing(c)]
        time.sleep(0.01)
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    for worker in alive:
        worker.kill()
    assert not alive


def test_accumulated_micro_batches_are_one_batch(digits: Path, tmp_path: Path):
    common = ["--student.batchnorm", "frozen", "--loss.msdcrd", "null", "--train.epochs", "1", "--optim.learning_rate", "0.001"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finished(arguments(digits, whole, *common), tmp_path / "whole.log")
    finished(arguments(digits, parts, *common, "--train.accumulate", "4"), tmp_path / "parts.log")
    for a, b in zip(metrics(whole), metrics(parts), strict=True):
        for name in (n for n in a if n.startswith("loss/")):
            assert a[name] == pytest.approx(b[name], rel=1e-5), (a["step"], name)


@pytest.mark.parametrize(("world_size", "more"), [(1, [*EVERYTHING, *FP16]), (2, ALL_LOSSES)])
def test_killed_at_any_step_and_resumed_is_the_uninterrupted_run(
    digits: Path, tmp_path: Path, world_size: int, more: list[str]
):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    fp16 = {"FP16_ON_CPUS": "true"}
    finished(arguments(digits, straight, *more), tmp_path / "straight.log", world_size, environment=fp16)
    command = arguments(digits, killed, *more, "--resume")
    for step in (3, 8):
        job = start(command, tmp_path / "killed.log", world_size, fp16)
        job.wait_until(lambda s=step: (killed / "metrics.jsonl").is_file() and len(steps_of(killed)) >= s)
        os.kill(job.ranks[-1].pid, signal.SIGKILL)  # one rank dies, then the others
        job.kill()
        assert not (killed / "summary.json").is_file()
    finished(command, tmp_path / "killed.log", world_size, environment=fp16)
    assert "going on from step" in (tmp_path / "killed.log").read_text()
    assert_same_run(straight, killed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_on_any_rank_saves_and_exits_with_75_and_the_same_command_goes_on(
    digits: Path, tmp_path: Path, number: signal.Signals
):
    out, log = tmp_path / "run", tmp_path / "log"
    command = arguments(digits, out, "--resume")
    job = start(command, log, world_size=2)
    job.wait_until(lambda: (out / "metrics.jsonl").is_file() and len(steps_of(out)) >= 2)
    os.kill(job.ranks[1].pid, number)
    assert job.wait() == [75, 75], job.text()
    stopped = json.loads((out / "checkpoints" / (out / "checkpoints" / "LAST").read_text() / "checkpoint.json").read_text())
    assert stopped["meta"]["step"] == len(steps_of(out)), "nothing that was done is lost"
    finished(command, log, world_size=2)
    assert [json.loads(line)["step"] for line in steps_of(out)] == list(range(1, 13))


def test_ctrl_c_twice_ends_at_once(digits: Path, tmp_path: Path):
    out, log = tmp_path / "run", tmp_path / "log"
    # a loader that does not answer: the first step never ends, and nothing is saved
    job = start(arguments(digits, out), log, environment={"STALL_LOADER": "0:10"})
    job.wait_until(lambda: "step/s" in job.text())
    os.kill(job.ranks[0].pid, signal.SIGINT)
    job.wait_until(lambda: "Ctrl-C: saving, then stopping; again: ending at once" in job.text())
    time.sleep(TWICE_SECONDS)
    assert not job.is_over()
    os.kill(job.ranks[0].pid, signal.SIGINT)
    assert job.wait(20) == [-signal.SIGINT], job.text()
    assert not (out / "checkpoints" / "LAST").exists()
    assert not (out / "summary.json").exists()


def test_bad_requests_get_one_clear_line_and_exit_code_2(digits: Path, tmp_path: Path):
    out = tmp_path / "run"
    cases = {
        ("--student", "resnet81"): "did you mean",
        ("--train.epoch", "3"): "did you mean --train.epochs",
        ("--loss.sdd.base", "kdd"): "loss.sdd.base",
        ("--train", str(tmp_path / "nowhere")): "no such folder",
        ("--loss.msdcrd.stages", "[-7]"): "loss.msdcrd: stages",
        ("--train.global_batch_size", "2000"): f"{TRAIN_IMAGES} samples do not fill one global batch of 2000",
        ("--train.accumulate", "7"): "not divisible by 1 processes x accumulate 7",
        ("--teacher-weights", str(tmp_path / "no.safetensors")): "no.safetensors",
        ("--augment.mixup", "0.2"): "needs one class per image, and images mixed by augment.mixup have two",
        ("--augment.mixup", "0.2", "--train.global_batch_size", "23"): "a micro-batch of 23 is odd",
        ("--out", str(digits / "_info.json")): "cannot be a run's folder",
        ("--out", ""): "out: '' is no folder; give the run's folder with --out",
        ("--out", "s3://bucket/run"): "out: s3://bucket/run is a URL",
        ("--report.trackers", "[nonesuch]"): "report.trackers: nonesuch cannot be had",
        ("--optim.learning_rate", ".inf"): "optim.learning_rate",
        ("--train.mixed_precision", "fp16"): "fp16 needs a GPU, and this is a cpu; take bf16 or no",
        ("--student.initial_weights", "pretrained"): "timm publishes no weights for cifar_resnet8",
        # said before the teacher is trained, not days later
        ("--teacher-weights", "train", "--student", "resnet81"): "did you mean",
    }
    for number, (more, expected) in enumerate(cases.items()):
        job = finished(arguments(digits, out, *more), tmp_path / f"{number}.log", codes=2)
        assert expected in job.text(), job.text()
        assert "Traceback" not in job.text()
    assert not (out / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--crop-fraction", "-1"], "--crop-fraction: -1.0"),
        (["--batch-size", "0"], "--batch-size: 0 is no whole number of at least 1"),
        (["--image-size", "-3"], "--image-size: -3 is no whole number of at least 0; see --help"),
        (["--json", "/nowhere/at/all.json"], "--json: /nowhere/at is no folder"),
        (["--model", "resnet81"], "did you mean"),
    ],
)
def test_evaluate_refuses_in_one_line(
    more: list[str], expected: str, digits: Path, capsys: pytest.CaptureFixture, fresh_accelerate: None
):
    from pipelines.evaluate import main

    assert main(["--model", "cifar_resnet8", "--weights", "random", "--val", str(digits / "val"), *more]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert expected in said


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([], "32x32 px, crop 1, precision bf16"),
        (["--image-size", "64", "--crop-fraction", "0.5"], "64x64 px, crop 0.5, precision bf16"),
        (["--mixed-precision", "no"], "32x32 px, crop 1, precision no"),
        # its position embedding is made for one size
        (["--model", "vit_tiny_patch16_224", "--image-size", "32"], "32x32 px, crop 0.9, precision bf16"),
    ],
)
def test_evaluate_feeds_the_model_as_asked_and_says_how(
    more: list[str],
    told: str,
    digits: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fresh_accelerate: None,
):
    from pipelines.evaluate import main

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as a launcher sets it
    assert main(["--model", "cifar_resnet8", "--weights", "random", "--val", str(digits / "val"), *more]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert f"{VAL_IMAGES} images, top-1 " in line
    assert line.endswith(f"images/s; {told}")


def test_a_teacher_of_another_class_count_is_refused_with_both_numbers(digits: Path, tmp_path: Path):
    from distill.models.export import export_student
    from distill.models.input_spec import input_spec_of

    model = timm.create_model("cifar_resnet14", num_classes=7)
    export_student(model, tmp_path / "seven", input_spec=input_spec_of(model))
    job = finished(arguments(digits, tmp_path / "run", "--teacher-weights", str(tmp_path / "seven")), tmp_path / "log", codes=2)
    assert "7" in job.text()
    assert "10" in job.text()
    assert "Traceback" not in job.text()


def test_a_folder_that_holds_a_run_is_not_written_to_again(digits: Path, tmp_path: Path):
    out = tmp_path / "run"
    finished(arguments(digits, out, "--train.max_steps", "1"), tmp_path / "first.log")
    before = (out / "summary.json").read_text()
    job = finished(arguments(digits, out, "--train.max_steps", "1"), tmp_path / "second.log", codes=2)
    assert "already holds a run; add --resume" in job.text()
    job = finished(arguments(digits, out, "--resume", "--optim.learning_rate", "0.5"), tmp_path / "third.log", codes=2)
    assert "optim.learning_rate: 0.05 in the run, 0.5 asked" in job.text()
    finished(arguments(digits, out, "--resume", "--train.max_steps", "1"), tmp_path / "fourth.log")
    assert (out / "summary.json").read_text() == before
    finished(arguments(digits, out, "--resume", "--train.max_steps", "2"), tmp_path / "fifth.log")
    assert json.loads((out / "summary.json").read_text())["steps"] == 2


@pytest.mark.parametrize("made_by", [{}, {"format": 0}], ids=["before formats had a number", "an older format"])
def test_a_run_of_another_version_is_refused_in_one_line(digits: Path, tmp_path: Path, made_by: dict[str, int]):
    """Its checkpoints may mean something else now; nothing of it is read or written."""
    out = tmp_path / "run"
    finished(arguments(digits, out, "--train.max_steps", "1"), tmp_path / "first.log")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["version"] == distill.__version__
    del manifest["format"]
    (out / "manifest.json").write_text(json.dumps({**manifest, **made_by}))
    before = (out / "manifest.json").read_text(), last_state(out)
    for number, more in enumerate(([], ["--resume"])):
        job = finished(arguments(digits, out, "--train.max_steps", "2", *more), tmp_path / f"again{number}.log", codes=2)
        [line] = [line for line in job.text().splitlines() if line.startswith("error: ")]
        assert "made by another version of this program" in line
        assert "give another --out" in line
        assert "Traceback" not in job.text()
    after = (out / "manifest.json").read_text(), last_state(out)
    assert before[0] == after[0]
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])


def test_a_resumed_run_reads_the_shards_and_the_teacher_that_it_began_with(digits: Path, tmp_path: Path):
    """Paths may change, contents may not."""
    out, moved = tmp_path / "run", tmp_path / "moved"
    first = ["--train.max_steps", "2", "--teacher-weights", str(teacher_file(tmp_path / "a.safetensors"))]
    finished(arguments(digits, out, *first), tmp_path / "first.log")
    shutil.copytree(digits / "train", moved)
    other = str(teacher_file(tmp_path / "b.safetensors"))
    going_on = ["--resume", "--train.max_steps", "3"]
    job = finished(arguments(digits, out, *first, *going_on, "--train", str(digits / "val")), tmp_path / "data.log", codes=2)
    assert "was made with other train_shards" in job.text()
    job = finished(
        arguments(digits, out, *first, "--resume", "--train.max_steps", "3", "--teacher-weights", other),
        tmp_path / "t.log",
        codes=2,
    )
    assert "was made with other teacher" in job.text()
    finished(
        arguments(digits, out, *first, "--resume", "--train.max_steps", "3", "--train", str(moved)), tmp_path / "moved.log"
    )
    assert json.loads((out / "summary.json").read_text())["steps"] == 3


def teacher_file(path: Path) -> Path:
    save_file(timm.create_model("cifar_resnet14", num_classes=10).state_dict(), path)
    return path


def test_a_loss_that_is_not_finite_stops_before_the_step(digits: Path, tmp_path: Path):
    out = tmp_path / "run"
    job = finished(
        arguments(digits, out, "--optim.learning_rate", "1e30", "--schedule.warmup_epochs", "0"), tmp_path / "log", codes=1
    )
    assert "NonFiniteError: step" in job.text()
    assert "rank 0" in job.text()
    logged = [line["loss/total"] for line in metrics(out) if "loss/total" in line]
    assert logged
    assert all(map(math.isfinite, logged))


def test_a_profile_is_a_trace_of_the_steps_that_were_asked_for(digits: Path, tmp_path: Path):
    out = tmp_path / "run"
    job = finished(arguments(digits, out, "--report.profile_steps", "7"), tmp_path / "short.log", codes=2)
    assert "report.profile_steps: needs 13 steps, 6 before the profile; the run has 12" in job.text()
    finished(arguments(digits, out, "--profile"), tmp_path / "log")
    trace = json.loads((out / "profile" / "trace-rank0.json").read_text())
    steps = {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep#")}
    assert len(steps) == 3
    assert any(event.get("name") == "aten::convolution_backward" for event in trace["traceEvents"])

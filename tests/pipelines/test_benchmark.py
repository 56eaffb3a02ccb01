"""The ledger of a step: what it promises of its own structure, by real processes, and which requests it refuses."""

import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import distill.models  # noqa: F401 (registers the CIFAR architectures)
from distill.config import RecipeError
from distill.models.build import create_model
from distill.models.export import export_student
from distill.models.input_spec import input_spec_of
from pipelines.benchmark import cache_use, main
from pipelines.measure.report import Report, StepPart
from pipelines.measure.rounds import middle
from pipelines.measure.show import as_text, bottleneck
from pipelines.measure.timeline import (
    ALL_REDUCE,
    BACKWARD,
    DATA,
    FORWARD,
    OPTIMISER,
    REST,
    TEACHER,
    Marked,
    Timeline,
    loss_part,
)
from tests.measured import arguments, measured, start_benchmark


@pytest.fixture(scope="module")
def folder(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a benchmark of one process leaves: accumulation, an average of the weights, all three kinds of losses, a picture."""
    folder = tmp_path_factory.mktemp("ledger")
    more = ["--train.accumulate", "2", "--ema.enabled", "true", "--plot", str(folder / "step.png")]
    more += ["--teacher.precision", "bf16"]
    measured(arguments(digits, *more), folder / "ledger.json")
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    return Report.read(folder / "ledger.json")


def test_the_parts_sum_to_the_step_and_cover_all_that_training_does(report: Report):
    assert sum(part.ms for part in report.parts) == pytest.approx(report.step.ms)
    assert sum(part.share for part in report.parts) == pytest.approx(1)
    names = [part.name for part in report.parts]
    losses = ["cross_entropy", "sdd", "msdcrd"]
    assert report.setting.losses == losses
    wanted = {DATA, TEACHER, FORWARD, BACKWARD, OPTIMISER, "weight average", REST}
    wanted |= {loss_part(name, backward) for name in losses for backward in (False, True)}
    assert wanted <= set(names)
    assert ALL_REDUCE not in names
    assert names[-1] == REST
    assert all(part.ms > 0 for part in report.parts if part.name != DATA)
    assert len(report.step.all_ms) == report.step.steps == 6
    assert report.step.images_per_second == pytest.approx(1000 * 16 / report.step.ms)


def test_beside_the_models_stands_what_they_take_alone(report: Report):
    alone = {part.name: part.alone_ms for part in report.parts if part.alone_ms is not None}
    assert list(alone) == [TEACHER, FORWARD, BACKWARD, OPTIMISER]
    ceiling = report.ceiling
    assert sum(alone.values()) == pytest.approx(ceiling.models_ms)
    assert min(ceiling.ratios) <= ceiling.ratio <= max(ceiling.ratios)
    assert len(ceiling.ratios) == 3
    assert ceiling.loader_images_per_second > 0
    assert ceiling.teraflops > 0
    assert (ceiling.host_to_device_gigabytes_per_second, ceiling.network_bytes_per_second) == (None, None)
    flops = ceiling.gigaflops_per_image
    # the first layer's input takes no gradient, so the backward is a little less than two forwards
    assert 1.8 < flops[BACKWARD] / flops[FORWARD] <= 2
    assert flops[TEACHER] > flops[FORWARD]


def test_memory_is_counted_by_owner_in_exact_bytes(report: Report):
    owners = report.memory.owners
    student = timm.create_model("cifar_resnet8", num_classes=10)
    trained = sum(p.nbytes for p in student.parameters())
    assert owners["weight average"] == trained + sum(b.nbytes for b in student.buffers())
    assert trained < owners["gradients"] < trained + owners["losses' weights"]  # BatchNorm's statistics take no gradient
    assert owners["gradients"] == owners["optimiser state"] == report.traffic.gradient_bytes  # SGD's momentum
    assert report.memory.owner == f"saved by {FORWARD}"
    # 8 images of a micro-batch; of each about ten maps of 16 x 32 x 32 numbers, once and not once per micro-batch
    assert 8 < owners[f"saved by {FORWARD}"] / (8 * 4 * 16 * 32 * 32) < 16
    assert report.memory.peak > sum(owners.values())
    assert report.memory.peak_part in {part.name for part in report.parts}


def test_gradients_are_noted_as_they_come(report: Report):
    arrivals = report.traffic.arrivals
    assert sum(size for _, size in arrivals) == report.traffic.gradient_bytes
    assert all(before[0] <= after[0] for before, after in pairwise(arrivals))
    assert 0 < arrivals[0][0] < arrivals[-1][0] <= 1
    # 8 images of a micro-batch x 5 regions; cifar_resnet14's stages have 64, 32 and 16 channels
    assert report.traffic.gathers == {"msdcrd": [(40, 64, False), (40, 32, False), (40, 16, False)]}


def test_the_report_survives_json_and_becomes_a_table_and_a_picture(folder: Path, report: Report, tmp_path: Path):
    report.write(tmp_path / "again.json")
    assert Report.read(tmp_path / "again.json") == report
    shown = as_text(report)
    assert all(part.name in shown for part in report.parts)
    assert report.bottleneck in shown
    assert f"{report.warm_up.steps} steps" in shown
    assert "precision no (teacher bf16), channels_last;" in shown
    assert shown in (folder / "ledger.log").read_text()
    with Image.open(folder / "step.png") as picture:
        pixels = picture.convert("RGB")
        assert pixels.width > 600
        assert len(pixels.getcolors(maxcolors=10**6) or []) > len(report.parts)


def test_weights_of_classes_in_another_order_are_matched_by_name_and_said_and_those_of_others_are_refused(
    digits: Path, tmp_path: Path
):
    """As a run of the recipe does: a benchmark of weights that no run would take is a mistake found late."""
    digit_names = [str(number) for number in range(10)]
    for name, classes in (("reversed", digit_names[::-1]), ("others", ["zero", *digit_names[1:]])):
        model = create_model("cifar_resnet8", num_classes=10)
        export_student(model, tmp_path / name, input_spec=input_spec_of(model), class_names=classes)
    brief = ["--steps", "1", "--rounds", "1", "--warm-up", "1", "--student.initial_weights", str(tmp_path / "reversed")]
    job = start_benchmark(arguments(digits, *brief), tmp_path / "log")
    assert job.wait() == [0], job.text()
    different = "class 0 is '9' there, '0' in the data; class 1 is '8' there, '1' in the data; class 2 is '7' there"
    assert f"{tmp_path / 'reversed'}: its classes are those of the data in another order ({different}" in job.text()
    assert "they were matched by their names" in job.text()
    teacher = ["--teacher", "cifar_resnet8", "--teacher-weights", str(tmp_path / "others")]
    job = start_benchmark(arguments(digits, *brief, *teacher), tmp_path / "refused.log")
    assert job.wait() == [2], job.text()
    last = job.text().splitlines()[-1]
    assert last.startswith(
        f"error: {tmp_path / 'others'}: its classes have other names than those of the data: class 0 is 'zero'"
    )


def test_what_is_no_report_is_refused_in_one_line(report: Report, tmp_path: Path):
    with pytest.raises(RecipeError, match="No such file"):
        Report.read(tmp_path / "nothing.json")
    for content in ("{", json.dumps({**asdict(report), "parts": 3}), json.dumps({**asdict(report), "more": 1})):
        (tmp_path / "wrong.json").write_text(content)
        with pytest.raises(RecipeError, match=r"^[^\n]*not a file of pipelines/benchmark.py[^\n]*$"):
            Report.read(tmp_path / "wrong.json")
    (tmp_path / "wrong.json").write_text("{")
    with pytest.raises(RecipeError, match="--json: invalid json"):
        Report.read(tmp_path / "wrong.json")


def test_marks_change_neither_outputs_nor_gradients():
    torch.manual_seed(0)
    layer, line = nn.Linear(3, 3), Timeline(torch.device("cpu"))
    images = torch.randn(2, 3, requires_grad=True)
    plain = layer(images)
    plain.square().sum().backward()
    wanted, images.grad = images.grad, None
    line.begin_step()
    marked = Marked(layer, line, "forward", "backward")(images)
    assert torch.equal(marked, plain)
    line.enter("above")
    marked.square().sum().backward()
    assert wanted is not None
    assert torch.equal(images.grad, wanted)
    line.end()
    (step,) = line.cut()
    assert list(step) == [DATA, "forward", "above", "backward"]


def test_the_time_between_two_marks_is_the_first_ones():
    moments = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0])
    line = Timeline(torch.device("cpu"), clock=lambda: next(moments))
    line.begin_step()
    assert line.enter("a") == DATA
    assert line.enter("b") == "a"
    line.enter("a")
    line.begin_step()
    line.enter("b")
    line.end()
    assert line.cut() == [{DATA: 1000, "a": 6000, "b": 3000}, {DATA: 5000, "b": 6000}]
    assert line.cut() == []


def test_the_middle_half_of_the_steps_is_what_counts():
    steps = [{"a": float(ms), "b": 1.0} for ms in (100, 1, 2, 3, 0, 4, 200, 0)]
    assert middle(steps) == {"a": (1 + 2 + 3 + 4) / 4, "b": 1.0}


def with_parts(report: Report, **more: float) -> list[StepPart]:
    """Models that take 100 ms as they do alone, and more."""
    models = {TEACHER: 20.0, FORWARD: 25.0, BACKWARD: 50.0, OPTIMISER: 5.0}
    total = sum(models.values()) + sum(more.values())
    parts = [StepPart(name, ms, ms / total, ms) for name, ms in models.items()]
    return parts + [StepPart(name.replace("_", " "), ms, ms / total, None) for name, ms in more.items()]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"data_wait": 50.0}, ("loader", "33% of the step", "2.00x short", "--data.num_threads")),
        ({"all-reduce": 30.0}, ("all-reduce", "--train.accumulate 4")),
        ({"loss_msdcrd": 5.0, "loss_msdcrd_backward": 8.0}, ("msdcrd", "13.0 ms", "--loss.msdcrd.stages last")),
        ({"the_rest": 20.0}, ("between the parts", "17%")),
        ({"the_rest": 2.0}, (BACKWARD, "nothing beside the models", "bf16")),
    ],
)
def test_the_bottleneck_is_one_sentence_with_an_option(report: Report, more: dict[str, float], words: tuple[str, ...]):
    # two micro-batches of 8 images in 100 ms are 160 images/s, and the loader alone gives 80
    ceiling = replace(report.ceiling, loader_images_per_second=80.0)
    found = bottleneck(with_parts(report, **more), report.setting, ceiling)
    assert "\n" not in found
    assert [word for word in words if word not in found] == []


def test_where_only_the_models_cost_the_next_unused_option_is_named(report: Report):
    """One after the other, until none is left; the teacher is the largest part."""
    teacher, student = StepPart(TEACHER, 60.0, 0.6, 60.0), StepPart(FORWARD, 40.0, 0.4, 40.0)
    used: dict = {"precision": "no", "compiled": "none", "teacher_precision": "auto", "on_gpu": True}
    train = {**report.setting.recipe["train"], "overlap_teacher": False}
    steps = [
        ("--train.mixed_precision bf16", {"precision": "bf16"}, {}),
        ("--train.compile both", {"compiled": "both"}, {}),
        ("--teacher.precision bf16", {"teacher_precision": "bf16"}, {}),
        ("--train.overlap_teacher true", {}, {"overlap_teacher": True}),
        ("--train.channels_last false may be faster", {}, {}),
    ]
    for option, settings, options in steps:
        setting = replace(report.setting, **used, recipe={**report.setting.recipe, "train": train})
        assert option in bottleneck([teacher, student], setting, report.ceiling)
        used, train = {**used, **settings}, {**train, **options}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--steps", "0"], "--steps: 0"),
        (["--steps", "many"], "'many' is no whole number"),
        (["--data", "disk"], "invalid choice: 'disk'"),
        (["--json", "no/such/folder/file.json"], "no folder"),
        (["--plot", "."], "--plot: . is a folder; give a file in it"),
        (["--clock", "cpu"], "needs --data memory"),
        (["--los.sdd.weight", "1"], "did you mean"),
        (["--teacher", "none"], "needs a teacher"),
        (["--recipe", "nothing.yaml"], "no such file"),
    ],
)
def test_a_wrong_request_gets_its_line_and_exit_code_2(wrong: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert main(wrong) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("error: ")
    assert "Traceback" not in error


def test_a_cache_gains_nothing_where_the_loader_is_what_a_step_waits_for():
    parts = [StepPart(DATA, 118.0, 0.5, None), StepPart(TEACHER, 1.0, 0.0, None), StepPart(REST, 140.0, 0.5, None)]
    found = cache_use(100, parts, [108.0])
    assert found is not None
    assert found.live_ms == 259.0
    parts[0] = StepPart(DATA, 7.0, 0.1, None)
    found = cache_use(100, parts, [108.0])
    assert found is not None
    assert found.live_ms == 148.0 + 107.0 - 7.0

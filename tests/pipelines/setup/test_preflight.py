"""The teacher's preflight: a teacher that is not as good as it is said to be stops the run before its first step."""

from dataclasses import replace
from pathlib import Path

import pytest

from distill.config import RecipeError
from distill.protocols import InputSpec
from distill.recipe import Teacher
from pipelines.setup.preflight import check_teacher, expectation
from tests.processes import finished
from tests.runs import arguments, metrics

IMAGENET = [f"n{number:08d}" for number in range(1000)]
SPEC = InputSpec(224, 224, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bicubic", 0.95)
TABLE = """model,img_size,top1,top1_err,top5,top5_err,param_count,crop_pct,interpolation
resnet34.a1_in1k,288,78.500,21.500,93.000,7.000,21.80,1.000,bicubic
resnet34.a1_in1k,224,76.500,23.500,92.000,8.000,21.80,0.950,bicubic
resnet34.tv_in1k,224,73.500,26.500,91.000,9.000,21.80,0.875,bilinear
"""


def test_a_teacher_worse_than_the_recipe_says_stops_the_run_before_its_first_step(digits: Path, tmp_path: Path):
    out, log = tmp_path / "run", tmp_path / "log"
    asked = ["--teacher.evaluate", "true", "--teacher.expected_top1", "90", "--teacher.tolerance", "20"]
    finished(arguments(digits, out, *asked), log, codes=2)
    [line] = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert "teacher cifar_resnet14: top-1 " in line
    assert "expected 90.00 +- 20.00 (teacher.expected_top1); usual reasons: weights of another tag" in line
    assert not (out / "metrics.jsonl").is_file() or not metrics(out)


def test_published_results_vouch_for_the_same_weights_fed_the_same_way(tmp_path: Path):
    table = tmp_path / "results-imagenet.csv"
    table.write_text(TABLE)
    teacher = Teacher(name="resnet34", published=str(table))  # timm's default weights of it are a1_in1k
    found = expectation(teacher, SPEC, IMAGENET, 50_000)
    assert found == (76.5, 1.0, str(table))
    assert expectation(replace(teacher, name="resnet34.tv_in1k"), SPEC, IMAGENET, 50_000) is None  # other crop and filter
    assert expectation(replace(teacher, weights="runs/x/student"), SPEC, IMAGENET, 50_000) is None
    assert expectation(teacher, SPEC, IMAGENET[::-1], 50_000) is None
    assert expectation(teacher, SPEC, IMAGENET[:10], 50_000) is None
    assert expectation(replace(teacher, expected_top1=70.0), SPEC, IMAGENET, 50_000).top1 == 70

    sampled = expectation(teacher, SPEC, IMAGENET, 500)
    # one standard error of a share of 0.765 over 500 images is 1.896 percent points
    assert sampled.tolerance == pytest.approx(1.0 + 3 * 1.896, abs=0.01)
    assert check_teacher("resnet34", 71.0, sampled) == f"expected 76.50 +- {sampled.tolerance:.2f} ({table})"
    with pytest.raises(RecipeError, match=r"top-1 71\.00 on the validation shards, expected 76\.50 \+- 1\.00"):
        check_teacher("resnet34", 71.0, found)
    assert "compared with nothing" in check_teacher("resnet34", 71.0, None)


def test_a_file_that_is_not_timms_table_is_refused(tmp_path: Path):
    teacher = Teacher(name="resnet34", published=str(tmp_path / "table.csv"))
    with pytest.raises(ValueError, match=r"table\.csv: no such file; give results/results-imagenet\.csv"):
        expectation(teacher, SPEC, IMAGENET, 50_000)
    (tmp_path / "table.csv").write_text("name,accuracy\nresnet34,76\n")
    with pytest.raises(ValueError, match="has not the columns model, top1, img_size, crop_pct, interpolation"):
        expectation(teacher, SPEC, IMAGENET, 50_000)

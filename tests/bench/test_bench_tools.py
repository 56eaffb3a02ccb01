"""The guard of recorded ratios and the comparison with timm: what is called worse, and what the peers are asked to do."""

import json
from pathlib import Path

import pytest

from distill.losses import LOSSES
from pipelines.setup.arguments import parse
from tests.bench import guard as bench_guard
from tests.bench import peer as bench_peer
from tests.bench.guard import RECORDED, STEPS, compare
from tests.bench.losses import LOGIT_LOSSES, MAP_LOSSES
from tests.bench.peer import RECIPE, Seconds, Times, summary

KNOWN = {"a": {"ratio": 1.0, "tolerance": 0.2}, "b": {"ratio": 0.5, "tolerance": 0.2}}


def test_what_stays_worse_than_its_tolerance_is_named(capsys: pytest.CaptureFixture[str]):
    found, bad = compare([lambda: {"a": 1.19, "b": 0.61, "new": 9.0}], KNOWN)
    assert (found, bad) == ({"a": 1.19, "b": 0.61, "new": 9.0}, ["b"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("WORSE") for line in lines] == [False, True, False]
    assert lines[2].endswith("not recorded")


def test_a_measurement_that_was_disturbed_is_made_again():
    disturbed = iter([{"a": 3.0, "b": 0.4}, {"a": 1.1, "b": 3.0}])
    assert compare([lambda: next(disturbed)], KNOWN) == ({"a": 1.1, "b": 0.4}, [])


def test_every_loss_and_every_kind_of_step_has_a_recorded_ratio():
    recorded = json.loads(RECORDED.read_text())["ratios"]
    assert {f"{loss}: time" for loss in (*LOGIT_LOSSES, *MAP_LOSSES)} <= recorded.keys()
    assert {f"step, {name}: over its models" for name in STEPS} <= recorded.keys()
    assert all(entry["ratio"] > 0 and entry["tolerance"] >= bench_guard.LEAST_TOLERANCE for entry in recorded.values())
    assert all(
        min(entry["seen"]) <= entry["ratio"] * 1.001 and entry["ratio"] <= max(entry["seen"]) * 1.001
        for entry in recorded.values()
    )


def test_rates_are_of_whole_runs_and_of_what_the_longer_one_adds():
    mine = Times(Seconds(10.0, 20.0), Seconds(20.0, 50.0), 100, 300)
    other = Times(Seconds(20.0, 20.0), Seconds(60.0, 80.0), 100, 300)
    found = summary([{"ours": mine, "timm": other}])
    assert found["whole, wall"]["ratio"] == pytest.approx(3)
    assert (found["steady, wall"]["ours"], found["steady, wall"]["timm"]) == (20, 5)
    assert found["steady, core"]["ratio"] == pytest.approx(2)


def test_our_side_of_the_comparison_is_a_request_that_stands(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "train.py").touch()
    asked = bench_peer.arguments(["--timm-train", str(tmp_path / "train.py"), "--shards", str(tmp_path)])
    command = bench_peer.ours(asked, tmp_path / "teacher", epochs=3, out=tmp_path / "run")
    recipe = parse(command[2:], LOSSES).recipe
    assert (recipe.teacher.name, recipe.student.name, list(recipe.loss)) == ("resnet18", "resnet10t", ["cross_entropy", "kd"])
    assert (recipe.data.image_size, recipe.train.global_batch_size, recipe.train.epochs) == (64, 64, 3)


@pytest.mark.parametrize(
    ("tool", "wrong", "words"),
    [
        (bench_guard, ["--file", "nothing.json"], "--record makes it"),
        (bench_guard, ["--recrod"], "--recrod: unknown option, did you mean --record?"),
        (bench_guard, ["--only", "dta path"], "--only dta path: nothing has this in its name; there are kd, "),
        (bench_peer, ["--timm-train", "nothing.py", "--shards", "."], "it is train.py of timm's repository"),
        (bench_peer, ["--timm-train", __file__, "--shards", ".", "--short", "3"], "--long 3 must be more than --short 3"),
        (bench_peer, ["--timm-train", __file__, "--shards", "nothing"], "nothing"),
    ],
)
def test_a_wrong_request_gets_one_line_and_exit_code_2(tool, wrong: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert tool.main(wrong) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line

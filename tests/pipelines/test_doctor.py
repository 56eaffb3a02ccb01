"""The examination of a machine: every section is walked, and whatever ends a section is a finding."""

import json
import time
from pathlib import Path

import pytest
import yaml

from pipelines.benchmark import arguments
from pipelines.checks import runs
from pipelines.checks.finding import at_least, at_most, judged
from pipelines.checks.place import Place
from pipelines.checks.sections import SECTIONS
from pipelines.doctor import examined, main


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What the whole examination finds here, with a CPU and a small pair in the GPU's place."""
    folder = tmp_path_factory.mktemp("doctor")
    code = main(
        ["--full", "--pretend", "--minutes", "30", "--out", str(folder / "runs"), "--json", str(folder / "doctor.json")]
    )
    found = json.loads((folder / "doctor.json").read_text())["findings"]
    assert not [each for each in found if each["status"] == "FAIL"]
    assert code == 0
    return found


def test_every_section_is_walked(findings: list[dict]):
    assert list(dict.fromkeys(each["section"] for each in findings)) == list(SECTIONS)
    sections_that_pass = {each["section"] for each in findings if each["status"] == "PASS"}
    assert sections_that_pass == set(SECTIONS)


def test_what_a_cpu_cannot_show_is_said(findings: list[dict]):
    reasons = {each["name"]: each["text"] for each in findings if each["status"] == "SKIP"}
    assert {"decoding on a GPU", "fp16", "SGD, waiting of the host"} <= set(reasons)
    assert all(reasons.values())


def test_a_warning_says_what_to_do(findings: list[dict]):
    assert all(each["remedy"] for each in findings if each["status"] == "WARN")


def test_a_section_that_raises_is_a_finding(tmp_path: Path):
    [found] = examined("storage", SECTIONS["storage"], Place(str(tmp_path), "/proc/nowhere"))
    assert found.status == "FAIL"
    assert "FileNotFoundError" in found.text


def test_a_section_that_does_not_end_is_a_finding(tmp_path: Path):
    [found] = examined("storage", SECTIONS["storage"]._replace(seconds=0.2), Place(str(tmp_path), str(tmp_path)))
    assert found.status == "FAIL"
    assert "not done within 0 s" in found.text


def test_what_there_is_no_time_for_is_said(tmp_path: Path):
    [found] = examined("storage", SECTIONS["storage"], Place(str(tmp_path), str(tmp_path), until=time.monotonic()))
    assert (found.status, found.text) == ("SKIP", "no time was left; --only storage makes it alone")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--pretend"], "error: --pretend: belongs to --full or --only"),
        (["--only", ""], "error: --only: nothing: no such section; there are versions, gpus,"),
        (["--minutes", "0"], "error: --minutes: "),
        (["--json", "."], "error: --json: . is a folder"),
        (["--only", "gpu"], "error: --only: gpu: no such section; there are versions, gpus,"),
        (["--ful"], "error: --ful: unknown option, did you mean --full?"),
        (["--json", "no/folder/x.json"], "error: --json: "),
        (["--shards", "nowhere"], "error: nowhere"),
        (["--shards", "https://host/train"], "error: --shards https://host/train: is a URL"),
    ],
)
def test_a_wrong_request_is_one_line(argv: list[str], line: str, capsys: pytest.CaptureFixture[str]):
    assert main(argv) == 2
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith(line)


LEDGERS = yaml.safe_load((Path(runs.__file__).parent / "ledgers.yaml").read_text())


@pytest.mark.parametrize("setting", LEDGERS, ids=lambda setting: setting["name"])
def test_what_a_gpu_is_asked_to_measure_can_be_asked(setting: dict):
    asked = arguments([*Place("f", "o").options(setting["recipe"]), *setting["options"]])
    assert asked.data in ("memory", "shards")
    assert asked.recipe.teacher.weights == "random"


def test_a_figure_stands_beside_its_limit():
    assert at_least("rate", 9.0, 10.0, "MB/s", "a faster disk").line() == "WARN  rate: 9 MB/s (at least 10); a faster disk"
    assert at_most("loss", 0.5, 0.5, "of x", digits=1).line() == "PASS  loss: 0.5 of x (at most 0.5)"
    assert judged("x", False, "no", "do").line() == "FAIL  x: no; do"

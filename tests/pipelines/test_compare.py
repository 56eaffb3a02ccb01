"""`pipelines/compare.py` on summaries: one table, or one clear line."""

import json
from pathlib import Path

import pytest

from pipelines.compare import main

SUMMARY = {
    "teacher": "none",
    "student": "resnet18",
    "top1": 70.5,
    "best_top1": 71.25,
    "images_per_second": 900.4,
    "seconds": 12.34,
}


def test_finished_runs_are_one_table_and_others_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The summary of another version used to end in a KeyError."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(SUMMARY))
    runs = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert main(runs) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["two", "resnet18", "-", "70.50", "71.25", "900", "12.3"] in rows
    for content in ("{}", "[]", "{", json.dumps({**SUMMARY, "top1": None})):
        (tmp_path / "two" / "summary.json").write_text(content)
        assert main(runs) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {tmp_path / 'two' / 'summary.json'}: no summary of this version")
    assert main([*runs, str(tmp_path / "three")]) == 2
    assert f"no summary.json in {tmp_path / 'three'}" in capsys.readouterr().err

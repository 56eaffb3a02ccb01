"""`pipelines/compare.py` on files that no run of this version wrote: one clear line."""

import json
from pathlib import Path

import pytest

from pipelines.compare import main

SUMMARY = {"top1": 70.5, "best_top1": 71.25, "images_per_second": 900.4, "seconds": 12.34}


@pytest.mark.parametrize("content", ["{}", "[]", "{", json.dumps({**SUMMARY, "top1": None})])
@pytest.mark.parametrize("name", ["manifest.json", "summary.json"])
def test_what_is_no_file_of_this_version_is_refused(
    name: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The summary of another version used to end in a KeyError."""
    (tmp_path / "manifest.json").write_text(json.dumps({"recipe": {"teacher": {"name": "none", "weights": "random"}}}))
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / name).write_text(content)
    assert main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / name}: no file of this version")


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path)]) == 2
    assert "no manifest.json" in capsys.readouterr().err

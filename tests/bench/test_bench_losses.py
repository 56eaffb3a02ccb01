"""The benchmark runs as its help says, and what it measures of memory holds where a promise depends on it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill.losses import LOSSES
from tests.bench.losses import BUILDERS, IS_PLAIN, Case, _in_own_process, cases, main, make, run_once

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def bench(*arguments: str) -> subprocess.CompletedProcess:
    """The real command."""
    command = [sys.executable, "-m", "tests.bench.losses", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path):
    done = bench("--quick", "--loss", "dkd", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    assert [row.split("|")[1].strip() for row in done.stdout.splitlines()] == ["loss", "---", "dkd"]
    figures = json.loads((tmp_path / "figures.json").read_text())
    (case,) = figures["cases"]
    assert case["loss"] == "dkd"
    assert case["time_ratio"] == pytest.approx(case["ours_seconds"] / case["reference_seconds"])
    assert case["ours_seconds"] > 0
    assert case["relative_difference"] < 1e-6
    assert figures["threads"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_said_in_one_line(capsys):
    assert main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err.splitlines() == ["error: --device cuda: PyTorch finds no GPU here; leave it out"]


@pytest.mark.parametrize("loss", list(BUILDERS))
def test_both_versions_of_a_case_compute_the_same(loss: str):
    versions = make(Case(loss, 3, 8), CPU)
    slopes = []
    for version in versions[:2]:
        value = run_once(version, versions.leaf)
        slopes.append((torch.tensor(value), versions.leaf.grad))
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-4, atol=1e-7)


def test_the_cases_are_those_of_the_table():
    sizes = {(case.batch, case.width) for case in cases(quick=False) if case.loss == "msdcrd"}
    assert sizes == {(64, 512), (64, 2048), (256, 512), (256, 2048)}
    assert [case.loss for case in cases(quick=True)] == list(BUILDERS)


def test_every_loss_is_measured_or_is_said_to_be_the_plain_version():
    measured = {name.split()[0].rstrip(",") for name in BUILDERS}
    assert measured.isdisjoint(IS_PLAIN)
    assert measured | set(IS_PLAIN) >= set(LOSSES)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a process's memory")
def test_a_contrast_of_5376_rows_takes_at_most_a_fifth_of_the_full_matrix_version():
    ours, reference = (_in_own_process(Case("contrast", 256, 64), version, 1) for version in ("ours", "reference"))
    assert ours is not None
    assert reference > 5376 * 5376 * 4  # the measurement sees the matrix at least once
    assert 5 * ours <= reference


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a process's memory")
def test_memory_is_what_was_alive_together_whatever_the_process_has_freed_before():
    logits = 64 * 21 * 1000 * 4  # of the student and the teacher; the loss keeps a gradient and hands on another
    assert _in_own_process(Case("sdd over dkd", 64), "ours", 1) == pytest.approx(2 * logits, rel=0.1)


def test_the_documents_name_the_losses_that_are_not_measured():
    """The changelog used to say that every loss is."""
    for sentence in re.findall(r"`make bench-losses` measures[^.]*\.", (ROOT / "CHANGELOG.md").read_text()):
        assert "every loss" not in sentence
    (told,) = re.findall(
        r"^\* (.* \*\*are the plain version\*\*(?:.*\n)(?:  .*\n)*)", (ROOT / "docs/losses.md").read_text(), re.M
    )
    assert set(re.findall(r"`(\w+)`", told)) == set(IS_PLAIN)

"""The command that checks golden cases: every public case passes, and whatever is wrong with one is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden import check
from tests.golden.adapters_a import ADAPTERS

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("part", ["methods/a", "methods/b", "methods/c", "ceiling"])
def test_every_public_case_passes(part):
    results = check.check_folder(FOLDER / part)
    assert all(found.worst.keys() == {torch.float64, torch.float32} for found in results.values())
    assert sum(found.cases for found in results.values()) == len(
        json.loads((FOLDER / part / "index.json").read_text())["cases"]
    )
    problems = [line for method, found in results.items() for line in found.problems]
    assert not problems, "\n".join(problems)


@pytest.fixture
def some_cases(tmp_path: Path) -> Path:
    """A folder with the cases of AT alone."""
    index = json.loads((FOLDER / "methods/a/index.json").read_text())
    index["cases"] = [case for case in index["cases"] if case["method"] == "at"]
    for case in index["cases"]:
        shutil.copy(FOLDER / "methods/a" / case["file"], tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(index))
    return tmp_path


def changed(folder: Path, name: str, change) -> None:
    """Changes one tensor of the case `at/equal` on the disk."""
    tensors = load_file(folder / "at__equal.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "at__equal.safetensors")


def test_the_command_counts_cases_and_gives_the_worst_error(some_cases, capsys):
    assert check.main([str(some_cases)]) == 0
    printed = capsys.readouterr().out
    assert ": 10 cases" in printed
    assert "at              10 cases, worst relative error" in printed
    assert "MISS" not in printed


def test_a_method_that_is_right_in_float64_alone_is_a_miss(some_cases, capsys, monkeypatch):
    def coarse(case):
        size = 1e-4 if case.inputs["student.0"].dtype == torch.float32 else 0.0
        return {name: value * (1 + size) for name, value in ADAPTERS["at"](case).items()}

    monkeypatch.setitem(check.ADAPTERS, "at", coarse)
    assert check.main([str(some_cases)]) == 1
    printed = capsys.readouterr().out
    assert "MISS at/equal: loss: off by" in printed
    assert "10 cases, worst relative error" in printed


@pytest.mark.parametrize("name", ["loss", "loss_rows", "grad.student.0"])
def test_a_stored_number_that_is_off_by_a_millionth_is_a_miss(some_cases, capsys, name):
    changed(some_cases, name, lambda tensor: tensor * (1 + 1e-6))
    assert check.main([str(some_cases)]) == 1
    assert f"MISS at/equal: {name}: off by" in capsys.readouterr().out


def test_a_stored_tensor_that_no_adapter_knows_is_a_miss(some_cases, capsys):
    tensors = load_file(some_cases / "at__equal.safetensors")
    save_file({**tensors, "grad.mystery": torch.ones(2)}, some_cases / "at__equal.safetensors")
    assert check.main([str(some_cases)]) == 1
    assert "grad.mystery is stored, and the adapter neither reads nor computes it" in capsys.readouterr().out


def test_a_case_that_cannot_be_run_is_named_and_the_others_are_run(some_cases, capsys, monkeypatch):
    (some_cases / "at__equal.safetensors").unlink()
    assert check.main([str(some_cases)]) == 1
    printed = capsys.readouterr().out
    assert "MISS at/equal: cannot be run, " in printed
    assert "10 cases, worst" in printed
    monkeypatch.delitem(check.ADAPTERS, "at")
    assert check.main([str(some_cases)]) == 1
    assert "no adapter for method 'at'" in capsys.readouterr().out


def test_a_folder_without_an_index_is_refused(tmp_path, capsys):
    assert check.main([str(tmp_path)]) == 2
    assert "has no index.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ('{"cases": []}', "has no `cases`"),
        ('{"sdd_cases": [{}]}', "has no `cases`"),
        ('{"cases": [{"id": "a", "method": "at"}]}', "case 0 has no hyper"),
        ("{", "is no JSON"),
    ],
)
def test_an_index_of_another_format_or_without_cases_is_refused(index: str, told: str, tmp_path: Path, capsys):
    (tmp_path / "index.json").write_text(index)
    assert check.main([str(tmp_path)]) == 2
    assert f"error: {tmp_path / 'index.json'}: {told}" in capsys.readouterr().err


def test_an_option_that_no_adapter_reads_is_a_miss(some_cases: Path, capsys):
    index = json.loads((some_cases / "index.json").read_text())
    index["cases"][0]["hyper"]["mystery"] = 3
    (some_cases / "index.json").write_text(json.dumps(index))
    assert check.main([str(some_cases)]) == 1
    assert (
        f"MISS {index['cases'][0]['id']}: option mystery is given, and the adapter does not read it" in capsys.readouterr().out
    )


def test_where_the_reference_explodes_or_is_no_number_ours_must_be_ordinary():
    expected = torch.tensor([[1.0, 2.0], [1e11, 3.0], [torch.nan, 4.0]], dtype=torch.float64)
    ordinary = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert check.compare("grad.student", ordinary, expected, 0.0) == (0.0, "")
    assert "explodes" in check.compare("grad.student", expected.nan_to_num(0.0), expected, 0.0)[1]
    assert "not finite" in check.compare("grad.student", expected, expected, 0.0)[1]
    milder = torch.tensor([[1.0, 2.0], [3e6, 3.0]], dtype=torch.float64)
    assert check.compare("grad.student", milder, milder, 0.0) == (0.0, "")
    assert check.compare("grad.student", milder.clamp_max(2.0), milder, 0.0) == (0.0, "")
    assert "off by" in check.compare("grad.student", 2 * milder, milder, 0.0)[1]
    assert "off by" in check.compare("loss_rows", milder.clamp_max(2.0), milder, 0.0)[1]
    ordinary[0, 0] += 1e-6
    assert "off by" in check.compare("grad.student", ordinary, expected, 0.0)[1]


def test_adapters_of_both_families_name_different_methods():
    assert not ADAPTERS.keys() & check.adapters_b.ADAPTERS.keys()

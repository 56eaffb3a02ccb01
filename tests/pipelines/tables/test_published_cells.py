"""Every cell of every table: a recipe that loads, and whose networks and losses can be built."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
import torch

from distill.config import RecipeError, load_recipe
from distill.loss_options import term_schedule
from distill.losses import LOSSES
from distill.models.build import ProbedModel
from distill.models.describe import Uninitialised, create_outline, outlined, probed_with_noise
from distill.protocols import DataFacts
from distill.recipe import Recipe
from distill.yaml12 import parse_yaml
from pipelines.reproduce import COMMAND
from pipelines.setup.models import build_criteria, student_of
from pipelines.tables.cells import PUBLISHED, Cell, cells, doubts, named, rows_of
from pipelines.tables.settings import folder, recipe_of, setting_of, teacher_cell
from pipelines.tables.show import shown

OUT = Path("runs/published")
CLASSES = {"cifar100": 100, "cub200": 200, "imagenet": 1000, "cifar10": 10, "cifar10_240": 10, "digits": 10}


@cache
def distinct() -> dict[str, tuple[Cell, Recipe]]:
    """One cell of each recipe, by its folder, with the recipe."""
    found: dict[str, tuple[Cell, Recipe]] = {}
    for cell in cells():
        if (place := str(folder(cell, OUT))) not in found:
            found[place] = cell, recipe_of(cell, OUT)
    return found


def test_every_row_of_the_csv_files_is_a_cell_of_its_own_name():
    rows = [row for file in ("published.csv", "own.csv") for row in csv.DictReader((PUBLISHED / file).open(newline=""))]
    assert len(cells()) == len(rows)
    assert len({cell.name for cell in cells()}) == len(rows)


@pytest.fixture
def one_thread():
    """Threads of many small operations wait for each other: 31 s of one core become minutes on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_the_networks_and_losses_of_every_cell_can_be_built():
    assert len(distinct()) > 500
    problems, seen = [], set()
    with ExitStack() as stack, Uninitialised():
        built: dict[tuple, ProbedModel] = {}

        def network(name: str, classes: int, frozen: bool, **kwargs: object) -> ProbedModel:
            key = (name, classes, frozen, str(kwargs))
            if key not in built:
                outline = create_outline(name, num_classes=classes, **kwargs)
                built[key] = stack.enter_context(probed_with_noise(outline, name=name, frozen=frozen))
            return built[key]

        for cell, recipe in distinct().values():
            classes = CLASSES[cell.dataset]
            student, teacher = network(recipe.student.name, classes, False, **recipe.student.model_kwargs), None
            if recipe.teacher.name != "none":
                teacher = network(recipe.teacher.name, classes, True)
            # a loss of the same options between the same networks is built once
            keys = {
                name: (name, str(term_schedule(entry)[1]), id(student), id(teacher), recipe.train.global_batch_size)
                for name, entry in recipe.loss.items()
            }
            fresh = {name: entry for name, entry in recipe.loss.items() if keys[name] not in seen}
            seen |= set(keys.values())
            data = DataFacts(classes, torch.arange(classes), recipe.train.global_batch_size)
            try:
                for name, entry in fresh.items():
                    student = student_of(name, term_schedule(entry)[1], student, teacher, outlined)
                build_criteria(dataclasses.replace(recipe, loss=fresh), student, teacher, data)
            except RecipeError as error:
                problems.append(f"{cell.name}: {error}")
    assert not problems, "\n".join(problems)


def test_what_show_prints_of_every_cell_can_be_saved_loads_strictly_and_is_the_recipe_of_its_folder(tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    for number, cell in enumerate(cells()):
        recipe = distinct()[str(folder(cell, OUT))][1]
        assert recipe_of(cell, OUT) == recipe, f"{cell.name}: another recipe than a cell of the same folder"
        for short in (False, True) if number % 40 == 0 else (False,):
            file.write_text(shown(cell, OUT, "reproduce.py", short=short))
            assert load_recipe(file, {}, LOSSES) == recipe, cell.name


RECIPES = [path for path in (PUBLISHED.parent / "recipes").rglob("*.yaml") if path.read_text().startswith("# Cell:")]


def test_the_recipes_of_published_cells_are_what_show_prints():
    assert len(RECIPES) > 50
    for path in RECIPES:
        text = path.read_text()
        (cell,) = named(text.splitlines()[0].removeprefix("# Cell:").strip())
        assert text == shown(cell, OUT, COMMAND, short=True), f"{path}: make it anew with `show {cell.name} --short`"


def test_a_student_of_a_light_kind_gets_the_lower_rate_and_its_teacher_does_not():
    (cell,) = named("sdd/T2/cifar_resnet32x4/cifar_shufflenetv1/kd")
    assert recipe_of(cell, OUT).optim.learning_rate == 0.01
    theirs = teacher_cell(cell)
    assert theirs is not None
    assert recipe_of(theirs, OUT).optim.learning_rate == 0.05
    assert recipe_of(cell, OUT).teacher.weights == str(folder(theirs, OUT) / "seed0" / "student")


def test_a_cell_that_no_released_code_can_have_made_says_why():
    (cell,) = named("sdd/T2/cifar_resnet32x4/cifar_shufflenetv1/wcord")
    assert list(doubts(cell)) == ["not of released code: no code was ever released"]
    assert "no code was ever released" in shown(cell, OUT, "reproduce.py")


def test_sp_compares_the_maps_that_its_released_code_compares():
    """Before the last BatchNorm, or the 1x1 convolution, that some networks end in; elsewhere it is the map of the head."""
    for cell, recipe in distinct().values():
        if "sp" in recipe.loss and not recipe.loss["sp"]["scales"]:
            assert recipe.loss["sp"]["source"] == "blocks", cell.name


def test_a_gradient_is_clipped_where_the_settings_say_that_the_source_clips_it():
    named_rows = 0
    for row in rows_of("settings.csv"):
        if said := re.search(r"gradient norm clipped at (\d+)", row["note"]):
            assert json.loads(row["more"])["train.clip_gradient_norm"] == float(said[1]), row["note"]
            named_rows += 1
    assert named_rows > 50


def test_rsm_has_the_scales_of_its_pair_and_the_pooling_of_its_code():
    for cell, recipe in distinct().values():
        if cell.method.startswith("rsm_"):
            two = cell.student in ("cifar_resnet8x4", "resnet18")
            assert recipe.loss["sdd"]["scales"] == ((1, 2) if two else (1, 2, 4)), cell.name
            assert recipe.loss["sdd"]["pooling"] == "adaptive"


def test_what_no_source_gives_is_named_and_is_a_key_of_the_recipe():
    for cell, recipe in distinct().values():
        for key in setting_of(cell).unknown:
            section, _, rest = key.partition(".")
            assert setting_of(cell).unknown.count(key) == 1, f"{cell.name}: {key} twice"
            assert section in ("train", "optim", "schedule", "loss"), f"{cell.name}: {key}"
            if section == "loss":
                loss, option = rest.split(".")
                assert option in recipe.loss[loss], f"{cell.name}: {key}"


def test_every_protocol_is_a_recipe_whose_header_says_its_source():
    files = sorted((PUBLISHED / "protocols").glob("*.yaml"))
    assert {cell.dataset for cell in cells()} <= {file.stem for file in files}
    for file in files:
        assert "# Source:" in file.read_text()
        assert isinstance(parse_yaml(file.read_text()), dict)

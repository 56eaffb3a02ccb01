"""What can rot in README and docs: lines, links, and the files, names and commands that they mention."""

import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from distill.data.index import ShardIndex
from distill.loss_options import check_loss, loss_options
from distill.losses import LOSSES
from distill.models.build import probe
from distill.protocols import Target

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "pipelines" / "published" / "README.md",
]
TEXTS = [
    *PAGES,
    *(ROOT / name for name in ("Makefile", "CITATION.cff", "accelerate_config.yaml", "pyproject.toml")),
    *sorted((ROOT / "pipelines").rglob("*.yaml")),
]
"""What people read that is no Python."""
COLUMNS = 120
BLOCK = re.compile(r"^```.*?^```$|(?:^ {4}[^\n]*\n)+", re.MULTILINE | re.DOTALL)
"""A block of code: between fences, or indented."""
OURS = ("distill", "pipelines", "shards", "tests", "docs")
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
EACH_LIVING_PAGE = pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=lambda page: page.name)
"""All but the one that names what is gone."""


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return BLOCK.sub("", page.read_text())


def code(page: Path) -> list[str]:
    """Every block of code and every span of it in a sentence."""
    return [*BLOCK.findall(page.read_text()), *re.findall(r"`([^`\n]+)`", prose(page))]


def anchors(page: Path) -> set[str]:
    """What links to a heading of this page say behind `#`."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: str(text.relative_to(ROOT)))
def test_lines_fit_into_a_diff(text: Path):
    assert not [line for line in text.read_text().split("\n") if len(line) > COLUMNS]


@EACH_PAGE
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)|^\[\w+\]: (\S+)$", prose(page), re.MULTILINE):
        target = "".join(target)  # in the sentence, or below it
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(there), f"{target}: no such heading"


@EACH_LIVING_PAGE
def test_paths_of_this_repository_exist(page: Path):
    for word in re.findall(rf"(?<![\w/])(?:{'|'.join(OURS)})/[\w./-]*\w/?", "\n".join(re.findall(r"`([^`\n]+)`", prose(page)))):
        assert (ROOT / word).exists(), f"{word}: no such file"


@EACH_LIVING_PAGE
def test_dotted_names_exist(page: Path):
    for name in re.findall(rf"(?<![\w./])(?:{'|'.join(OURS)})(?:\.[A-Za-z_]\w*)+", "\n".join(code(page))):
        if name.endswith((".py", ".yaml", ".md")):
            continue
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), f"{name}: no such module, class or function"


@EACH_LIVING_PAGE
def test_commands_exist(page: Path):
    makefile = (ROOT / "Makefile").read_text()
    for text in code(page):
        for script in re.findall(rf"\b(?:python|accelerate launch|torchrun)\b[^|;&]*?((?:{'|'.join(OURS)})/[\w/]+\.py)", text):
            assert (ROOT / script).is_file(), f"{script}: no such script"
        for module in re.findall(r"\bpython -m ([\w.]+)", text):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), f"python -m {module}: no such module"
        for target in re.findall(r"(?:^|\n) *make ([a-z-]+)", text):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}: no such target"


def example(page: str) -> str:
    """The first Python example of a page."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)[0]


def test_the_command_that_the_page_adds_works_and_refuses_in_one_line(digits: Path, tmp_path: Path):
    file = tmp_path / "pipelines" / "classes.py"
    file.parent.mkdir()
    file.write_text(example("CONTRIBUTING.md"))

    def run(*argv: str) -> subprocess.CompletedProcess:
        # where the file would lie, it finds the checkout by itself
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, file, *argv], capture_output=True, text=True, env=environment)

    counts = np.bincount(ShardIndex.open(digits / "train").labels)
    assert run(str(digits / "train")).stdout.splitlines() == [f"{name}: {count}" for name, count in enumerate(counts)]
    for argv, said in ((["nowhere"], "error: nowhere"), (["x", "--split"], "error: --split: unknown option")):
        refused = run(*argv)
        assert refused.returncode == 2
        assert refused.stderr.startswith(said)
        assert len(refused.stderr.splitlines()) == 1


def test_every_loss_stands_in_the_tables():
    losses, methods = ((ROOT / "docs" / name).read_text() for name in ("losses.md", "methods.md"))
    assert [name for name, cls in LOSSES.items() if f"`{name}`" not in losses or f"`{cls.__name__}`" not in losses] == []
    assert [name for name in LOSSES if f"`{name}`" not in methods and name != "cross_entropy"] == []
    assert f"takes {len(LOSSES)} names" in losses


def test_the_loss_that_the_page_adds_is_one_that_trains(tmp_path: Path):
    file = tmp_path / "embedding_hint.py"
    file.write_text(example("docs/losses.md"))
    hint = runpy.run_path(str(file))["EmbeddingHint"]
    assert loss_options(hint) == {"bias": (bool, True)}
    check_loss("embedding_hint", hint)
    student = probe(timm.create_model("cifar_resnet8", num_classes=10))
    teacher = probe(timm.create_model("cifar_resnet20", num_classes=10), frozen=True)
    criterion = hint(student.facts, teacher.facts)
    images, target = torch.rand(4, 3, 32, 32), Target(torch.arange(4))
    theirs = teacher.backbone(criterion.teacher_needs)(images)
    loss, _ = criterion(student.backbone(criterion.student_needs)(images), theirs, target)
    loss.backward()
    assert next(student.model.parameters()).grad.abs().max() > 0
    with torch.no_grad():
        criterion.projection.weight.copy_(torch.eye(len(criterion.projection.bias)))
        criterion.projection.bias.zero_()
    assert criterion(theirs, theirs, target)[0].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "strong.md"], ids=lambda page: page.name)
def test_the_papers_number_of_a_recipe_is_the_one_in_its_header(page: Path):
    rows = re.findall(r"^\| `(?:imagenet/)?(\w+)` \|(.*)$", prose(page), re.MULTILINE)
    checked = 0
    for name, row in rows:
        if (file := ROOT / "pipelines" / "recipes" / "imagenet" / f"{name}.yaml").is_file():
            (expected,) = re.findall(r"^# Expected:  top-?1 (\d\d\.\d+|no published)", file.read_text(), re.MULTILINE)
            assert f"| {expected} |" in row or (expected == "no published" and "| none" in row), f"{name}: {expected}"
            checked += 1
    assert checked >= 9

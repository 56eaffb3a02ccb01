"""The import table: who may know whom."""

import ast
from pathlib import Path

import pytest

from distill.losses import LOSSES

ROOT = Path(__file__).parent.parent
LEAVES = {"distill.protocols", "distill.seeds", "distill.files", "distill.precision"}
"""They import nothing of ours."""

ALLOWED: dict[str, set[str]] = {
    **{leaf: set() for leaf in LEAVES},
    "distill.regions": {"distill.protocols", "distill.precision"},
    "distill.recipe": {"distill.protocols", "distill.batch_transform", "distill.data"},
    "distill.config": {"distill.recipe", "distill.data.order"},
    "distill.metrics": LEAVES,
    "distill.optim": LEAVES,
    "distill.batch_transform": LEAVES,
    "distill.agreement": set(),
    "distill.average": set(),
    "distill.nonfinite": {"distill.agreement"},
    "distill.watchdog": set(),
    "distill.evaluation": LEAVES | {"distill.agreement", "distill.metrics", "distill.batch_transform"},
    "distill.checkpoint": {"distill.files"},
    "distill.report": {"distill.files"},
    "distill.distiller": LEAVES | {"distill.optim"},
    "distill.run": LEAVES
    | {
        f"distill.{name}"
        for name in ("agreement", "checkpoint", "distiller", "evaluation", "metrics", "nonfinite", "optim", "report")
    },
    "distill.engine": LEAVES | {f"distill.{name}" for name in ("agreement", "distiller", "evaluation", "nonfinite", "run")},
    "distill.losses": LEAVES | {"distill.regions"},
    "distill.data": LEAVES,
    "distill.models": LEAVES | {"distill.regions"},
    "shards": LEAVES | {"distill.data"},
    "pipelines.setup": {"distill", "shards"},
    "pipelines.measure": {"distill", "pipelines.setup"},
    "pipelines.checks": {"distill", "pipelines.setup"},
    "pipelines": {"distill", "pipelines.setup", "pipelines.measure", "pipelines.checks"},
}
"""Room or module -> what of ours it may import beside its own room. `pipelines` stands for its commands: none of them may
import another."""

NOT_ALLOWED = {"pipelines.measure": {"pipelines.setup.arguments"}}
"""Exceptions: what is measured gets its options as plain values."""

FILES = sorted(p for folder in ("distill", "pipelines", "shards") for p in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES}


def imports(path: Path) -> set[str]:
    """The modules that a file imports; `from package import module` is that module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import; name the module in full"
            modules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES
            found |= modules or {node.module}
    return found


def inside(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def room_of(name: str) -> str | None:
    return next((room for room in sorted(ALLOWED, key=len, reverse=True) if inside(name, room)), None)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_module_imports_only_what_the_table_allows(path: Path):
    name, found = module_name(path), imports(path)
    if path.name != "dali_graph.py" and not inside(name, "pipelines"):
        assert not [i for i in found if inside(i, "nvidia")], "only distill/data/dali_graph.py knows DALI"
    if name in ("distill", "pipelines"):
        assert not found & MODULES, f"{name} is a package without code of its own"
        return
    room = room_of(name)
    assert room is not None, f"{name} is in no room of the table"
    own = name if room == "pipelines" else room  # a command is a room of its own
    for other in (i for i in found if i.split(".")[0] in ("distill", "pipelines", "shards")):
        allowed = inside(other, own) or any(inside(other, a) for a in ALLOWED[room])
        refused = any(inside(other, a) for a in NOT_ALLOWED.get(room, ()))
        assert allowed, f"{name} must not import {other}"
        assert not refused, f"{name} must not import {other}"


def test_no_file_outside_the_losses_knows_one_by_name():
    """A new loss is one file and one line of the table. The default recipe trains with cross-entropy and says so."""
    known = []
    for path in FILES:
        name = module_name(path)
        if inside(name, "distill.losses") or name == "distill.recipe":
            continue
        known += [f"{name} imports {i}" for i in imports(path) if i.startswith("distill.losses.")]
        constants = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        known += [f"{name}:{node.lineno} names {node.value}" for node in constants if node.value in list(LOSSES)]
    assert not known


def test_functions_of_the_library_fit_on_a_screen():
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not long

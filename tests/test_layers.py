"""The import table: who may know whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = {"distill.protocols"}
ALLOWED = {
    "distill.protocols": set(),
    "distill.recipe": set(),
    "distill.config": {"distill.recipe"},
    "distill.metrics": LEAVES,
    "distill.optim": LEAVES,
    "distill.mixing": LEAVES,
    "distill.control": set(),
    "distill.guard": set(),
    "distill.watchdog": set(),
    "distill.evaluation": LEAVES | {"distill.control", "distill.metrics", "distill.mixing"},
    "distill.checkpoint": set(),
    "distill.report": {"distill.checkpoint"},
    "distill.distiller": LEAVES | {"distill.optim"},
    "distill.engine": LEAVES
    | {
        f"distill.{name}"
        for name in ("checkpoint", "control", "distiller", "evaluation", "guard", "metrics", "optim", "report")
    },
    "distill.losses": LEAVES,
    "distill.data": LEAVES,
    "distill.models": LEAVES,
}
"""Room or module -> what of ours it may import beside its own room."""

FILES = sorted(p for folder in ("distill", "pipelines", "shards") for p in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import; name the module in full"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def inside(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_module_imports_only_what_the_table_allows(path: Path):
    name, found = module_name(path), imports(path)
    if not inside(name, "pipelines"):
        assert not [i for i in found if inside(i, "pipelines")], "nothing but pipelines knows pipelines"
    if path.name != "dali_graph.py":
        assert not [i for i in found if inside(i, "nvidia")] or inside(name, "pipelines"), (
            "only distill/data/dali_graph.py knows DALI"
        )
    if inside(name, "shards"):
        ours = {i for i in found if inside(i, "distill")}
        assert all(inside(i, "distill.data") or inside(i, "distill.protocols") or i == "distill" for i in ours), ours
    room = next((r for r in sorted(ALLOWED, key=len, reverse=True) if inside(name, r)), None)
    if not inside(name, "distill") or name == "distill":
        return
    assert room is not None, f"{name} is in no room of the table"
    for other in (i for i in found if inside(i, "distill") and i != "distill"):
        assert inside(other, room) or any(inside(other, a) for a in ALLOWED[room]), f"{name} must not import {other}"


def test_functions_of_the_library_fit_on_a_screen():
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not long

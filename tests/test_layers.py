"""The import table: who may know whom."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distill.losses import LOSSES

ROOT = Path(__file__).parent.parent
LEAVES = {
    f"distill.{name}" for name in ("protocols", "errors", "seeds", "files", "precision", "children", "text_table", "yaml12")
}
"""They import nothing of ours."""

ALLOWED: dict[str, set[str]] = {
    **{leaf: set() for leaf in LEAVES},
    "distill.regions": {"distill.protocols", "distill.precision"},
    "distill.recipe": {"distill.protocols", "distill.batch_transform", "distill.data"},
    "distill.loss_options": {"distill.protocols", "distill.recipe"},
    "distill.command_line": {"distill.children", "distill.errors"},
    "distill.recipe_checks": {"distill.recipe", "distill.loss_options", "distill.data.order"},
    "distill.config": {
        f"distill.{name}" for name in ("recipe", "recipe_checks", "loss_options", "yaml12", "command_line", "errors")
    },
    "distill.metrics": LEAVES,
    "distill.dot": set(),
    "distill.optim": LEAVES | {"distill.dot"},
    "distill.batch_transform": LEAVES,
    "distill.agreement": set(),
    "distill.average": set(),
    "distill.nonfinite": {"distill.agreement"},
    "distill.watchdog": set(),
    "distill.evaluation": LEAVES | {"distill.metrics", "distill.batch_transform"},
    "distill.checkpoint": {"distill.files"},
    "distill.report": {"distill.files"},
    "distill.distiller": LEAVES | {"distill.optim"},
    "distill.run": LEAVES
    | {
        f"distill.{name}"
        for name in ("agreement", "checkpoint", "distiller", "dot", "evaluation", "metrics", "nonfinite", "optim", "report")
    },
    "distill.engine": LEAVES | {f"distill.{name}" for name in ("evaluation", "nonfinite", "run")},
    "distill.losses": LEAVES | {"distill.regions"},
    # a loss that builds its own student knows that model
    "distill.losses.simkd": LEAVES | {"distill.losses", "distill.models.simkd"},
    "distill.data": LEAVES,
    "distill.data.augment": LEAVES,
    "distill.data.remote": LEAVES | {f"distill.data.{name}" for name in ("manifest", "order", "store", "stream", "visits")},
    "distill.models": LEAVES | {"distill.regions"},
    "distill.models.cifar": LEAVES,
    "distill.models.region_logits": LEAVES | {"distill.regions", "distill.models.anatomy", "distill.models.taps"},
    "distill.teacher_cache": LEAVES | {"distill.models"},
    "shards": LEAVES | {"distill.data", "distill.command_line"},
    "pipelines.setup": {"distill", "shards"},
    "pipelines.measure": {"distill", "pipelines.setup"},
    "pipelines.checks": {"distill", "pipelines.setup"},
    "pipelines.tables": {"distill", "pipelines.setup"},
    "pipelines.reporting": {"distill", "pipelines.setup.launcher"},
    "pipelines": {"distill"} | {f"pipelines.{room}" for room in ("setup", "measure", "checks", "tables", "reporting")},
}
"""Room or module -> what of ours it may import beside its own room. `pipelines` stands for its commands: none of them may
import another."""

NOT_ALLOWED = {"pipelines.measure": {"pipelines.setup.arguments"}}
"""Exceptions: what is measured gets its options as plain values."""

FILES = sorted(p for folder in ("distill", "pipelines", "shards") for p in (ROOT / folder).rglob("*.py"))
OURS = ("distill", "pipelines", "shards", "tests")

OTHER_MEANINGS = {"at", "dist", "cross_entropy"}
"""Names of losses that are also an English word, torch.distributed, or a function of torch: such a name counts only where it is
the whole string."""
CLASSES = re.compile(rf"(?<![A-Z])(?:{'|'.join(cls.__name__ for cls in LOSSES.values())})(?=$|[A-Z][a-z])")
"""A loss's class, alone or as a part of a longer name."""
MAY_NAME_A_LOSS = {"distill.recipe", "distill.models", "distill.models.simkd", "pipelines.setup.timm_args"}
"""The default recipe, the student that a loss builds, the package that registers it with timm, and the translation of timm's
losses; beside the losses."""


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
    # also by importlib, as text
    strings = {str(node.value) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    nvidia = {i for i in found if inside(i, "nvidia")} | {text for text in strings if re.fullmatch(r"nvidia(\.\w+)+", text)}
    assert not nvidia or name == "distill.data.dali_graph", "only distill/data/dali_graph.py knows DALI"
    if name in ("distill", "pipelines"):
        assert not found & MODULES, f"{name} is a package without code of its own"
        return
    room = room_of(name)
    assert room is not None, f"{name} is in no room of the table"
    own = name if room == "pipelines" else room  # a command is a room of its own
    for other in (i for i in found if i.split(".")[0] in OURS):
        allowed = inside(other, own) or any(inside(other, a) for a in ALLOWED[room])
        refused = any(inside(other, a) for a in NOT_ALLOWED.get(room, ()))
        assert allowed, f"{name} must not import {other}"
        assert not refused, f"{name} must not import {other}"


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_the_table_allows_nothing_that_nobody_needs(room: str):
    found = set().union(*(imports(path) for path in FILES if room_of(module_name(path)) == room))
    assert not [other for other in ALLOWED[room] - LEAVES if not any(inside(name, other) for name in found)]


def explanations(tree: ast.AST) -> set[ast.AST]:
    """Docstrings, also those of attributes, and the examples of a command's help: they may name a loss."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            found.add(node.value)
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "EPILOG":
            found |= set(ast.walk(node.value))
    return found


def identifiers(node: ast.AST) -> list[str]:
    """The names that a node of the syntax tree holds."""
    found = (getattr(node, field, None) for field in ("id", "attr", "name", "asname", "arg", "module"))
    return [name for name in found if isinstance(name, str)]


def losses_named(source: str) -> list[str]:
    """Losses that a file knows by name: in an import, a string or an identifier."""
    tree, found = ast.parse(source), []
    explained = explanations(tree)
    for node in ast.walk(tree):
        words = {word for name in identifiers(node) for word in (name.lower(), *re.split(r"[_.]", name.lower()))}
        classes = {match for name in identifiers(node) for match in CLASSES.findall(name)}
        strings = set()
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in explained:
            text = "" if node.value.endswith(".yaml") else node.value.lower()  # a recipe is named after its losses
            words |= set(re.findall(r"\w+", text)) | set(re.findall(r"[^\W_]+", text))
            strings = {node.value} & set(LOSSES)
        known = (words & set(LOSSES) - OTHER_MEANINGS) | classes | strings
        found += [f"{getattr(node, 'lineno', 0)}: {name}" for name in known]
    return found


def test_no_file_outside_the_losses_knows_one_by_name():
    """A new loss is one file and one line of the table. The default recipe trains with cross-entropy and says so."""
    names = {path: module_name(path) for path in FILES}
    others = [path for path, name in names.items() if not inside(name, "distill.losses") and name not in MAY_NAME_A_LOSS]
    assert not [f"{names[path]}:{found}" for path in others for found in losses_named(path.read_text())]


@pytest.mark.parametrize(
    "source",
    [
        "from distill.losses import RKD",
        "from distill.losses.rkd import rkd_distance_loss",
        "from distill import losses\nlosses.RKD()",
        "from distill.models.simkd import build_simkd_student",
        "def build_simkd_student(): ...",
        "made: SimKDStudent",
        "raise ValueError(f'take another loss, such as {x} or sp')",
        "if name == 'at': ...",
        "options.update(kd=1)",
        "name = 'loss_sdd'",
    ],
)
def test_a_loss_that_is_known_by_name_is_seen(source: str):
    assert losses_named(source)


@pytest.mark.parametrize(
    "source",
    [
        '"""Explains SDD and msdcrd."""\nx: int\n"""The teacher of simkd."""',
        "from torch import distributed as dist\ndist.barrier()",
        "from torch.nn import functional as F\nF.cross_entropy(x, y)",
        "raise ValueError('give at least one')",
        "EPILOG = '--loss.sdd.scales [1]' + more",
        "FORMAT, DATA, SPLIT_WORDS = 1, 2, 3",
        "class Distiller: ...",
        "PAIR = 'imagenet/resnet34_resnet18_sdd_dkd.yaml'",
    ],
)
def test_what_only_looks_like_the_name_of_a_loss_is_none(source: str):
    assert not losses_named(source)


def test_functions_of_the_library_fit_on_a_screen():
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not long


def test_preparing_data_starts_without_torch():
    """Torch takes seconds to import, for each command and each worker."""
    code = "import sys, shards.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

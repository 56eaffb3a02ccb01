"""What `pip install .` gives: the library alone, with few requirements, usable in somebody's own training loop."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import distill

ROOT = Path(__file__).parent.parent
UV = Path(sys.executable).with_name("uv")

IMPORT_ALL = """
import importlib, pkgutil
import distill.losses, distill.models, distill.protocols, distill.regions
for room in (distill.losses, distill.models):
    for module in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
        if module.name != "distill.models.onnx_file":  # the one that needs the extra `train`
            importlib.import_module(module.name)
print(distill.__version__, distill.__file__)
"""

INSTALLED = """
from importlib.metadata import distributions
print(*sorted({distribution.name.lower() for distribution in distributions()}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of a copy: building leaves files of its own beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("distill", "pipelines", "shards", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(source), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = source.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def fresh_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that holds the wheel, what the wheel itself asks for, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", *(["--without-pip"] if UV.exists() else []), str(folder)], check=True)
    wanted = ["--constraint", str(ROOT / "requirements.lock"), str(wheel)]
    if UV.exists():  # what `make setup` has installed is in uv's cache: linked from there it takes no second
        install = [str(UV), "pip", "install", "--python", str(python)]
        tries = [[*install, "--offline", *wanted], [*install, *wanted]]
    else:
        tries = [[str(python), "-m", "pip", "install", *wanted]]
    for command in tries:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return python
    if re.search(r"connect|dns|timed? out|failed to fetch", done.stderr, re.IGNORECASE):
        pytest.skip("no network, and the wheel's requirements are in no cache")
    raise AssertionError(done.stderr)


def run(python: Path, code: str, folder: Path) -> str:
    """What a script prints that runs in the fresh environment, away from the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(python), "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_library_alone_with_its_types_and_its_licence(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    information = f"distill-{distill.__version__}.dist-info/"
    assert {name.split("/")[0] for name in names} == {"distill", information.rstrip("/")}
    assert {"distill/py.typed", f"{information}licenses/LICENSE"} <= set(names)


def test_the_library_needs_nothing_of_what_the_commands_need(fresh_python: Path, tmp_path: Path):
    installed = set(run(fresh_python, INSTALLED, tmp_path).split())
    assert {"distill", "torch", "timm", "safetensors", "numpy"} <= installed
    assert not installed & {"accelerate", "pydantic", "webdataset", "onnx", "onnxruntime", "scikit-learn", "tensorboard"}
    assert not [name for name in installed if "dali" in name]


def test_losses_and_models_are_imported_from_the_wheel(fresh_python: Path, tmp_path: Path):
    version, file = run(fresh_python, IMPORT_ALL, tmp_path).split()
    assert version == distill.__version__
    assert Path(file).is_relative_to(fresh_python.parent.parent)


def test_the_readme_example_trains_with_sdd_and_msdcrd_in_a_loop_of_ones_own(fresh_python: Path, tmp_path: Path):
    section = (ROOT / "README.md").read_text().split("\n## As a library\n")[1].split("\n## ")[0]
    (example,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    checks = """
assert torch.isfinite(loss)
assert all(parameter.grad is not None for parameter in [*student.parameters(), *msdcrd.parameters()])
assert student.model.get_classifier().weight.grad.abs().max() > 0
assert all(parameter.grad is None for parameter in teacher.parameters())
print("trained", type(student.model).__name__)
"""
    assert run(fresh_python, example + checks, tmp_path) == "trained ResNet\n"


def imported() -> set[str]:
    """Top-level packages that the library and the commands import, neither ours nor Python's own."""
    found = set()
    for path in (p for room in ("distill", "pipelines", "shards") for p in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"distill", "pipelines", "shards"}


def test_whatever_is_imported_is_a_declared_requirement():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(w for name, extra in extras.items() if name != "dev" for w in extra)]
    declared = {re.match(r"[\w-]+", requirement)[0].lower().replace("-", "_") for requirement in wanted}
    providers = packages_distributions()
    missing = {name for name in imported() if not declared & {p.lower().replace("-", "_") for p in providers.get(name, [name])}}
    assert not missing

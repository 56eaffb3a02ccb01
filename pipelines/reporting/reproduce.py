"""How to make the run again: one block to copy, and what it was made with."""

from __future__ import annotations

import shlex
from html import escape

import yaml

from pipelines.reporting.page import Panel
from pipelines.reporting.runs import Comparison, RunRecord


def block(run: RunRecord) -> str:
    """Shell commands that check out the commit, write the recipe and start the run."""
    # `auto` is what this launcher said, and another may say otherwise
    train = {**run.recipe["train"], "mixed_precision": run.manifest["mixed_precision"]}
    recipe = yaml.safe_dump({**run.recipe, "out": f"{run.recipe['out']}_again", "train": train}, sort_keys=False).rstrip()
    commit = run.manifest["git_commit"]
    changed = "  # and changes that no commit holds" if commit.endswith("-dirty") else ""
    processes = run.manifest["world_size"]
    # `accelerate launch` starts one process where there is no GPU
    on_cpus = f"ACCELERATE_USE_CPU=true torchrun --standalone --nproc-per-node {processes}"
    launch = on_cpus if run.manifest["distributed"] == "MULTI_CPU" else f"accelerate launch --num_processes {processes}"
    return "\n".join(
        [
            f"git checkout {commit.removesuffix('-dirty')}{changed}",
            "cat > again.yaml <<'RECIPE'",
            recipe,
            "RECIPE",
            shlex.join([*launch.split(), "pipelines/imagenet.py", "--recipe", "again.yaml", *run.imports]),
        ]
    )


def facts(run: RunRecord) -> list[str]:
    """Versions, checksums and the machine."""
    said = run.manifest
    versions = ", ".join(f"{name} {version}" for name, version in said["versions"].items())
    return [
        f"{run.name}: commit {said['git_commit']}, version {said['version']}, seed {run.recipe['seed']}",
        f"{run.name}: {said['world_size']} processes, {said['device']}, precision {said['mixed_precision']}",
        f"{run.name}: checksums of the training shards {str(said.get('train_shards'))[:16]}, of the validation shards"
        f" {str(said.get('val_shards'))[:16]}, of the teacher's weights {said.get('teacher')}",
        f"{run.name}: {versions}",
    ]


def panel(comparison: Comparison) -> Panel:
    """A block for each distilled run."""
    blocks = [
        f"<details><summary>{escape(run.name)}: commands and recipe</summary><pre>{escape(block(run))}</pre></details>"
        for run in comparison.distilled
    ]
    return Panel("Reproduce", "".join(blocks), tuple(line for run in comparison.distilled for line in facts(run)))

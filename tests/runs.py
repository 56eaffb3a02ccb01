"""Small distillations for the tests by real processes, and how two of them are compared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from distill.losses import LOSSES
from distill.recipe import Recipe
from pipelines.setup.arguments import parse


def arguments(digits: Path, out: Path, *more: str) -> list[str]:
    """A small distillation: 6 steps an epoch, a random teacher unless told otherwise."""
    return [
        *("--train", str(digits / "train"), "--val", str(digits / "val"), "--out", str(out), "--data.prepare", "none"),
        *("--train.epochs", "2", "--train.global_batch_size", "24", "--train.evaluate_batch_size", "10"),
        *(
            "--teacher",
            "cifar_resnet14",
            "--teacher-weights",
            "random",
            "--teacher.evaluate",
            "false",
            "--report.log_every",
            "1",
            "--report.page",
            "false",
        ),
        *more,
    ]


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def comparable(out: Path) -> list[dict[str, Any]]:
    """The log without what the clock decides."""
    return [{k: v for k, v in line.items() if "images_per_second" not in k} for line in metrics(out)]


def last_state(out: Path) -> dict[str, torch.Tensor]:
    folder = out / "checkpoints" / (out / "checkpoints" / "LAST").read_text()
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= {f"{path.stem}/{name}": value for name, value in load_file(path).items()}
    state = torch.load(folder / "state.pt", weights_only=True)
    of_optimizer = state["optimizer"]["state"].items()
    tensors |= {f"optimizer/{number}/{name}": value for number, each in of_optimizer for name, value in each.items()}
    return tensors | {f"scaler/{k}": torch.tensor(v) for k, v in (state["scaler"] or {}).items()}


def assert_same_run(a: Path, b: Path) -> None:
    """Bit-identical weights, optimiser state and metrics; every step once."""
    state_a, state_b = last_state(a), last_state(b)
    assert state_a.keys() == state_b.keys()
    assert [name for name in state_a if not torch.equal(state_a[name], state_b[name])] == []
    assert comparable(a) == comparable(b)
    steps = [line["step"] for line in metrics(b) if "loss/total" in line]
    assert steps == list(range(1, len(steps) + 1))


def steps_of(out: Path) -> list[str]:
    return [line for line in (out / "metrics.jsonl").read_text().splitlines() if '"loss/total"' in line]


def recipe_of(digits: Path, out: Path, *more: str) -> Recipe:
    """The recipe of `arguments`, as a run parses it."""
    return parse(arguments(digits, out, *more), LOSSES).recipe


EVERYTHING = [
    *("--ema.enabled", "true", "--train.accumulate", "2", "--augment.mixup", "0.2", "--augment.cutmix", "1.0"),
    *("--augment.rand_augment", "rand-m9-mstd0.5-inc1", "--augment.erasing", "0.3", "--student.drop_rate", "0.1"),
    *("--loss.sdd.rule", "class", "--loss.sdd.base", "kd", "--loss.sdd.alpha", "null", "--loss.sdd.beta", "null"),
    *("--train.mixed_precision", "bf16", "--train.checkpoint_every", "2"),
]
"""EMA, accumulation, RandAugment, Mixup/CutMix, erasing and dropout in play under bf16, a checkpoint every other step."""

FP16 = ["--train.mixed_precision", "fp16"]
"""fp16, with its scaler, which has a state of its own. Needs `fp16_on_cpus`."""


def fp16_on_cpus(setattr: Callable[[type, str, Any], None] = setattr) -> None:
    """Gives Accelerate a scaler on CPUs too, from now on. It makes one for GPUs only, but PyTorch's for CPUs has the same
    arithmetic and state: it is slow, and tests what fp16 does to a run without a GPU."""
    made = Accelerator.__init__

    def make(self: Accelerator, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        if self.mixed_precision == "fp16" and self.device.type == "cpu":
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu")

    setattr(Accelerator, "__init__", make)


DOT = ["--optim.name", "dot", "--optim.options", "{delta: 0.09}"]
"""The optimiser that takes the distillation's gradient apart from the task's."""

ALL_LOSSES = [
    *("--loss.kd.weight", "0.5", "--loss.dkd.weight", "0.5", "--loss.nkd.weight", "0.5", "--loss.msdcrd.gather", "true"),
    *("--augment.color_jitter", "0.4", "--train.checkpoint_every", "2"),
]
"""Every loss of the table beside those of the digits recipe (SDD over DKD, MSDCRD); hard labels, which DKD needs."""

"""What the checks are made with: the device, the shards, a pair of models, and folders to write to."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "pipelines" / "recipes"
DISTINCT, CLASSES = 256, 8
"""Made pictures that differ, and the classes that they are dealt to."""
PAIR = "imagenet/resnet34_resnet18_sdd_dkd.yaml"
"""The recipe of the GPU's checks: the papers' first pair."""
STAND_IN = "digits/distilled.yaml"
"""The recipe of the same checks on a CPU: a pair that makes a step in a second there."""


@dataclass(frozen=True)
class Place:
    """The place of one examination; plain values, for every section gets it in a process of its own."""

    folder: str
    """Folder for what the checks make and write; it is thrown away."""
    out: str
    """Folder on whose disk runs will lie."""
    shards: str = ""
    """Folder of the user's training shards, which are read and decoded; empty: made ones are."""
    pretend: bool = False
    """Whether the sections that need a GPU are walked on a CPU, with a small pair."""
    until: float = math.inf
    """Time of `time.monotonic`, the same for all processes, at which the examination is to be over."""

    @property
    def train(self) -> str:
        """Made training shards, which the checks' own runs read."""
        return str(Path(self.folder) / "made" / "train")

    @property
    def val(self) -> str:
        """Made validation shards."""
        return str(Path(self.folder) / "made" / "val")

    @property
    def read(self) -> str:
        """The shards that are read and decoded."""
        return self.shards or self.train

    @property
    def left(self) -> float:
        """Seconds until the examination is to be over."""
        return self.until - time.monotonic()

    @property
    def device(self) -> torch.device:
        """The device that runs will use; this process's, under a launcher."""
        usable = torch.cuda.is_available() and not self.pretend
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if usable else torch.device("cpu")

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"

    @property
    def batch(self) -> int:
        """Images of a step in the checks that time nothing."""
        return 32 if self.on_gpu else 8

    @property
    def decode(self) -> Path:
        """The file that names the mode of decoding which was proved here: not every run after it needs a proof of its own."""
        return Path(self.folder) / "decode.txt"

    def options(self, recipe: str = "") -> list[str]:
        """Options of `pipelines/imagenet.py` for a run here, by the recipe of this name under `recipes/`, with a random teacher
        that nobody evaluates."""
        return [
            *("--recipe", str(RECIPES / (recipe or (PAIR if self.on_gpu else STAND_IN)))),
            *("--train", self.train, "--val", self.val, "--data.prepare", "none"),
            *("--teacher.weights", "random", "--teacher.evaluate", "false", "--teacher.expected_top1", "null"),
            *("--train.global_batch_size", str(self.batch), "--report.trackers", "[]", "--report.page", "false"),
            *("--data.decode", self.decode.read_text() if self.decode.is_file() else "auto"),
        ]

    def run(self, command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
        """A command of this checkout, run to its end, with what it printed; `environment` is added to this place's."""
        environ = {**self.environment(), **environment}
        return subprocess.run(command, capture_output=True, text=True, env=environ, cwd=ROOT)

    def environment(self) -> dict[str, str]:
        """The environment of commands that are started here, in the checkout's folder."""
        alone = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if not self.on_gpu else {}
        return {**os.environ, "HF_HUB_OFFLINE": "1", **alone}


def make_pictures(count: int, width: int, height: int) -> list[bytes]:
    """JPEG files with halved chroma, as photographs have: pieces of the two photographs that scikit-learn brings."""
    from sklearn.datasets import load_sample_images  # what needs no pictures is examined without it

    photographs = [Image.fromarray(each) for each in load_sample_images().images]
    numbers, pictures = np.random.default_rng(0), []
    for _ in range(count):
        photograph = photographs[numbers.integers(len(photographs))]
        share = numbers.uniform(0.3, 1.0)
        w, h = int(photograph.width * share), int(photograph.height * share)
        left, top = (int(numbers.integers(side + 1)) for side in (photograph.width - w, photograph.height - h))
        piece = photograph.crop((left, top, left + w, top + h)).resize((width, height), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        piece.save(file, "JPEG", quality=92, subsampling="4:2:0")
        pictures.append(file.getvalue())
    return pictures


def make_own_shards(folder: Path, large: bool, copies: int) -> None:
    """Shards `folder/train` and `folder/val` of made pictures, by the preparing command: 256 of 500 x 375 pixels where `large`,
    else 64 of 64 x 48; those of training `copies` times. Raises RuntimeError where they cannot be made."""
    pictures = make_pictures(DISTINCT, 500, 375) if large else make_pictures(64, 64, 48)
    for split, times in (("train", copies), ("val", 1)):
        for copy in range(times):
            for number, picture in enumerate(pictures):
                path = folder / "pictures" / split / f"class{number % CLASSES}" / f"{number:03d}-{copy}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture)
    command = [sys.executable, str(ROOT / "shards" / "prepare.py"), "folder", "--source", str(folder / "pictures")]
    command += ["--out", str(folder), "--shards", "8", "--workers", str(min(8, len(os.sched_getaffinity(0))))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the examination's own shards could not be made: {done.stderr.strip().splitlines()[-1]}")

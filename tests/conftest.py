"""What several tests share: small shards of real scans, made once."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from shards.digits import load_digits_split
from shards.prepare import main as prepare
from tests.runs import fp16_on_cpus

# each of pytest's workers is one core's: threads of several that wait for each other in a busy loop cost five times the work;
# commands that tests start are one core's too
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# a shell's background (`make test &`) ignores Ctrl-C, and nohup the end of a terminal: all commands that tests start would too
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)

TRAIN_IMAGES, VAL_IMAGES = 145, 37
"""Neither divides by what the tests split it into: 6 steps of 24 an epoch, and evaluation shares of unequal size."""


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train` and `val` shards of 32x32 scans in ten classes."""
    folder = tmp_path_factory.mktemp("digits")
    for split, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        scans = load_digits_split(split)
        for number, (image, label) in enumerate(zip(scans.images[:count], scans.labels[:count], strict=True)):
            path = folder / "images" / split / str(label) / f"{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path, quality=95)
    assert prepare(["folder", "--source", str(folder / "images"), "--out", str(folder), "--shards", "2"]) == 0
    return folder


@pytest.fixture
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate on the CPU, fp16 included, which forgets afterwards what it keeps for the whole process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    fp16_on_cpus(monkeypatch.setattr)
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.fixture
def accelerator(fresh_accelerate: None) -> Accelerator:
    """A plain one, of one process."""
    return Accelerator()

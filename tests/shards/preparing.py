"""What the tests of preparation share: the command itself, images, and hashes of what came out."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.prepare import main

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: object, cwd: Path = ROOT, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`python shards/prepare.py ARGUMENTS`."""
    line = [sys.executable, str(ROOT / "shards/prepare.py"), *(str(argument) for argument in arguments)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if check:
        assert done.returncode == 0, done.stderr
    return done


def answer(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code of `prepare.py ARGUMENTS` in this process, and what it says: its errors, or its output."""
    code = main(arguments)
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith(("error", "  "))]
    return code, "\n".join(errors) or said.out


def image_bytes(seed: int, size: tuple[int, int] = (40, 30), kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def file_hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }

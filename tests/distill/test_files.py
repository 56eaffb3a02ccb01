"""Files are whole or absent, and a folder has one holder."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distill.files import locked, write_atomically, written_aside

ROOT = Path(__file__).resolve().parents[2]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("content", ["größer", b"\x00\xff"])
def test_text_and_bytes_are_written_as_they_are(content, tmp_path):
    for _ in range(2):
        write_atomically(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(tmp_path) == {"file"}


def test_what_fails_half_way_leaves_the_old_content_and_nothing_else(tmp_path):
    write_atomically(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError), written_aside(tmp_path / "file") as aside:
        aside.write_text("\ud800")
    assert names(tmp_path) == {"file"}
    assert (tmp_path / "file").read_text() == "old"


def test_what_a_kill_leaves_is_overwritten_by_the_next_write(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from distill.files import written_aside\n"
        "with written_aside(Path(sys.argv[1])) as aside:\n"
        "    aside.write_text('ne'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path) - {"file"}) == 1
    write_atomically(tmp_path / "file", "new")
    assert names(tmp_path) == {"file"}


def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path):
    script = (
        "import sys; from pathlib import Path; from distill.files import locked\n"
        "lock = locked(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()\n"
    )
    line = [sys.executable, "-c", script, str(tmp_path / "new")]
    with subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError):
            locked(tmp_path / "new")
        holder.kill()
        with locked(tmp_path / "new", wait_seconds=30), pytest.raises(BlockingIOError):
            locked(tmp_path / "new")
    locked(tmp_path / "new").close()

"""Files that commands are asked to write."""

import argparse
import os
from pathlib import Path

import pytest

from distill.command_line import new_file
from distill.files import write_atomically


def test_a_file_that_is_a_link_is_written_where_it_points(tmp_path: Path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomically(new_file(str(tmp_path / "link")), "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_a_device_and_a_pipe_are_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/null", str(tmp_path / "pipe")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{path} is a device or a pipe; give a file"):
            new_file(path)

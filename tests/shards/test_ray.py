"""Shards made on Ray are the same as those made here; skipped where Ray is not installed."""

from __future__ import annotations

import pytest

from tests.shards.preparing import command, file_hashes, image_bytes

pytest.importorskip("ray", reason="Ray is not installed")


def test_shards_made_on_ray_are_byte_identical(tmp_path):
    images = tmp_path / "images" / "a"
    images.mkdir(parents=True)
    for number in range(40):
        (images / f"{number:03d}.jpg").write_bytes(image_bytes(number))
    arguments = ("folder", "--source", tmp_path / "images", "--shards", "4")
    command(*arguments, "--out", tmp_path / "local" / "out")
    command(*arguments, "--out", tmp_path / "ray" / "out", "--engine", "ray")
    assert file_hashes(tmp_path / "ray" / "out") == file_hashes(tmp_path / "local" / "out")

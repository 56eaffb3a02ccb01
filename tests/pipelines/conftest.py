"""What several tests of the commands read."""

from pathlib import Path

import pytest

from shards.prepare import main as prepare


@pytest.fixture(scope="module")
def many_shards(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits in 12 shards, of which a lane of 4 has three."""
    folder = tmp_path_factory.mktemp("shards")
    assert prepare(["folder", "--source", str(digits / "images"), "--out", str(folder), "--shards", "12"]) == 0
    return folder

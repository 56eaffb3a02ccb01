"""A checkpoint is whole or absent."""

import json
from pathlib import Path

import pytest
import torch

from distill.checkpoint import CheckpointError, Checkpoints, Snapshot, read


def snapshot(value: float) -> Snapshot:
    weights = {"student": {"w": torch.full((4, 4), value).to(memory_format=torch.contiguous_format)}, "criteria": {}}
    state = {
        "optimizer": {"state": {0: {"momentum_buffer": torch.tensor([value])}}, "param_groups": [{"lr": 0.1}]},
        "scaler": None,
    }
    return Snapshot(weights, state, {"step": int(value)})


def saved(folder: Path, *steps: int, keep: int = 9) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, snapshot(step))
    checkpoints.wait()
    return checkpoints


def test_what_is_read_is_what_was_saved(tmp_path: Path):
    found = saved(tmp_path, 3).newest()
    assert found is not None
    assert found.meta == {"step": 3}
    assert torch.equal(found.weights["student"]["w"], torch.full((4, 4), 3.0))
    assert found.state["optimizer"]["state"][0]["momentum_buffer"].item() == 3.0
    assert (tmp_path / "LAST").read_text() == "step-00000003"


def test_a_tensor_changed_after_save_does_not_change_the_checkpoint(tmp_path: Path):
    """The writer works in a thread; it must hold its own copy."""
    checkpoints, weights = Checkpoints(tmp_path, 2), torch.zeros(1000, 1000)
    checkpoints.save(1, Snapshot({"student": {"w": weights}}, {}, {"step": 1}))
    weights.fill_(7)
    found = checkpoints.newest() if checkpoints.wait() is None else None
    assert found is not None
    assert found.weights["student"]["w"].max() == 0


def test_the_newest_k_and_the_best_are_kept(tmp_path: Path):
    checkpoints = saved(tmp_path, 1, 2, keep=2)
    checkpoints.mark_best(1)
    for step in (3, 4, 5):
        checkpoints.save(step, snapshot(step))
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000001", "step-00000004", "step-00000005"]
    assert (tmp_path / "BEST").read_text() == "step-00000001"


@pytest.mark.parametrize("name", ["student.safetensors", "state.pt", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
):
    checkpoints = saved(tmp_path, 1, 2)
    path = tmp_path / "step-00000002" / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(content[:-5] if damage == "cut" else content)
    if damage == "remove":
        path.unlink()
    found = checkpoints.newest()
    assert found is not None
    assert found.meta["step"] == 1
    assert "trying the one before" in caplog.text


def test_nothing_readable_is_an_error_and_nothing_at_all_is_none(tmp_path: Path):
    assert Checkpoints(tmp_path, 2).newest() is None
    checkpoints = saved(tmp_path, 1)
    (tmp_path / "step-00000001" / "checkpoint.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of 1 checkpoints can be read"):
        checkpoints.newest()


def test_a_half_written_folder_is_no_checkpoint(tmp_path: Path):
    checkpoints = saved(tmp_path, 1)
    aside = tmp_path / ".writing-step-00000002"
    aside.mkdir()
    (aside / "student.safetensors").write_bytes(b"half")
    found = checkpoints.newest()
    assert found is not None
    assert found.meta["step"] == 1
    checkpoints.save(2, snapshot(2))
    checkpoints.wait()
    assert read(tmp_path / "step-00000002").meta["step"] == 2
    assert not aside.exists()


def test_a_failed_write_is_an_error_and_leaves_the_earlier_one(tmp_path: Path):
    checkpoints = saved(tmp_path, 1)
    (tmp_path / ".writing-step-00000002").write_text("a file in the way")
    checkpoints.save(2, snapshot(2))
    with pytest.raises(CheckpointError, match="the checkpoints before it are intact"):
        checkpoints.wait()
    found = checkpoints.newest()
    assert found is not None
    assert found.meta["step"] == 1


def test_a_pickle_with_code_in_it_is_refused(tmp_path: Path):
    import pickle
    import zlib

    checkpoints = saved(tmp_path, 1)
    folder, marker = tmp_path / "step-00000001", tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    torch.save({"optimizer": Evil()}, folder / "state.pt")
    header = json.loads((folder / "checkpoint.json").read_text())
    content = (folder / "state.pt").read_bytes()
    header["files"]["state.pt"] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    (folder / "checkpoint.json").write_text(json.dumps(header))
    with pytest.raises(pickle.UnpicklingError):
        checkpoints.newest()
    assert not marker.exists()


def test_a_damaged_newest_one_takes_no_place_and_the_new_one_is_never_pruned(tmp_path: Path):
    """The damaged folder used to count among the newest, and the good one just written was deleted for it."""
    saved(tmp_path, 4)
    (tmp_path / "step-00000004").rename(tmp_path / "step-00000009")
    (tmp_path / "step-00000009" / "state.pt").write_bytes(b"damaged")
    saved(tmp_path, 3)
    checkpoints = Checkpoints(tmp_path, 1)
    found = checkpoints.newest()
    assert found is not None
    assert found.meta["step"] == 3
    checkpoints.save(5, snapshot(5))
    checkpoints.close()
    assert (tmp_path / "LAST").read_text() == "step-00000005"
    assert read(tmp_path / "step-00000005").meta["step"] == 5


def test_the_strides_of_optimiser_state_survive(tmp_path: Path):
    """LAMB's norms over a channels_last state summed in another order after a resume: not the same run."""
    state = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, Snapshot({"student": {"w": state}}, {"optimizer": {"m": state}}, {}))
    checkpoints.close()
    found = read(tmp_path / "step-00000001")
    assert found.state["optimizer"]["m"].stride() == state.stride()
    assert torch.equal(found.weights["student"]["w"], state)

"""Checkpoints that are torn, flipped, unfinished or could not be written: said, never used, and nothing else is lost."""

import logging
import shutil
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lab import checkpoint
from lab.checkpoint import Checkpoints, Saved

STATE = {"params": {"w": jnp.arange(12.0).reshape(3, 4)}, "optimizer": (jnp.int32(3), {"m": jnp.ones(5)})}
ABSTRACT = STATE


def saved(run_dir: Path, *steps: int, earlier=()) -> None:
    checkpoints = Checkpoints(run_dir, run_id="r", earlier=earlier)
    for step in steps:
        checkpoints.save(step, {**STATE, "params": {"w": STATE["params"]["w"] + step}}, {"at": step})
    checkpoints.close()


def opened(run_dir: Path, earlier=()) -> tuple[int | None, float | None]:
    """(the step in its note, the first number of its state)."""
    checkpoints = Checkpoints(run_dir, run_id="r", earlier=earlier)
    try:
        if checkpoints.note is None:
            return None, None
        state = checkpoints.latest_state(ABSTRACT)
        assert int(state["optimizer"][0]) == 3
        return checkpoints.note["at"], float(state["params"]["w"][0, 0])
    finally:
        checkpoints.close()


def test_the_newest_comes_back_and_two_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3)
    assert opened(tmp_path) == (3, 3.0)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"2", "3"}
    assert {p.name for p in (tmp_path / "checksums").iterdir()} == {"2.json", "3.json"}


def test_a_reader_moves_nothing(tmp_path):
    """A checkpoint whose sums are not written yet is one that another process is about to finish."""
    saved(tmp_path, 1, 2)
    Saved(2, tmp_path).checksums.unlink()
    before = sorted(tmp_path.rglob("*"))
    checkpoints = Checkpoints(tmp_path, run_id="r", reads_only=True)
    assert checkpoints.latest is not None and checkpoints.latest.step == 1
    checkpoints.close()
    assert sorted(tmp_path.rglob("*")) == before


def files_of(run_dir: Path, step: int) -> list[Path]:
    return sorted(p for p in Saved(step, run_dir).path.rglob("*") if p.is_file())


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "add"])
def test_every_damaged_file_is_noticed(tmp_path, harm, caplog):
    """Each file of a checkpoint in turn; the one before it is used, and what is damaged is set aside, not deleted."""
    saved(tmp_path / "good", 1, 2)
    for number, name in enumerate(p.relative_to(tmp_path / "good") for p in files_of(tmp_path / "good", 2)):
        run_dir = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", run_dir)
        path, content = run_dir / name, (run_dir / name).read_bytes()
        if harm == "flip":
            place = len(content) // 2
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] if content else b"x")
        elif harm == "cut":
            path.write_bytes(content[:-1] if content else b"x")
        elif harm == "remove":
            path.unlink()
        else:
            (path.parent / "strange").write_bytes(b"")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert opened(run_dir) == (1, 1.0)
        assert str(Saved(2, run_dir).path) in caplog.text and "damaged" in caplog.text
        assert (run_dir / "damaged" / "2").is_dir()
        saved(run_dir, 2)  # the step is reached again
        assert opened(run_dir) == (2, 2.0)


def test_without_a_whole_one_the_run_starts(tmp_path, caplog):
    saved(tmp_path, 1)
    (tmp_path / "checksums" / "1.json").write_text('{"schema": 1, "fil')
    assert opened(tmp_path) == (None, None)
    assert "not a whole JSON file" in caplog.text


def test_one_that_was_not_finished_does_not_count(tmp_path, caplog):
    """Killed after Orbax's rename, before the read-back."""
    saved(tmp_path, 1, 2)
    (tmp_path / "checksums" / "2.json").unlink()
    assert opened(tmp_path) == (1, 1.0)
    assert "not finished" in caplog.text


def test_an_earlier_attempts_is_used_and_left_as_it_is(tmp_path):
    saved(tmp_path / "1", 4)
    saved(tmp_path / "2", 2, earlier=[tmp_path / "1"])
    assert opened(tmp_path / "3", [tmp_path / "2", tmp_path / "1"]) == (4, 4.0)
    (damaged,) = [p for p in files_of(tmp_path / "1", 4) if p.name == "_METADATA" or p.name == "_CHECKPOINT_METADATA"][
        :1
    ]
    damaged.write_bytes(b"{}")
    assert opened(tmp_path / "4", [tmp_path / "2", tmp_path / "1"]) == (2, 2.0)
    assert damaged.read_bytes() == b"{}"


def test_another_runs_are_refused(tmp_path):
    saved(tmp_path, 1)
    with pytest.raises(ValueError, match=r"of run r, not of q.*--out"):
        Checkpoints(tmp_path, run_id="q")


def test_what_a_save_fails_with_is_raised_by_the_next_call(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, run_id="r")
    checkpoints.save(1, STATE, {"at": 1})
    checkpoints.wait()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.manager, "save", full)
    checkpoints.save(2, STATE, {"at": 2})
    with pytest.raises(OSError, match="No space left"):
        checkpoints.wait()
    checkpoints.close()
    assert opened(tmp_path) == (1, 0.0)


FULL = "RESOURCE_EXHAUSTED: Error writing \"a/0.0\": No space left on device [os_error_code='28']"


def test_a_full_disk_is_an_error_of_the_file_system(tmp_path, monkeypatch):
    """Where tensorstore says it in a ValueError's message."""
    checkpoints = Checkpoints(tmp_path, run_id="r")

    def full(*_, **__):
        raise ValueError(FULL)

    monkeypatch.setattr(checkpoints.manager, "save", full)
    checkpoints.save(1, STATE, {"at": 1})
    with pytest.raises(OSError, match="No space left") as raised:
        checkpoints.close()
    assert raised.value.errno == 28 and raised.value.filename == str(Saved(1, tmp_path).path)


def test_what_can_not_be_read_back_says_the_same(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, run_id="r")

    def broken(*_, **__):
        raise ValueError("DATA_LOSS: Input/output error [os_error_code='5']")

    monkeypatch.setattr(checkpoints.manager, "restore", broken)
    with pytest.raises(ValueError, match="can not be read") as raised:
        checkpoints.latest_state(ABSTRACT)
    assert isinstance(raised.value.__cause__, OSError) and raised.value.__cause__.errno == 5
    checkpoints.close()


def test_what_reads_back_otherwise_is_no_checkpoint(tmp_path, monkeypatch):
    """And the older ones stay."""
    saved(tmp_path, 1, 2)
    checkpoints = Checkpoints(tmp_path, run_id="r")
    restore = checkpoints._restore
    monkeypatch.setattr(checkpoints, "_restore", lambda *a, **k: {"state": jax_plus_one(restore(*a, **k)["state"])})
    checkpoints.save(3, STATE, {"at": 3})
    with pytest.raises(OSError, match="reads back other than it was written"):
        checkpoints.close()
    monkeypatch.undo()
    assert opened(tmp_path) == (2, 2.0)


def jax_plus_one(state):
    return {**state, "params": {"w": np.asarray(state["params"]["w"]) + 1}}


def test_the_state_is_copied_before_it_is_written_over(tmp_path, monkeypatch):
    """The thread gets what was there at the call."""
    checkpoints = Checkpoints(tmp_path, run_id="r")
    array, note, go, written = np.arange(4.0), {"spent": {"steps": 1}}, threading.Event(), []

    def write_late(step, state, note):
        go.wait(20)
        written.append((state["a"].copy(), note["spent"]["steps"]))

    monkeypatch.setattr(checkpoints, "_write", write_late)
    checkpoints.save(1, {"a": array}, note)
    array += 100
    note["spent"]["steps"] = 2
    go.set()
    checkpoints.close()
    assert np.array_equal(written[0][0], np.arange(4.0)) and written[0][1] == 1


def test_checksums_name_every_file(tmp_path):
    saved(tmp_path, 1)
    noted = checkpoint._checksums(Saved(1, tmp_path).path)
    assert set(noted) == {p.relative_to(Saved(1, tmp_path).path).as_posix() for p in files_of(tmp_path, 1)}

"""Saving and restoring the state of one run, with Orbax.

A checkpoint is the training state (parameters, optimizer) and a small JSON beside it: the run's id, what the ledger had
spent, the execution settings. Orbax writes to a temporary name and renames. Then what was written is read back and compared
with what was to be saved, and the SHA-256 of its files is noted in `checksums/<step>.json`; only now it counts as a checkpoint,
and only now the oldest goes. One that is read again is held against its checksums first: a damaged one is said, set aside and
never used, and the run goes on from the one before it.

On one host all of this is done by a thread while training goes on; what goes wrong there is raised by the next call.
"""

import copy
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from lab import records

logging.getLogger("absl").setLevel(logging.WARNING)
log = logging.getLogger(__name__)
DIRECTORY, CHECKSUMS, DAMAGED = "checkpoints", "checksums", "damaged"
KEEP = 2
OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # in what tensorstore says, whatever the class that it says it with


class Saved(NamedTuple):
    """A checkpoint that is on disk: in which run directory, after how many steps."""

    step: int
    run_dir: Path

    @property
    def path(self) -> Path:
        return self.run_dir / DIRECTORY / str(self.step)

    @property
    def checksums(self) -> Path:
        return self.run_dir / CHECKSUMS / f"{self.step}.json"


class Checkpoints:
    """The checkpoints of one run; `step` is the number of steps taken.

    earlier: directories of attempts before this one, newest first, from which to go on; nothing is written there. reads_only:
    nor here, since another process may be training. Several hosts call every method together.
    """

    def __init__(self, run_dir: Path, *, run_id: str, earlier: Sequence[Path] = (), reads_only: bool = False):
        self.run_id, self.run_dir, self.reads_only = run_id, Path(run_dir).absolute(), reads_only
        self.earlier = [Path(directory).absolute() for directory in earlier]
        self.alone = jax.process_count() == 1
        self.writes = jax.process_index() == 0
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, read_only=reads_only)
        self.manager = ocp.CheckpointManager(self.run_dir / DIRECTORY, options=options)
        self.saved = set(_steps(self.run_dir))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        self.latest = self._newest_whole()
        self.note = self._note()

    # ---- saving -------------------------------------------------------------------------------------------------

    def save(self, step: int, state: Any, note: dict[str, Any]) -> None:
        """Does nothing where this step is there already. Raises what the save before this one failed with."""
        self.wait()
        if step in self.saved:
            return
        self.saved.add(step)
        # Copies, since the next steps change what the caller's note names and write over the arrays that are handed to them.
        note = copy.deepcopy({"run_id": self.run_id, **note})
        if not self.alone:
            self._write(step, state, note)
            return
        self._saving = self._thread.submit(self._write, step, jax.tree.map(np.array, state), note)

    def wait(self) -> None:
        """Until the last save is on disk; raises what it failed with."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def _write(self, step: int, state: Any, note: dict[str, Any]) -> None:
        one = Saved(step, self.run_dir)
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), note=ocp.args.JsonSave(note))
        try:
            self.manager.save(step, args=arguments, force=True)
            self.manager.wait_until_finished()
        except Exception as error:
            raise (file_error(error, one.path) or error) from error
        if self.alone:
            self._compare(one, state)
        if self.writes:
            records.write_json(one.checksums, {"schema": records.SCHEMA, "files": _checksums(one.path)})
            for old in sorted(_steps(self.run_dir))[:-KEEP]:
                _remove(Saved(old, self.run_dir))
        if not self.alone:
            _together(f"saved {step}")
        self.manager.reload()  # it is not to remember what was removed

    def _compare(self, one: Saved, state: Any) -> None:
        """Bit by bit, with what is in memory."""
        there = self._restore(one, state=ocp.args.StandardRestore(state))["state"]
        same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), there, state)
        if not all(jax.tree.leaves(same)):
            raise OSError(f"{one.path}: reads back other than it was written; look at this disk")

    # ---- restoring ----------------------------------------------------------------------------------------------

    def _newest_whole(self) -> Saved | None:
        """Of this directory and the earlier ones; what is damaged is set aside (here) or passed over (there)."""
        found = [Saved(step, place) for place in (self.run_dir, *self.earlier) for step in _steps(place)]
        choice = None
        if self.writes:
            for one in sorted(found, key=lambda one: -one.step):
                if not (why := damage(one)):
                    choice = one
                    break
                log.warning(
                    "%s: a damaged checkpoint (%s) is not used; the one before it is, or the start", one.path, why
                )
                if one.run_dir == self.run_dir and not self.reads_only:
                    self._set_aside(one)
        if not self.alone:
            choice = _agree(choice, (self.run_dir, *self.earlier))
            self.saved = set(_steps(self.run_dir))
            self.manager.reload()
        return choice

    def _set_aside(self, one: Saved) -> None:
        target = self.run_dir / DAMAGED / str(one.step)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        one.path.rename(target)
        one.checksums.unlink(missing_ok=True)
        self.saved.discard(one.step)
        self.manager.reload()

    def _note(self) -> dict[str, Any] | None:
        """The JSON of the newest checkpoint; None where there is none."""
        if self.latest is None:
            return None
        note = self._restore(self.latest, note=ocp.args.JsonRestore())["note"]
        if note.get("run_id") != self.run_id:
            raise ValueError(
                f"{self.latest.path.parent}: checkpoints of run {note.get('run_id')}, not of {self.run_id}; "
                "train it in a directory of its own (--out)"
            )
        return note

    def latest_state(self, abstract: Any) -> Any:
        """The newest state, with the shapes, dtypes and placement of `abstract` (by default: on this process' first device),
        wherever it was when it was saved."""
        assert self.latest is not None
        here = SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here), abstract
        )
        return self._restore(self.latest, state=ocp.args.StandardRestore(abstract))["state"]

    def _restore(self, one: Saved, **arguments: Any) -> Any:
        """Raises ValueError where it can not be read, as one of other shapes or another version."""
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, create=False)
        own = one.run_dir == self.run_dir
        manager = self.manager if own else ocp.CheckpointManager(one.path.parent, options=options)
        try:
            return manager.restore(one.step, args=ocp.args.Composite(**arguments))
        except Exception as error:
            raise ValueError(
                f"{one.path}: this checkpoint can not be read ({type(error).__name__}: {error}); "
                "delete that directory to go on from the one before it, or from the start"
            ) from (file_error(error, one.path) or error)
        finally:
            if not own:
                manager.close()

    def close(self) -> None:
        """Raises what the last save failed with."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self.manager.close()


def file_error(error: BaseException, path: Path) -> OSError | None:
    """What the operating system said (a full disk, say), where tensorstore tells it in a message only; None for all else."""
    said = OS_ERROR.search(str(error))
    return OSError(int(said[1]), os.strerror(int(said[1])), str(path)) if said else None


def damage(one: Saved) -> str:
    """What differs from the checksums; '' where nothing does."""
    try:
        noted = records.read_json(one.checksums)["files"]
    except FileNotFoundError:
        return "it was not finished"
    except ValueError as error:
        return str(error)
    now = _checksums(one.path)
    changed = sorted({name for name in {*noted, *now} if noted.get(name) != now.get(name)})
    return f"{changed[0]} is not what was written" if changed else ""


def _steps(run_dir: Path) -> list[int]:
    """Of all that Orbax finished, damaged or not."""
    try:
        return [int(path.name) for path in (run_dir / DIRECTORY).iterdir() if path.name.isdigit()]
    except FileNotFoundError:
        return []


def _checksums(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below, by its path."""
    sums = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                sums[path.relative_to(directory).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _remove(one: Saved) -> None:
    one.checksums.unlink(missing_ok=True)  # first: half a checkpoint does not count
    shutil.rmtree(one.path, ignore_errors=True)


def _together(what: str) -> None:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(what)


def _agree(choice: Saved | None, places: Sequence[Path]) -> Saved | None:
    """The first host's choice, on every host."""
    from jax.experimental import multihost_utils

    mine = (choice.step, places.index(choice.run_dir)) if choice else (-1, 0)
    seen: Any = multihost_utils.broadcast_one_to_all(np.array(mine))
    step, place = np.asarray(seen).tolist()
    return Saved(step, places[place]) if step >= 0 else None

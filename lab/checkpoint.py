"""Saving and restoring the state of one run, with Orbax.

A checkpoint is the training state (parameters, optimizer) and a small JSON beside it: the run's id, what the ledger had
spent, the execution settings. Orbax writes to a temporary name and renames, so a torn checkpoint is never the latest.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

logging.getLogger("absl").setLevel(logging.WARNING)
DIRECTORY = "checkpoints"
KEEP = 2


class Checkpoints:
    """The checkpoints of one run; `step` is the number of steps taken."""

    def __init__(self, run_dir: Path, *, run_id: str):
        self.run_id = run_id
        self.path = (Path(run_dir) / DIRECTORY).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(self.path, options=options)

    def save(self, step: int, state: Any, note: dict[str, Any]) -> None:
        """Blocks until the checkpoint is on disk; does nothing where this step is there already."""
        if step in self.manager.all_steps():
            return
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), note=ocp.args.JsonSave({"run_id": self.run_id, **note})
        )
        self.manager.save(step, args=arguments, force=True)
        self.manager.wait_until_finished()

    def latest_note(self) -> dict[str, Any] | None:
        step = self.manager.latest_step()
        if step is None:
            return None
        note = self._restore(step, note=ocp.args.JsonRestore())["note"]
        if note.get("run_id") != self.run_id:
            raise ValueError(
                f"{self.path}: checkpoints of run {note.get('run_id')}, not of {self.run_id}; "
                "train it in a directory of its own (--out)"
            )
        return note

    def latest_state(self, abstract: Any) -> Any:
        """The newest state, with the shapes, dtypes and placement of `abstract` (by default: on this process' first device),
        wherever it was when it was saved."""
        step = self.manager.latest_step()
        assert step is not None
        here = SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here), abstract
        )
        return self._restore(step, state=ocp.args.StandardRestore(abstract))["state"]

    def _restore(self, step: int, **arguments: Any) -> Any:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**arguments))
        except Exception as error:
            raise ValueError(
                f"{self.path / str(step)}: this checkpoint can not be read ({type(error).__name__}: {error}); "
                "delete that directory to go on from the one before it, or from the start"
            ) from error

    def close(self) -> None:
        self.manager.close()

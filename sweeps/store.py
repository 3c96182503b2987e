"""A study's directory: what is planned, who is at it, what is done. The directory is the truth, not any process.

A claim is a lock that the kernel holds for a living process (flock on <run>/claim.lock): exclusive, with no moment in which
two workers both have it, and gone the instant its holder dies, however it dies. What the holder writes into the file is
for people. A run is done when its result.json is there, failed when failed.json is.
"""

import contextlib
import fcntl
import os
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lab import records

CLAIM, FAILED = "claim.lock", "failed.json"
OWN = ("runs", "logs", "locks")  # what may be there when the plan is not
State = Literal["waiting", "running", "done", "diverged", "failed"]


@dataclass(frozen=True, kw_only=True)
class Status:
    run_id: str
    state: State
    step: int | None = None
    loss: float | None = None
    share: float = 0.0  # of the run's budget that is spent
    held_by: str = ""


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds an exclusive lock on `path` while the body runs; yields whether it was got (always, if it waits)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        file.seek(0)
        file.truncate()
        file.write(f"{socket.gethostname()} process {os.getpid()}\n")
        file.flush()
        yield True


def is_locked(path: Path) -> bool:
    """Whether some living process holds the lock on `path`."""
    if not path.exists():
        return False
    with path.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class Store:
    """The directory of one study."""

    def __init__(self, root: Path):
        self.root = Path(root)

    # ---- plan ---------------------------------------------------------------------------------------------------

    def write_plan(self, plan: Mapping[str, Any], *, replace: bool = False) -> str:
        """Writes plan.json and says what changed. What is done is kept: a run's id is its content.

        Refuses another study's directory, and, without `replace`, a plan that no longer has runs which were begun.
        """
        for row in plan["runs"]:
            _check_id(row["run_id"])
        if not (self.root / records.PLAN).exists():
            strange = [p.name for p in self.root.glob("*") if p.name not in OWN] if self.root.exists() else []
            if strange:
                raise ValueError(f"{self.root}: no study's directory, it holds {strange[0]}; give a new one (--out)")
            records.write_json(self.root / records.PLAN, plan)
            return f"new plan of {len(plan['runs'])} rows"
        old = records.read_plan(self.root)
        if old["study"]["name"] != plan["study"]["name"]:
            raise ValueError(
                f"{self.root}: holds study {old['study']['name']!r}, not {plan['study']['name']!r}; "
                "two studies can not share a directory: give another --out"
            )
        before, after = ({row["run_id"] for row in p["runs"]} for p in (old, plan))
        begun = sorted(i for i in before - after if records.run_directory(self.root, i).exists())
        difference = f"{len(after - before)} runs added, {len(before - after)} dropped, {len(before & after)} kept"
        if begun and not replace:
            raise ValueError(
                f"{self.root}: the plan changed under its runs: {difference}; {len(begun)} of the dropped ones were begun "
                f"({', '.join(begun[:3])}{', ...' if len(begun) > 3 else ''}). --replace-plan plans anew and keeps their "
                "directories; --out DIR leaves this study as it is"
            )
        if old != plan:
            records.write_json(self.root / records.PLAN, plan)
            for cached in ("plan", "runs"):
                self.__dict__.pop(cached, None)
        return difference

    @cached_property
    def plan(self) -> dict[str, Any]:
        return records.read_plan(self.root)

    @cached_property
    def runs(self) -> dict[str, dict[str, Any]]:
        """One row of the plan for each run, in order."""
        unique: dict[str, dict[str, Any]] = {}
        for row in self.plan["runs"]:
            _check_id(row["run_id"])
            unique.setdefault(row["run_id"], row)
        return unique

    def directory(self, run_id: str) -> Path:
        return records.run_directory(self.root, run_id)

    # ---- claims -------------------------------------------------------------------------------------------------

    def ended(self, run_id: str) -> bool:
        return (self.directory(run_id) / records.RESULT).exists() or (self.directory(run_id) / FAILED).exists()

    @contextlib.contextmanager
    def claim(self, run_id: str) -> Iterator[bool]:
        """Yields True while this process alone holds the run; False if it is held, or has ended."""
        if self.ended(run_id):
            yield False
            return
        with file_lock(self.directory(run_id) / CLAIM, wait=False) as got:
            # It may have ended between the look and the lock.
            yield got and not self.ended(run_id)

    def next_claim(self, preference: Callable[[dict[str, Any]], Any]) -> "Claim | None":
        """Claims the waiting run that `preference` puts first (then the plan's order), or None if all are held or ended."""
        waiting = [row for run_id, row in self.runs.items() if not self.ended(run_id)]
        for row in sorted(waiting, key=preference):
            holder = contextlib.ExitStack()
            if holder.enter_context(self.claim(row["run_id"])):
                return Claim(row=row, holder=holder)
            holder.close()
        return None

    def fail(self, run_id: str, error: BaseException) -> None:
        """Records what a run raised; it is not tried again until `retry`."""
        text = "".join(traceback.format_exception(error))
        before = self.failure(run_id) or {"attempts": 0}
        records.write_json(
            self.directory(run_id) / FAILED,
            {"schema": records.SCHEMA, "error": text, "attempts": before["attempts"] + 1},
        )

    def failure(self, run_id: str) -> dict[str, Any] | None:
        path = self.directory(run_id) / FAILED
        return records.read_json(path) if path.exists() else None

    def retry(self) -> int:
        """Lets every failed run be tried again; returns how many there were."""
        failed = [i for i in self.runs if (self.directory(i) / FAILED).exists()]
        for run_id in failed:
            (self.directory(run_id) / FAILED).unlink()
        return len(failed)

    def compile_lock(self, key: str) -> contextlib.AbstractContextManager[bool]:
        """Held by the worker that compiles a shape, so that the others find it in the cache instead of making it too."""
        return file_lock(self._compile_lock(key), wait=True)

    def is_compiling(self, key: str) -> bool:
        return is_locked(self._compile_lock(key))

    def _compile_lock(self, key: str) -> Path:
        return self.root / "locks" / f"{key}.lock"

    # ---- status -------------------------------------------------------------------------------------------------

    def status(self) -> list[Status]:
        return [self._status(run_id) for run_id in self.runs]

    def _status(self, run_id: str) -> Status:
        directory = self.directory(run_id)
        if not directory.exists():
            return Status(run_id=run_id, state="waiting")
        result = records.read_result(directory)
        if result is not None:
            state: State = "done" if result["status"] == "done" else "diverged"
            return Status(
                run_id=run_id, state=state, step=result["outcome"]["steps"], loss=result["outcome"]["loss"], share=1.0
            )
        if (directory / FAILED).exists():
            return Status(run_id=run_id, state="failed")
        running = is_locked(directory / CLAIM)
        last = next((line for line in reversed(records.read_metrics(directory)) if "loss" in line), {})
        return Status(
            run_id=run_id,
            state="running" if running else "waiting",
            step=last.get("step"),
            loss=last.get("loss"),
            share=last.get("share", 0.0),
            held_by=(directory / CLAIM).read_text().strip() if running else "",
        )


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A run that this process holds until `release`."""

    row: dict[str, Any]
    holder: contextlib.ExitStack

    def release(self) -> None:
        self.holder.close()


def _check_id(run_id: str) -> None:
    """A plan is data: its ids name directories under the study's own and nothing else."""
    if not run_id or run_id.startswith(".") or not all(c.isalnum() or c in "-_." for c in run_id):
        raise ValueError(
            f"run_id = {run_id!r}: letters, digits, '-', '_' and '.' only; this plan was not written by the lab"
        )

"""Studies of small runs, and workers that only pretend to train them."""

import multiprocessing
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from lab import records
from lab.spec import to_json
from runs import make_run
from sweeps.claim import Claim
from sweeps.history import Owner
from sweeps.launch.settings import Settings
from sweeps.store import Store

SPAWN = multiprocessing.get_context("spawn")


def rows(count: int, name: str = "s", batches: tuple[int, ...] = (4,)) -> dict:
    """A plan of `count` small runs that differ in their seed, and in turn in their batch, and so their program."""
    run = make_run()
    runs = [replace(run, seed=replace(run.seed, init=i), batch=batches[i % len(batches)]) for i in range(count)]
    return {"schema": 1, "study": {"name": name},
            "runs": [{"run_id": r.run_id, "arm": "a", "run": to_json(r)} for r in runs]}  # fmt: skip


def result_of(run) -> dict:
    return {"schema": 1, "run_id": run.run_id, "status": "done",
            "outcome": {"steps": 8, "loss": 1.5, "spent": {"exact": 100}}}  # fmt: skip


def finish(runs, claims, superseded, seconds: float = 0.0) -> None:
    """A trainer that takes its time and notes each start."""
    for run, claim in zip(runs, claims, strict=True):
        with (claim.run_dir.parent.parent / "starts").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        records.write_json(claim.run_dir / records.RESULT, result_of(run))


def publish(store: Store, claim: Claim) -> bool:
    """What a worker does once its trainer has returned."""
    records.write_json(claim.run_dir / records.RESULT, result_of(store.begin(claim)))
    return store.publish(claim)


def elsewhere(owner: Owner | None = None) -> Owner:
    return replace(owner or Owner.here(), machine="another boot pid:[1]", host="elsewhere")


def gone() -> Owner:
    """A process of this machine that has ended."""
    process = SPAWN.Process(target=time.sleep, args=(0,))
    process.start()
    assert process.pid is not None
    process.join()
    return replace(Owner.here(), pid=process.pid, started=1)


KILLER = """
import os, signal, sys
from pathlib import Path
from lab import records
from sweeps.launch.worker import work
from sweeps.store import Store

store = Store(Path(sys.argv[1]))
killers = sys.argv[2].split(",")

def train(runs, claims, superseded):
    for run, claim in zip(runs, claims):
        if run.run_id in killers or "all" in killers:
            os.kill(os.getpid(), signal.SIGKILL)
        outcome = {"steps": 8, "loss": 1.5, "spent": {"exact": 100}}
        records.write_json(claim.run_dir / "result.json",
                           {"schema": 1, "run_id": run.run_id, "status": "done", "outcome": outcome})

work(store, train, lambda run: "one", pack_size=lambda run: int(sys.argv[3]))
"""


def workers_die_of(monkeypatch, tmp_path: Path, killers: str, pack: int) -> None:
    """Launchers start workers that are killed by these runs (ids with commas, or "all") and that pretend to train the others."""
    (tmp_path / "killer.py").write_text(KILLER)
    monkeypatch.setattr(Settings, "command", lambda self, study, *, workers, cores=():
                        [sys.executable, str(tmp_path / "killer.py"), str(study), killers, str(pack)])  # fmt: skip

"""Studies of small runs, and workers that only pretend to train them."""

import multiprocessing
import os
import time
from dataclasses import replace

from lab import records
from lab.spec import to_json
from runs import make_run
from sweeps.claim import Claim
from sweeps.history import Owner
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

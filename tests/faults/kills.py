"""Workers of a sweep are killed, and stopped past their lease, at random; the sweep must end as one that nobody disturbed.

    python tests/faults/kills.py --kills 200 --seed 0

Rounds of the same small sweep, each in a new directory, until so many kills have been made. Held against the undisturbed sweep:
every run's `outcome` with the hash of its parameters; that each run ended once, by its last attempt; that the published result
is that attempt's, byte for byte.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from lab import records
from lab.data import describe
from lab.spec import Budget, Evaluation, Objective, Optimizer, to_json
from runs import make_run
from sweeps.launch import local
from sweeps.launch.settings import Settings
from sweeps.store import Store

RUNS = 6
LEASE = 3.0
SETTINGS = Settings(lease=LEASE, checkpoint=0.3)
LIFE_SECONDS = (0.5, 9.0)  # of a worker, before it is killed or stopped: start-up takes about 3
STOPS = 0.2  # share of the faults that stop a worker past its lease instead of killing it


def plan(steps: int) -> dict[str, Any]:
    run = make_run(
        data=describe("markov").data,
        objective=Objective(S=16, T=16),
        optimizer=Optimizer(learning_rate=3e-3),
        budget=Budget(unit="steps", amount=steps),
        batch=16,
        evaluation=Evaluation(examples=128, times=3),
    )
    runs = [replace(run, seed=replace(run.seed, init=i)) for i in range(RUNS)]
    rows = [{"run_id": r.run_id, "arm": "a", "run": to_json(r)} for r in runs]
    return {"schema": records.SCHEMA, "study": {"name": "kills"}, "runs": rows}


def outcomes(store: Store) -> dict[str, Any]:
    results = {run_id: records.read_result(store.directory(run_id)) for run_id in store.runs}
    return {run_id: result and result["outcome"] for run_id, result in results.items()}


class Workers:
    """Two pinned workers, each started again when it is gone."""

    def __init__(self, store: Store, chance: random.Random):
        self.store, self.chance, self.places = store, chance, local.cpu_slots(2)
        self.processes: list[subprocess.Popen[bytes] | None] = [None, None]
        self.fate = [0.0, 0.0]
        self.faults: Counter[str] = Counter()
        (store.root / "logs").mkdir(parents=True, exist_ok=True)

    def tend(self, *, harm: bool) -> None:
        for index, process in enumerate(self.processes):
            if process is None or process.poll() is not None:
                if process is not None and process.returncode not in (0, -signal.SIGKILL):
                    self.faults[f"left with {process.returncode}"] += 1
                self._start(index)
            elif harm and time.monotonic() > self.fate[index]:
                if self.chance.random() < STOPS:
                    self._stop_past_the_lease(process)
                    self.fate[index] = time.monotonic() + self.chance.uniform(*LIFE_SECONDS)
                else:
                    process.kill()
                    process.wait()
                    self.faults["killed"] += 1

    def _start(self, index: int) -> None:
        place = self.places[index]
        command = SETTINGS.command(self.store.root, workers=2, cores=place.cores)
        with local.log_of(self.store.root / "logs", index).open("ab") as log:
            self.processes[index] = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **place.environment, "OMP_NUM_THREADS": "1"}
            )
        self.fate[index] = time.monotonic() + self.chance.uniform(*LIFE_SECONDS)

    def _stop_past_the_lease(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5 * LEASE)  # the other one notices, and takes the run over
        process.send_signal(signal.SIGCONT)
        self.faults["stopped past the lease"] += 1

    def end(self) -> None:
        for process in self.processes:
            if process is not None:
                process.kill()
                process.wait()


def check(store: Store, wanted: dict[str, Any]) -> Counter[str]:
    """Raises AssertionError for anything lost or accepted wrongly; what the histories hold, counted."""
    assert outcomes(store) == wanted, f"{store.root}: outcomes differ from the undisturbed sweep's"
    kinds: Counter[str] = Counter()
    for run_id in store.runs:
        history = store.history(run_id)
        events = [history.read(number) for number in history.numbers()]
        kinds.update(event.kind for event in events)
        assert [event.number for event in events] == list(range(1, len(events) + 1)), run_id
        assert [event.kind for event in events].count("ended") == 1 and events[-1].kind == "ended", run_id
        last = next(event for event in reversed(events) if event.kind == "attempt")
        assert events[-1].content["attempt"] == last.directory, f"{run_id}: ended by a superseded attempt"
        published = (store.directory(run_id) / records.RESULT).read_bytes()
        assert published == (store.directory(run_id) / last.directory / records.RESULT).read_bytes(), run_id
    return kinds


def undisturbed(steps: int, directory: Path) -> Store:
    store = Store(directory)
    store.write_plan(plan(steps))
    local.start(store.root, local.cpu_slots(2), settings=SETTINGS)
    assert {s.state for s in store.status()} == {"done"}
    return store


def main(kills: int, seed: int, steps: int, directory: Path, reference: Store) -> Counter[str]:
    """Counts of faults and of events, over all rounds. reference: the sweep as it ends undisturbed."""
    wanted = outcomes(reference)
    chance, total = random.Random(seed), Counter[str]()
    while total["killed"] + total["stopped past the lease"] < kills:
        store = Store(directory / f"round-{total['rounds']}", lease=LEASE)
        store.write_plan(plan(steps))
        workers, began = Workers(store, chance), time.monotonic()
        try:
            while store.left():
                made = total["killed"] + total["stopped past the lease"] + workers.faults.total()
                workers.tend(harm=made < kills)
                time.sleep(0.1)
                assert time.monotonic() - began < 1800, f"{store.root}: does not end"
        finally:
            workers.end()
        total += workers.faults + check(store, wanted)
        total["rounds"] += 1
        total["runs"] += RUNS
        print(json.dumps(total), flush=True)
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        alone = undisturbed(given.steps, Path(scratch) / "undisturbed")
        main(given.kills, given.seed, given.steps, Path(scratch), alone)

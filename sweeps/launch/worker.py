"""One worker: claims runs of a study and trains them, one after another, in one process with its compiled programs."""

import argparse
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from lab import spec
from lab.spec import Run
from sweeps.store import Store

log = logging.getLogger(__name__)
POLL_SECONDS = 0.5


def work(
    store: Store,
    train_one: Callable[[Run, Path], Any],
    program_key: Callable[[Run], str],
    *,
    poll_seconds: float = POLL_SECONDS,
) -> None:
    """Until every run of the study has ended: claim one, train it, release it.

    Runs whose program this process has come first, runs whose program another worker is compiling come last. A run
    that raises is recorded as failed and the next one is taken; runs that another worker holds are waited for, since
    that worker may die. lab.preemption.Preempted (SIGTERM) passes through, with the run saved.
    """
    mine: set[str] = set()
    keys: dict[str, str] = {}

    def key_of(row: dict[str, Any]) -> str:
        if row["run_id"] not in keys:
            keys[row["run_id"]] = program_key(spec.from_json(row["run"]))
        return keys[row["run_id"]]

    while any(not store.ended(run_id) for run_id in store.runs):
        compiling = cache(store.is_compiling)  # asked once a key and round: many runs share a program

        def preference(row: dict[str, Any], compiling: Callable[[str], bool] = compiling) -> int:
            key = key_of(row)
            return 0 if key in mine else 2 if compiling(key) else 1

        claim = store.next_claim(preference)
        if claim is None:
            time.sleep(poll_seconds)
            continue
        with claim:
            try:
                run = store.begin(claim)
                mine.add(key_of(claim.row))
                train_one(run, claim.directory)
            # Preempted and KeyboardInterrupt are no Exception: they pass, and the claim is released.
            except Exception:
                log.exception("%s failed", claim.run_id)
                store.fail(claim, traceback.format_exc())


def main() -> None:
    parser = argparse.ArgumentParser(description="Works on a study until all of it has ended; started by `lab run`.")
    parser.add_argument("study", type=Path)
    parser.add_argument("--cores", help="processor numbers to stay on, such as 0,1")
    arguments = parser.parse_args()
    if arguments.cores and hasattr(os, "sched_setaffinity"):
        # Before JAX starts: it makes as many threads as it sees cores.
        os.sched_setaffinity(0, {int(core) for core in arguments.cores.split(",")})
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    from lab.program import program_key
    from lab.train import train

    store = Store(arguments.study)
    work(store, lambda run, directory: train(run, directory, compile_lock=store.compile_lock), program_key)


if __name__ == "__main__":
    main()

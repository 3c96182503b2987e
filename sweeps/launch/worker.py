"""One worker: claims runs of a study and trains them, one after another or side by side, in one process with its compiled
programs."""

import argparse
import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from lab import spec
from lab.spec import Run
from sweeps.store import Claim, Store

log = logging.getLogger(__name__)
POLL_SECONDS = 0.5


def work(
    store: Store,
    train_one: Callable[[Run, Path], Any],
    program_key: Callable[[Run], str],
    *,
    train_together: Callable[[list[Run], list[Path]], Any] | None = None,
    pack_size: Callable[[Run], int] = lambda run: 1,
    workers: int = 1,
    poll_seconds: float = POLL_SECONDS,
) -> None:
    """Until every run of the study has ended: claim one, and others of its program up to `pack_size(run)` (but no more
    than this one's share, where several `workers` are at the study); train them, release them.

    Runs whose program this process has come first, runs whose program another worker is compiling come last. A run
    that raises is recorded as failed and the next one is taken; where several trained side by side each is then tried by
    itself. Runs that another worker holds are waited for, since that worker may die. lab.preemption.Preempted (SIGTERM)
    passes through, with the runs saved.
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
        with contextlib.ExitStack() as held:
            begun: list[tuple[Claim, Run]] = []

            def take(claim: Claim, held: contextlib.ExitStack = held, begun: list[Any] = begun) -> None:
                held.enter_context(claim)
                with _failing(store, claim):
                    begun.append((claim, store.begin(claim)))

            take(claim)
            key = key_of(claim.row)
            mine.add(key)
            if begun and train_together is not None and (most := pack_size(begun[0][1])) > 1:
                like = [row for run_id, row in store.runs.items() if not store.ended(run_id) and key_of(row) == key]
                for row in like[: min(most, -(-len(like) // workers))]:
                    if row["run_id"] != claim.run_id and (other := store.claim(row["run_id"])) is not None:
                        take(other)
            if len(begun) > 1 and train_together is not None:
                try:
                    train_together([run for _, run in begun], [one.directory for one, _ in begun])
                    continue
                except Exception:
                    log.exception("%d runs side by side failed; each is tried by itself", len(begun))
            for one, run in begun:
                with _failing(store, one):
                    train_one(run, one.directory)


@contextlib.contextmanager
def _failing(store: Store, claim: Claim) -> Iterator[None]:
    """Records why the run failed. Preempted and KeyboardInterrupt are no Exception: they pass, and the claim is released."""
    try:
        yield
    except Exception:
        log.exception("%s failed", claim.run_id)
        store.fail(claim, traceback.format_exc())


def main() -> None:
    parser = argparse.ArgumentParser(description="Works on a study until all of it has ended; started by `lab run`.")
    parser.add_argument("study", type=Path)
    parser.add_argument("--cores", help="processor numbers to stay on, such as 0,1")
    parser.add_argument("--workers", type=int, default=1, help="how many are at this study")
    parser.add_argument("--pack", type=int, help="runs of one program that train side by side (default: by device)")
    parser.add_argument("--mesh", help="devices along data, fsdp and tensor for each run (default: by the batch)")
    arguments = parser.parse_args()
    if arguments.cores and hasattr(os, "sched_setaffinity"):
        # Before JAX starts: it makes as many threads as it sees cores.
        os.sched_setaffinity(0, {int(core) for core in arguments.cores.split(",")})
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    import jax

    from lab import hardware
    from lab.data.tokenizers import TOKENIZERS
    from lab.mesh import Mesh
    from lab.program import program_key
    from lab.train import train, train_together

    on = Mesh.read(arguments.mesh) if arguments.mesh else None
    kind, limit = jax.default_backend(), hardware.memory_limit()
    store = Store(arguments.study)
    work(
        store,
        lambda run, directory: train(run, directory, on=on, compile_lock=store.compile_lock),
        program_key,
        train_together=lambda runs, directories: train_together(
            runs, directories, on=on, compile_lock=store.compile_lock
        ),
        pack_size=lambda run: (
            arguments.pack or hardware.pack_size(run, TOKENIZERS[run.data.tokenizer].V, kind, limit=limit)
        ),
        workers=arguments.workers,
    )


if __name__ == "__main__":
    main()

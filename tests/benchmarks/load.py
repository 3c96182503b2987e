"""Plans of 1,000 to 100,000 runs: seconds to plan, write, read, claim, summarise; memory of the process that does.

    python tests/benchmarks/load.py [--runs 1000,10000,100000]

Nothing is trained: a claimed run is published with a made-up result, so that its ending is stored as a real one's.
A size is measured in a process of its own. Claims: the median of 200, and of 200 more after nine tenths of the runs ended.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sweeps
from lab import records
from sweeps import Study, arm, corpus, index, queue
from sweeps.ladder import ladder
from sweeps.store import Store

CLAIMS = 200


def study(runs: int) -> Study:
    """4 arms x budgets x 10 rungs x 5 learning rates x 20 seeds."""
    data = corpus("markov", allow_repeat=True)
    budgets = tuple(5e10 * 1.1**i for i in range(max(1, runs // 4000)))
    replicates = 20 if runs >= 4000 else 5
    names = ("decoder_only", "prefix_lm", "merged_cross", "encoder_decoder")
    return Study(name="load", question="?", baseline="decoder_only", budgets=budgets, batch=4, window=10, seeds=replicates,
                 learning_rate=(0.001, 0.002, 0.004, 0.008, 0.016), arms={n: arm(n, data, S=16, T=16) for n in names},
                 sizes=ladder(*range(16, 16 * 11, 16), depth=2, head_width=8))  # fmt: skip


def measure(runs: int, root: Path) -> dict[str, float]:
    found: dict[str, float] = {}

    def timed(name: str, began: float) -> float:
        found[name] = time.perf_counter() - began
        return time.perf_counter()

    made = study(runs)
    at = time.perf_counter()
    plan = sweeps.plan(made)
    at = timed("plan", at)
    found["runs"] = len(plan.unique)
    Store(root).write_plan(plan.to_json())
    at = timed("write", at)
    plan.programs(), plan.seconds(2), plan.memory()
    timed("summary of the plan", at)
    found["MiB of plan.json"] = (root / records.PLAN).stat().st_size / 2**20
    del plan
    at = time.perf_counter()
    store = Store(root)
    waiting = queue.Queue(store)
    at = timed("first look", at)

    def claims() -> float:
        taken = []
        for _ in range(CLAIMS):
            at = time.perf_counter()
            claim = waiting.next(lambda row: 0)
            assert claim
            store.begin(claim)
            taken.append(time.perf_counter() - at)
            claim.release()
        return 1000 * statistics.median(taken)

    found["claim, ms"] = claims()
    at = time.perf_counter()
    store.status()
    timed("status", at)
    # Nine tenths of them have ended: their directories are there, and the index says how.
    ended = list(store.runs)[: int(0.9 * len(store.runs))]
    at = time.perf_counter()
    for run_id in ended:
        history = store.history(run_id)
        if history.last() is None:
            event = history.append(None, "ended", status="done", attempt="attempts/0001-00000000", sha256="")
            store.index.add(index.Ended(run_id=run_id, began=history.began(), event=1, state="done", loss=1.0, exact=1))
            assert event
    found["end a run, ms"] = 1000 * (time.perf_counter() - at) / len(ended)
    store = Store(root)
    at = time.perf_counter()
    store.status()
    at = timed("status, nine tenths ended", at)
    waiting = queue.Queue(store)
    at = timed("first look, nine tenths ended", at)
    found["claim, nine tenths ended, ms"] = claims()
    at = time.perf_counter()
    store.left()
    timed("left", at)
    found["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", default="1000,10000,100000")
    parser.add_argument("--one", type=int)
    arguments = parser.parse_args()
    if arguments.one:
        with tempfile.TemporaryDirectory() as directory:
            print(json.dumps(measure(arguments.one, Path(directory) / "study")))
        return
    columns = []
    for runs in map(int, arguments.runs.split(",")):
        command = [sys.executable, __file__, f"--one={runs}"]
        columns.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    for name in columns[0]:
        print(f"{name:32}", *(f"{column[name]:>12,.3f}" for column in columns))


if __name__ == "__main__":
    main()

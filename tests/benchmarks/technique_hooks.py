"""What the loop's hooks for techniques cost a run that has none: `train` of this checkout beside that of another, in turn.

    git worktree add /tmp/before <commit without the hooks>
    python tests/benchmarks/technique_hooks.py /tmp/before [rounds]

Each round starts a process for either checkout, which trains one small run with a warm cache of compiled programs and prints
seconds a step of its loop alone (evaluation and set-up are not in it). Prints the medians and the median ratio.
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

ROUNDS, STEPS = 7, 1500
HERE = Path(__file__).parents[2]
ONE = f"""
import os, sys, tempfile
from pathlib import Path
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {{max(os.sched_getaffinity(0))}})
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from lab.data import describe
from lab.spec import Budget, Evaluation, Objective
from lab.train import train
from runs import make_run
from sweeps.ladder import shape
run = make_run("decoder_only", shape=shape(32, 2), objective=Objective(S=64, T=64), batch=8, data=describe("markov").data,
               budget=Budget(unit="steps", amount={STEPS}), evaluation=Evaluation(examples=64))
best = 9e9
for _ in range(3):
    with tempfile.TemporaryDirectory() as directory:
        result = train(run, Path(directory), checkpoint_seconds=1e9)
    best = min(best, result["outcome"]["tokens_seen"] / result["measured"]["tokens_per_second"] / {STEPS})
print(best)
"""


def seconds_a_step(checkout: Path) -> float:
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    made = subprocess.run([sys.executable, "-c", ONE, str(checkout)], capture_output=True, text=True, check=True,
                          env=environment, cwd=checkout)  # fmt: skip
    return float(made.stdout)


def main() -> None:
    before, taken, rounds = Path(sys.argv[1]).absolute(), {}, int(sys.argv[2]) if len(sys.argv) > 2 else ROUNDS
    for index in range(rounds):
        for checkout in (before, HERE)[:: 1 if index % 2 else -1]:
            taken.setdefault(checkout, []).append(seconds_a_step(checkout))
    ratio = statistics.median(now / then for now, then in zip(taken[HERE], taken[before], strict=True))
    for name, checkout in (("before", before), ("now", HERE)):
        print(f"{name:6s} {statistics.median(taken[checkout]) * 1e3:.4f} ms a step")
    print(f"ratio {ratio:.4f} (median of {rounds} rounds)")


if __name__ == "__main__":
    main()

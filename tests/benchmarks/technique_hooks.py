"""What the loop's hooks for techniques cost a run that has none: `train` of this checkout beside that of another, in turn.

    git worktree add /tmp/before <commit without the hooks>
    python tests/benchmarks/technique_hooks.py /tmp/before [processes] [turns]

A process of either checkout stays alive with its compiled program, both on one core; they train the same small run by turns of
a few seconds, so that the machine is the same for both. Processes are started several times, since how a process happens to
lie in memory is worth a percent by itself. Prints seconds a step of the loop alone (evaluation and set-up are not in it), each
process's ratio, and their median with the range of medians when processes are drawn again.
"""

import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

PROCESSES, TURNS, STEPS, DRAWS = 6, 12, 500, 2000
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
for _ in sys.stdin:
    with tempfile.TemporaryDirectory() as directory:
        result = train(run, Path(directory), checkpoint_seconds=1e9)
    print(result["outcome"]["tokens_seen"] / result["measured"]["tokens_per_second"] / {STEPS}, flush=True)
"""


def start(checkout: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", ONE, str(checkout)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            text=True, cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)})  # fmt: skip


def turn(process: subprocess.Popen[str]) -> float:
    """Seconds a step."""
    assert process.stdin and process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def compared(before: Path, turns: int) -> tuple[float, float, float]:
    """Medians of a fresh process of either checkout, seconds a step, and the median ratio of their turns."""
    then, now = start(before), start(HERE)
    try:
        for process in (then, now):
            turn(process)  # compiles
        pairs = []
        for index in range(turns):
            order = (then, now) if index % 2 else (now, then)
            taken = {process: turn(process) for process in order}
            pairs.append((taken[then], taken[now]))
    finally:
        for process in (then, now):
            process.kill()
    olds, news = zip(*pairs, strict=True)
    return statistics.median(olds), statistics.median(news), statistics.median(new / old for old, new in pairs)


def main() -> None:
    before = Path(sys.argv[1]).absolute()
    processes, turns = (int(given) for given in (*sys.argv[2:], *(PROCESSES, TURNS)[len(sys.argv) - 2 :]))
    ratios = []
    for _ in range(processes):
        old, new, ratio = compared(before, turns)
        print(f"before {old * 1e3:.4f} now {new * 1e3:.4f} ms a step, ratio {ratio:.4f} ({turns} turns)", flush=True)
        ratios.append(ratio)
    draw = random.Random(0)
    drawn = sorted(statistics.median(draw.choices(ratios, k=processes)) for _ in range(DRAWS))
    low, high = drawn[DRAWS // 40], drawn[-DRAWS // 40]
    print(f"ratio {statistics.median(ratios):.4f} (median of {processes} pairs of processes, {low:.4f} to {high:.4f})")


if __name__ == "__main__":
    main()

"""Whether matched FLOPs are matched time: wall time for an exact FLOP of every step of the ladder, over decoder-only's.

    python tests/benchmarks/ladder_time.py [D ...]

Runs on one core, as a worker does. The structures take turns in one process, ratios are medians over rounds.
"""

import os
import sys
from pathlib import Path

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax

from bare import Bare, side_by_side
from lab import cost, hardware
from lab.compiled import use_compilation_cache
from lab.spec import Objective
from lab.structure import LADDER
from runs import make_run
from sweeps.ladder import shape

V = 260
ROUNDS = 9


def main() -> None:
    use_compilation_cache()
    for D, L, n, batch in ((32, 2, 64, 8), (64, 3, 64, 8), (128, 3, 128, 8), (256, 4, 128, 16)):
        if len(sys.argv) > 1 and str(D) not in sys.argv[1:]:
            continue
        runs = {name: make_run(name, shape=shape(D, L), objective=Objective(S=n, T=n), batch=batch) for name in LADDER}
        programs = {name: Bare(run, hardware.choose(run, V, jax.default_backend())) for name, run in runs.items()}
        found = side_by_side(programs, ROUNDS, base="decoder_only")
        exact = {name: cost.train_step(run, V)["exact"] for name, run in runs.items()}
        dense = {name: cost.train_step(run, V)["dense"] for name, run in runs.items()}
        print(f"D {D}, {L} layers, S = T = {n}, batch {batch}")
        for name, (seconds, ratio) in found.items():
            a_flop = ratio * exact["decoder_only"] / exact[name]
            print(f"  {name:16s} {seconds * 1e3:8.2f} ms a step, {exact[name] / seconds / 1e9:6.1f} exact GFLOP/s, dense/exact "
                  f"{dense[name] / exact[name]:.3f}; time at equal exact FLOPs {a_flop:.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

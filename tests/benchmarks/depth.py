"""What depth costs: compilation, and a step, by how the layers are run. Compiles everything anew.

    python tests/benchmarks/depth.py

First line: the compilation of 48 layers over that of 4, with the settings that the lab chooses for each and no cache. Then
for each depth the seconds a layer of unrolled layers, of a scan with several layers a turn, and with remat, side by side.
"""

import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax

from bare import Bare, side_by_side
from lab import hardware
from lab.compiled import compiled
from lab.execution import Execution
from lab.program import program
from lab.spec import Objective
from runs import make_run
from sweeps.ladder import shape

WAYS = {
    "unrolled": dict(scan=False),
    "scan": dict(scan=True),
    "scan, 4 a turn": dict(scan=True, unroll=4),
    "scan, remat": dict(scan=True, remat=True),
}


def main() -> None:
    kind = jax.default_backend()

    def of(D: int, L: int):
        return make_run("decoder_only", shape=shape(D, L), objective=Objective(S=64, T=64), batch=8)

    seconds: dict[int, list[float]] = {4: [], 48: []}
    for _ in range(3):
        for L, taken in seconds.items():
            compiled.cache_clear()
            jax.clear_caches()
            taken.append(compiled(program(of(64, L), hardware.choose(of(64, L), 260, kind))).seconds)
    few, many = (statistics.median(taken) for taken in seconds.values())
    print(f"compilation: 4 layers {few:.2f} s, 48 layers {many:.2f} s, ratio {many / few:.2f}", flush=True)
    for D, L in ((64, 4), (64, 8), (64, 12), (64, 16), (256, 4), (256, 12)):
        run = of(D, L)
        base = replace(hardware.choose(run, 260, kind), scan=False, unroll=1, remat=False)
        programs = {name: Bare(run, Execution(**{**base.to_json(), **way})) for name, way in WAYS.items()}
        found = side_by_side(programs, 5, base="unrolled")
        for name, (step, ratio) in found.items():
            built = programs[name].built
            print(f"D {D:3d} L {L:2d} {name:16s} {step / L * 1e3:7.2f} ms a layer, {ratio:.2f} of unrolled; compiled in "
                  f"{built.seconds:5.1f} s, {(built.memory_bytes or 0) / 2**20:7.0f} MB", flush=True)  # fmt: skip
        compiled.cache_clear()


if __name__ == "__main__":
    main()

"""Predicted memory over what the compiler allocates, for many structures, shapes and settings; and what a process really grows
by when it trains the largest of them.

    python tests/benchmarks/memory.py
"""

import os
import sys
import threading
from pathlib import Path

os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
sys.path.insert(0, str(Path(__file__).parent.parent))

from bare import Bare
from lab import memory
from lab.compiled import compiled, use_compilation_cache
from lab.execution import Execution
from lab.spec import Objective
from lab.structure import LADDER
from runs import make_run
from sweeps.ladder import shape

V = 260
CASES = [
    *(dict(D=D) for D in (32, 128, 256)),
    *(dict(L=6, **s) for s in ({}, dict(scan=True), dict(scan=True, remat=True))),
    *(dict(L=12, scan=True, remat=remat) for remat in (False, True)),
    dict(B=32), dict(B=32, microbatches=4), dict(B=32, loss="all"), dict(S=1, T=255, B=16, loss="all"),
    dict(S=256, T=256), dict(S=256, T=256, attention="reference"), dict(S=448, T=64),
    *(dict(name=name, B=16) for name in LADDER),
    *(dict(name=name, D=96, L=4, S=96, T=32, B=16, scan=True) for name in LADDER),
    *(dict(name=name, L=6, S=128, T=128, scan=True, remat=True) for name in ("encoder_decoder", "prefix_lm")),
    dict(D=256, L=4, S=128, T=128, B=16, loss="all"), dict(D=512, L=4, S=128, T=128, B=4),
]  # fmt: skip
LARGE = 200 * 2**20  # bytes from which on the process is looked at


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Grown:
    """The largest resident size while inside, over that before."""

    def __enter__(self) -> "Grown":
        self.before = self.most = resident()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(0.005):
            self.most = max(self.most, resident())

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.bytes = self.most - self.before


def main() -> None:
    use_compilation_cache()
    ratios, lived = [], []
    for given in CASES:
        case = {
            "name": "decoder_only",
            "D": 128,
            "L": 3,
            "S": 64,
            "T": 64,
            "B": 8,
            "loss": "targets",
            "scan": False,
            **given,
        }
        name, D, L, S, T, B, loss = (case.pop(key) for key in ("name", "D", "L", "S", "T", "B", "loss"))
        run = make_run(name, shape=shape(D, L), objective=Objective(S=S, T=T, loss=loss), batch=B)
        execution = Execution(steps_per_dispatch=4, **case)
        predicted = memory.predict(run, V, execution)
        bare = Bare(run, execution, start=False)
        allocated = bare.built.memory_bytes or 0
        ratios.append(predicted.total / allocated)
        said = f"{ratios[-1]:.2f} of {allocated / 2**20:5.0f} MiB"
        if allocated > LARGE:
            with Grown() as grown:
                bare.start()
            lived.append(predicted.total / grown.bytes)
            said += f", {lived[-1]:.2f} of the {grown.bytes / 2**20:5.0f} that the process grew by"
        print(f"{said}: {given}", flush=True)
        del bare
        compiled.cache_clear()
    print(f"{len(ratios)} cases: predicted / allocated {min(ratios):.2f} to {max(ratios):.2f}; {len(lived)} lived: "
          f"{min(lived):.2f} to {max(lived):.2f}")  # fmt: skip


if __name__ == "__main__":
    main()

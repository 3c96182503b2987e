"""Where one training step's time goes, by kind of operation, from a trace of the compiled program on one core.

taskset -c 0 python tests/benchmarks/operations.py --case d64
"""

import argparse
import collections
import os
import re
import tempfile
from pathlib import Path

os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

import jax

from bare import Bare
from lab import hardware
from peers.case import Case, V
from trainers import CASES

KINDS = {
    "products": r"dot|matmul|gemm",
    "copies into another order": r"copy|transpose|pad|slice|concatenate|gather|scatter|bitcast_fusion",
    "sums over rows, exponentials": r"reduce|exponential|subtract",
    "elementwise": r"",
}  # the first that is found in an operation's name


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", default="d64", choices=CASES)
    parser.add_argument("--list", type=int, default=0, help="the longest operations, by name")
    given = parser.parse_args()
    run = Case(**CASES[given.case]).run
    bare = Bare(run, hardware.choose(run, V, jax.default_backend()))
    bare.seconds()
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            step = bare.seconds() * 1e3
        (trace,) = Path(directory).rglob("*.xplane.pb")
        events = [
            (event.name, event.duration_ns / 1e6 / bare.k)
            for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
            for line in plane.lines
            if "XLAEigen" in line.name or "XLATfrtCpuClient" in line.name
            for event in line.events
            if re.fullmatch(r"[a-z][\w\-.]*", event.name)
        ]
    spent, names = collections.Counter(), collections.defaultdict(set)
    for name, milliseconds in events:
        kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))
        spent[kind] += milliseconds
        names[kind].add(name)
    print(f"{given.case}: {step:.2f} ms a step, {sum(spent.values()):.2f} of them in operations")
    for kind, milliseconds in spent.most_common():
        print(f"{milliseconds:8.2f} ms  {milliseconds / step:5.1%}  {len(names[kind]):4d} {kind}")
    each = collections.Counter()
    for name, milliseconds in events:
        each[name] += milliseconds
    for name, milliseconds in each.most_common(given.list):
        print(f"{milliseconds:8.3f} ms  {name}")


if __name__ == "__main__":
    main()

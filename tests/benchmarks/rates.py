"""Floating-point rates of the trainer by width, on one core: what lab.hardware's estimate is made of.

python tests/benchmarks/rates.py runs/quickstart
"""

import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

from lab import hardware, plan_file, records, spec


def main(study: Path) -> None:
    by_width = defaultdict(list)
    for row in plan_file.read(study)["runs"]:
        result = records.read_result(records.run_directory(study, row["run_id"]))
        if result is None or result["status"] != "done":
            continue
        run, measured = spec.from_json(row["run"]), result["measured"]
        seconds = result["outcome"]["tokens_seen"] / measured["tokens_per_second"]
        step = seconds / result["outcome"]["steps"]
        estimate = hardware.step_seconds(run, 260)
        by_width[run.shape.D].append(
            (step, estimate, result["planned"]["dense"] / seconds, measured["compile_seconds"])
        )
    for D, rows in sorted(by_width.items()):
        step, estimate, rate, compile_seconds = (median(column) for column in zip(*rows, strict=True))
        print(f"D {D:3d}: {len(rows):3d} runs, {step * 1e3:7.2f} ms a step (estimated {estimate * 1e3:7.2f}), "
              f"{rate / 1e9:5.1f} GFLOP/s dense, compiled in {compile_seconds:.1f} s")  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))

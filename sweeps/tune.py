"""From a sweep over learning rates to a rule: each size's optimum on a log-parabola, then a power law in size.

python -m sweeps.tune runs/learning_rate docs/learning-rate.csv
"""

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab import plan_file, records, spec
from sweeps.ladder import Size


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best learning rate of one cell; `edge` where the grid's own best is its first or last rate."""

    rate: float
    loss: float
    edge: bool


def optimum(rates: Sequence[float], losses: Sequence[float]) -> Optimum:
    """Vertex of the parabola in log rate through the best point and its two neighbours."""
    order = np.argsort(rates)
    x, y = np.log(np.asarray(rates, float)[order]), np.asarray(losses, float)[order]
    best = int(np.argmin(y))
    if best in (0, len(y) - 1):
        return Optimum(rate=float(np.exp(x[best])), loss=float(y[best]), edge=True)
    a, b, c = np.polyfit(x[best - 1 : best + 2], y[best - 1 : best + 2], 2)
    return Optimum(rate=float(np.exp(-b / (2 * a))), loss=float(c - b * b / (4 * a)), edge=False)


def power_law(sizes: Sequence[float], rates: Sequence[float]) -> tuple[float, float]:
    """(coefficient, exponent) of rate = coefficient * size^exponent, by least squares in logarithms."""
    exponent, intercept = np.polyfit(np.log(sizes), np.log(rates), 1)
    return float(np.exp(intercept)), float(exponent)


def cells(study: Path) -> dict[tuple[str, int, float], list[tuple[float, float]]]:
    """(arm, D, body FLOPs per token) -> [(learning rate, held-out loss)] of a study's runs; diverged ones are left out."""
    found: dict[tuple[str, int, float], list[tuple[float, float]]] = {}
    for row in plan_file.read(study)["runs"]:
        result = records.read_published(records.run_directory(study, row["run_id"]))
        if result is None:
            raise ValueError(f"{study}: {row['run_id']} has not ended; `lab run` goes on")
        run = spec.from_json(row["run"])
        key = (row["arm"], run.shape.D, Size.of(run, run.V).body_flops)
        if result["status"] == "done":
            found.setdefault(key, []).append((row["learning_rate"], result["outcome"]["loss"]))
    return found


def main(study: Path, table: Path | None) -> None:
    points = []
    rows = [("arm", "D", "body_flops_per_token", "learning_rate", "loss")]
    for (arm, D, size), measured in cells(study).items():
        best = optimum(*zip(*measured, strict=True))
        rows += [(arm, D, size, rate, loss) for rate, loss in sorted(measured)]
        note = "  (at the edge of the grid: left out)" if best.edge else ""
        print(f"{arm:16s} D {D:3d}  {size:9.0f} FLOPs/token  best rate {best.rate:.5f}  loss {best.loss:.4f}{note}")
        if not best.edge:
            points.append((arm, size, best.rate))
    coefficient, exponent = power_law([p[1] for p in points], [p[2] for p in points])
    spread = np.std([np.log(rate / (coefficient * size**exponent)) for _, size, rate in points])
    print(f"all arms: rate = {coefficient:.4g} * body_flops^{exponent:.4g}, spread {spread:.2f} in log rate")
    for arm in dict.fromkeys(p[0] for p in points):
        own = [p for p in points if p[0] == arm]
        print("{}: rate = {:.4g} * body_flops^{:.4g}".format(arm, *power_law([p[1] for p in own], [p[2] for p in own])))
    if table is not None:
        with table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else None)
